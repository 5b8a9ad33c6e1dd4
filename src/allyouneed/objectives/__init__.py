"""What is to be learned: pure functions `objective(module, batch) -> Loss`. Knows no optimiser, no loop, no files."""
