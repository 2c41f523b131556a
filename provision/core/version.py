"""Holds the version of firstlight; the wheel's metadata and `--version` are read from here."""

VERSION = "0.1.0"
