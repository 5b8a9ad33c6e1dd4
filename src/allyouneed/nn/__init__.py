"""Parts of models. Each is a module with a nested `Config` that builds it; ideas are new parts beside the old ones."""
