"""Text and what comes of it: materials, corpora, tokenizers, rows of tokens, iterators. No models."""
