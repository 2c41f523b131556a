"""Describes this host: its hardware, its provider, the variant of PyTorch that fits it, and the caches of its tools."""
