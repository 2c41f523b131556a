"""The root on the volume: its marker, run lock, journal, variables, and the record of links into it."""
