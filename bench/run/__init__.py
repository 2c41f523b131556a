"""Runs the cases of a suite within a time budget, judges the run, and stores it."""
