"""Takes secrets out of texts: tokens, passwords in URLs, and characters that steer a terminal.

Standard library alone and no syntax newer than Python 3.6: the bootstrap imports it.
"""

import os
import re

# Tokens of users, of organisations, and those that a program is lent.
_TOKEN = re.compile(r"(hf_|api_org_)[A-Za-z0-9]{8,}|(hf_)(?:oauth|jwt)_[A-Za-z0-9._-]{8,}")
# What stands before the host of a URL; a password may hold a slash, a port is none.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s]+|[^/\s:@\[]+:(?!\d+/)[^\s@]+)(?=@)")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST_SECRET = 6
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")  # all but tab and newline: a server may send escapes


def redact(text: str) -> str:
    """Take Hugging Face tokens, passwords in URLs and control characters out of a text."""
    for name in _TOKEN_VARIABLES:  # whatever it looks like
        token = os.environ.get(name, "").strip()
        if len(token) >= _SHORTEST_SECRET:
            text = text.replace(token, "hf_…")
    return _CONTROL.sub("", _CREDENTIALS.sub("…", _TOKEN.sub(r"\1\2…", text)))
