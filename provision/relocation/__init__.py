"""Moves folders to the volume, links their old paths to them, and restores the links after a wipe."""
