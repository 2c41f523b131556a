"""Reads and writes lock files: conda-lock files and pip requirements; packages are not installed here."""
