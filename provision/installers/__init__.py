"""Reads the host's settings of pip, uv and conda, and runs the installers uv and rattler."""
