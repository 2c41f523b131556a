"""Removes tokens, passwords in URLs and terminal control characters from texts.

The bootstrap imports this module, so it uses the standard library only and no syntax newer than Python 3.6.
"""

import os
import re

# Hugging Face tokens of users and of organisations, and temporary tokens of programs (oauth, jwt).
_TOKEN = re.compile(r"(hf_|api_org_)[A-Za-z0-9]{8,}|(hf_)(?:oauth|jwt)_[A-Za-z0-9._-]{8,}")
# The credentials before the host of a URL. A password may contain a slash; a port is not a password.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s]+|[^/\s:@\[]+:(?!\d+/)[^\s@]+)(?=@)")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST_SECRET = 6
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")  # except tab and newline; a server may send escape codes


def redact(text: str) -> str:
    """Return a text without Hugging Face tokens, passwords in URLs and control characters."""
    for name in _TOKEN_VARIABLES:  # a token in a variable is removed whatever its format
        token = os.environ.get(name, "").strip()
        if len(token) >= _SHORTEST_SECRET:
            text = text.replace(token, "hf_…")
    return _CONTROL.sub("", _CREDENTIALS.sub("…", _TOKEN.sub(r"\1\2…", text)))
