"""Reads lock files: conda-lock's and pip's requirements. Installing is not done here."""
