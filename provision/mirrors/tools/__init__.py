"""One class for each tool whose files mirrors serve: its settings, addresses, probe, configuration files, variables."""
