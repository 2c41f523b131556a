"""Define the records and statistics that worker and parent share. They need only the standard library."""
