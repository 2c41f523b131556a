"""Defines the tool pip, which includes uv: their index of Python packages, its probe and their settings files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from provision.installers import pip_settings, uv, uv_settings
from provision.mirrors import config_text
from provision.mirrors.chosen_mirrors import OFFICIAL, MirrorSource
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.tools import probe_pages
from provision.mirrors.tools.tool import ConfigFile, ConfigScope, MachineSettings, Stage, Tool
from provision.mirrors.tools.torch import Torch
from provision.volume.variables import VariableGroup

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.mirrors.chosen_mirrors import MirrorRecord
    from provision.mirrors.probe_mirror import Prober
    from provision.mirrors.probe_needs import ProbeNeeds


class Pip(Tool):
    """Defines the tool pip; the settings of uv, which installs from the same index, are written too."""

    name = "pip"
    # pip reads a settings file in an environment. uv does not, so activation of the environment sets its variable.
    variable_groups = (VariableGroup("PIP_INDEX_URL"), VariableGroup("UV_DEFAULT_INDEX", at_activation=True))

    def own_setting(self, machine: MachineSettings, record: MirrorRecord) -> str | None:
        """Return, as text, the first index that the user has set for pip or uv; None without one.

        It may be set in an environment variable or in a settings file.
        """
        return uv.own_index(machine.environ, machine.pip, machine.home, record.chosen(self.name).url or None)

    def official(self, needs: ProbeNeeds) -> MirrorSource:  # noqa: ARG002 (one index serves every lock)
        """Return the official index, with its URL from the installed pip."""
        return MirrorSource(OFFICIAL, pip_settings.official_index())

    def probe_files(self, needs: ProbeNeeds) -> list[ProbeFile]:
        """Return the probe files of the variant in witnesses.toml, or three packages of its lock file without any."""
        # Rows are matched by checksum, since a lock file may have two versions of a package for two versions of Python.
        selected = needs.rows.pip.get(needs.variant.name, [])
        rows = [row for row in selected if row.sha256 in needs.hashes.get(row.name, ("", ()))[1]]
        if rows:
            return [ProbeFile(row.name, row.version, row.why, frozenset({row.sha256}), row.size) for row in rows]
        first = sorted(name for name, (version, _) in needs.hashes.items() if "+" not in version)[:3]
        return [ProbeFile(name, needs.hashes[name][0], "locked", needs.hashes[name][1]) for name in first]

    def probe(self, prober: Prober) -> None:
        """Read the index page of each probe file's package, then request files to which these pages have links.

        Raises:
            UnusableError: a response is not an index page, or a file has a wrong checksum.
        """
        base = prober.target.url.rstrip("/")
        files = {
            probe_file: probe_pages.linked_files(prober, f"{base}/{probe_file.name}/", probe_file)
            for probe_file in prober.probe_files
        }
        probe_pages.check(prober, files)

    def variables(self, source: MirrorSource) -> dict[str, str]:
        """Return the variables of pip and uv with the URL of the index."""
        return {"PIP_INDEX_URL": source.url, "UV_DEFAULT_INDEX": source.url}

    def config_files(self, scope: ConfigScope) -> list[ConfigFile]:
        """Return the user's settings files of pip and uv, and the environment's pip.conf.

        The environment's pip.conf also has the page of the chosen torch mirror.
        """
        index = scope.record.chosen(self.name).url or None
        torch = scope.record.chosen(Torch.name)
        links = [] if torch.is_official else [Torch.page(torch)]
        user, user_uv = _user_file(scope.home, scope.environ), uv_settings.paths(scope.environ, scope.home)[0]
        files = [
            ConfigFile(user, lambda content: config_text.pip_config(content, index), Stage.USER),
            ConfigFile(user_uv, lambda content: config_text.uv_config(content, index), Stage.USER_UV),
        ]
        if scope.python_source is not None:
            path = scope.prefix / ("pip.ini" if sys.platform == "win32" else "pip.conf")
            files.append(
                ConfigFile(path, lambda content: config_text.pip_config(content, index, links), Stage.ENVIRONMENT)
            )
        return files


def _user_file(home: Path, environ: Mapping[str, str]) -> Path:
    """Return the path of the user's pip.conf or pip.ini (source: pip's documentation of its configuration files)."""
    if environ.get("PIP_CONFIG_FILE") not in {None, "", os.devnull}:
        return Path(environ["PIP_CONFIG_FILE"])
    if sys.platform == "win32":
        return Path(environ.get("APPDATA") or home / "AppData/Roaming") / "pip" / "pip.ini"
    mac = home / "Library/Application Support/pip"
    if sys.platform == "darwin" and mac.is_dir():
        return mac / "pip.conf"
    return Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
