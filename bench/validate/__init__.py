"""Examines the devices of a host, and judges their health and speed by rules."""
