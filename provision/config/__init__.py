"""Reads the files that people write (host.toml, models.toml, torch.toml) strictly; defaults are not computed here."""
