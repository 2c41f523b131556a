"""Reads the catalogue of mirrors, probes and selects mirrors, runs the failover proxy, and writes settings files."""
