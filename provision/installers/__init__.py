"""How pip, uv and conda are configured on this machine, and how they are started."""
