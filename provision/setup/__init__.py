"""The plan of a setup, the doctor, and undo: the only package that knows every subject."""
