"""Moves folders to the volume, makes links to them at their old paths, and restores the links after a wipe."""
