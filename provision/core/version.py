"""Holds the version of firstlight, which the wheel's metadata and `--version` show."""

VERSION = "0.1.0"
