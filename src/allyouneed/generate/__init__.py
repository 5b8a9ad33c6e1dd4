"""The engine, and the one way to ask a language model: local or remote."""
