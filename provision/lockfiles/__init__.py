"""Reads and writes lock files: conda-lock files and pip requirements. Code that installs packages is not here."""
