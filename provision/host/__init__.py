"""What this host is: its facts, its provider, the build of torch that fits, and where its tools keep their caches."""
