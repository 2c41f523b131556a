"""Measures how fast diffusion is on a host, and says how far the number can be believed."""
