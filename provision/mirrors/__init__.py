"""Package and model mirrors: the catalogue, the probe, the selection, and what is written into the tools' settings."""
