"""The root that survives: its marker, its lock, its journal, and the links that lead to it."""
