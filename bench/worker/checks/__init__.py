"""Examine a device for `bench validate`, under the measured interpreter."""
