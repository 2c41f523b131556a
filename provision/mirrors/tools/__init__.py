"""Defines each tool with mirrors (pip, conda, torch, hf): its settings, official source, probe and variables."""
