"""Compositions of `nn`'s parts. A named architecture is a function that returns a config, plus a table of names."""
