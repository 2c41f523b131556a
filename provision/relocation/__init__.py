"""Moves a folder to the root, leaves a link, and restores the links after a wipe."""
