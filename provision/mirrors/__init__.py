"""Mirrors of packages and models: catalogue, probe, selection, failover proxy, and the settings files of the tools."""
