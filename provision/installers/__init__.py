"""The installers pip, uv and rattler: the machine's settings for them, and the code that runs them."""
