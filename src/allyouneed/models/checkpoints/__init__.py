"""Other people's checkpoints: their files, fields and names, both ways. `loading` holds what the public face shows."""
