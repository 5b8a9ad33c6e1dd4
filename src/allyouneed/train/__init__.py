"""The one training loop and what it stands on: optimisers, schedules, checkpoints, ranks. Knows no model, no data."""
