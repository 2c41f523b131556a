"""Reads the files that people write (host.toml, models.toml, torch.toml), and rejects unknown keys and wrong types.

A value such as "auto" stays as it is; other packages replace it by a value for the host.
"""
