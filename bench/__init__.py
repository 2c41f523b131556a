"""Measures how fast a host runs diffusion models, and how reliable the figures are."""
