"""The commands of `allyouneed`, one module per group, each with `register(app)`; heavy imports inside functions."""
