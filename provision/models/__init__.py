"""Pulls, verifies, lists and removes the models of the Hugging Face cache, and builds their stand-ins."""
