"""Defines the commands of `bench`: their flags, texts and JSON. Other packages do the work."""
