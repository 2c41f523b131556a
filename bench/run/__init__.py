"""Runs the cases of a suite within a time budget, derives the verdict, and stores the run."""
