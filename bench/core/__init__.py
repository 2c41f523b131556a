"""Define the data that worker and parent share: results, axes, statistics, protocol. Only the standard library."""
