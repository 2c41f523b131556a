"""Builds environments from their lock files, and verifies, activates, lists and removes them."""
