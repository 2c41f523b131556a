"""Reads the host's settings of pip, and makes an HTTP session with the same proxy and certificates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import child_environment, process

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests


def pip_settings(environ: Mapping[str, str]) -> dict[str, list[str]]:
    """Return {option of pip: its values} from the host's pip files and the environment variables PIP_…."""
    return child_environment.parse_pip_config(pip_config_list(environ))


def official_index() -> str:
    """Return the URL of the official index, which is the default of the installed pip."""
    from pip._internal.models.index import PyPI

    return PyPI.simple_url


def session(environ: Mapping[str, str], settings: Mapping[str, list[str]]) -> requests.Session:
    """Return an HTTP session with the same proxy and certificates as uv, and the User-Agent `firstlight`.

    Args:
        environ: the environment variables.
        settings: {option of pip: its values}, as `pip_settings` returns them.
    """
    from provision.net import session as http_session

    http = http_session.Session()
    http.headers["User-Agent"] = "firstlight"
    certificates = [environ.get("SSL_CERT_FILE"), *settings.get("cert", [])]
    if first := next((path for path in certificates if path and Path(path).exists()), None):
        http.verify = first
    if "client-cert" in settings:
        http.cert = settings["client-cert"][0]
    if "proxy" in settings:
        http.proxies = dict.fromkeys(("http", "https"), settings["proxy"][0])
    return http


def forbids_index(settings: Mapping[str, list[str]]) -> bool:
    """Return whether pip's option no-index is on, so that pip uses no index; `settings` as `pip_settings` returns."""
    return settings.get("no-index", ["0"])[0].lower() in {"1", "true", "yes", "on"}


def pip_config_list(environ: Mapping[str, str]) -> str:
    """Return the output of `pip config list`, which has the settings of pip's files and environment variables.

    It is run with the pip of the toolbox, the venv in which firstlight runs.
    """
    pip = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "config", "list"]
    return process.run(pip, env=child_environment.for_pip_config(environ), timeout_seconds=60).stdout
