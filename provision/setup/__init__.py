"""Reads the definition of a host, plans its setup, examines it and undoes runs; imports all packages but the cli."""
