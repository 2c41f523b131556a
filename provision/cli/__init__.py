"""Defines the commands of `provision`: their flags, their text output and their JSON. Other packages do the work."""
