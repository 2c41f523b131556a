"""Resolves hosts, plans their setup, examines them and undoes runs: the only package that imports every subject."""
