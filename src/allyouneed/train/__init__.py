"""The one training loop, its optimisers, schedules and checkpoints."""
