"""The commands of `bench`: flags, text and JSON. What they do is done elsewhere."""
