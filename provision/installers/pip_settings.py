"""Where this machine gets packages from: its pip settings, carried over to uv, which ignores them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import child_environment, process

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests


def pip_settings(environ: Mapping[str, str]) -> dict[str, list[str]]:
    """{option: values} of this machine's pip, files and environment together."""
    return child_environment.parse_pip_config(pip_config_list(environ))


def official_index() -> str:
    """The official index, as the installed pip has it."""
    from pip._internal.models.index import PyPI

    return PyPI.simple_url


def session(environ: Mapping[str, str], settings: Mapping[str, list[str]]) -> requests.Session:
    """How we ask ourselves what uv would ask: with the machine's proxy and certificates, and by our name."""
    from provision.net import session as http_session

    asking = http_session.Session()
    asking.headers["User-Agent"] = "firstlight"
    certificates = [environ.get("SSL_CERT_FILE"), *settings.get("cert", [])]
    if first := next((each for each in certificates if each and Path(each).exists()), None):
        asking.verify = first
    if "client-cert" in settings:
        asking.cert = settings["client-cert"][0]
    if "proxy" in settings:
        asking.proxies = dict.fromkeys(("http", "https"), settings["proxy"][0])
    return asking


def says_no_index(settings: Mapping[str, list[str]]) -> bool:
    """Whether pip asks no index at all here."""
    return settings.get("no-index", ["0"])[0].lower() in {"1", "true", "yes", "on"}


def pip_config_list(environ: Mapping[str, str]) -> str:
    """What the toolbox's pip says of its configuration, files and environment together."""
    pip = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "config", "list"]
    return process.run(pip, env=child_environment.for_pip_config(environ), timeout_seconds=60).stdout
