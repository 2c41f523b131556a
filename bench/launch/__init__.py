"""Starts worker processes, reads their events, and monitors them from the parent process."""
