"""The tools for which mirrors are chosen, a class each: settings, official source, probe, settings files, variables."""
