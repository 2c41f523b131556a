"""A run of cases: which, in which order and in how much time; its verdict, and where it is kept."""
