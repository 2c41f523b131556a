"""Whether a host's devices are healthy and as fast as they should be."""
