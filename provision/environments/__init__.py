"""Environments: built from their locks, verified, activated, found and removed."""
