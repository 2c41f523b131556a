"""The files that people write (host.toml, models.toml, torch.toml), read strictly. No default is worked out here."""
