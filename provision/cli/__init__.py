"""The commands of `provision`: flags, text and JSON. What they do is done elsewhere."""
