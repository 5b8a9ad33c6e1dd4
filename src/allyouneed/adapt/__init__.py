"""What turns a module into another one around the same weights: adapters and quantised storage."""
