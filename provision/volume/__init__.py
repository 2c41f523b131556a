"""Manages the root on the volume: its marker, run lock, journals and variables, and the record of links into it."""
