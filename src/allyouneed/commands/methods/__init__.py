"""What `finetune` can be asked for: a method is one object, which `table` knows by name."""
