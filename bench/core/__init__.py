"""Data that the worker and its parent share: results, axes, statistics, and the protocol. Standard library alone."""
