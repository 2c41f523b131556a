"""Starts worker processes, reads what they say, and watches them from outside."""
