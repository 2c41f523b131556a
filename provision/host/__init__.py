"""Describes this host: its hardware, its provider, the fitting variant of PyTorch, and the caches of its tools."""
