"""What the worker and its parent both know: results, axes, statistics, and the protocol. Standard library alone."""
