"""The readers of state on the volume and in the home, and of the user's files, each with a valid file.

A reader writes the file to its place, and uses the result as the commands do.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.config import toml
from provision.config.host import HostSpec
from provision.config.models import ModelFile, ModelSpec
from provision.config.torch import TorchSpec
from provision.core import yaml_text
from provision.core.child_environment import parse_pip_config
from provision.core.layout import Root
from provision.environments import conda_pip_conflicts, installed_wheels, prefix
from provision.environments.discover import environments
from provision.fs import lease
from provision.installers import conda_settings, uv_settings
from provision.lockfiles import conda_lock, requirements
from provision.lockfiles.conda_lock import CondaPackage
from provision.lockfiles.requirements import LockedPackage
from provision.mirrors import catalogue, chosen_mirrors, config_text, index_page
from provision.models import architectures, manifest, pins, safetensors, snapshots, tree_listing
from provision.models import step as model_step
from provision.relocation.move_pair import MovePair
from provision.relocation.undo_merge import UndoMergeStep
from provision.setup import undo
from provision.volume import adoption, home_record, journal_acts, link_uses, links, marker, relink_script, variables
from provision.volume import journal as journals
from provision.volume.environment_marker import python_source, read_owner
from provision.volume.owner import Owner
from provision.volume.run_lock import _older_holder_text
from provision.volume.volume_capabilities import known, recorded
from tests.fuzz import mutations

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis import strategies as st

COMMIT, SHA1, SHA256 = "a" * 40, "b" * 40, "c" * 64
MODEL = ModelSpec(repo="me/tiny", revision=COMMIT, license="mit", architecture="a", files=[ModelFile(path="w.txt")])
REPO = "cache/huggingface/hub/models--me--tiny"
OWNER = Owner("host", "/home/me")


@dataclass(frozen=True)
class Parser:
    """Describe a reader: the place of its file, the strategy for damaged files, the reader, and what it must accept."""

    place: str
    sample: bytes
    inputs: st.SearchStrategy[bytes]
    read: Callable[[Path], object]

    def run(self, folder: Path, content: bytes) -> object:
        """Write the content to the file, and read it."""
        path = folder / self.place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return self.read(folder)


def _text(place: str, sample: str, read: Callable[[Path], object]) -> Parser:
    return Parser(place, sample.encode(), mutations.bytes_of(sample.encode()), read)


def _toml(place: str, sample: str, read: Callable[[Path], object]) -> Parser:
    return Parser(place, sample.encode(), mutations.toml_of(sample), read)


def _yaml(place: str, sample: str, read: Callable[[Path], object]) -> Parser:
    return Parser(place, sample.encode(), mutations.yaml_of(sample, yaml_text.load(sample)), read)


def _json(place: str, sample: Any, read: Callable[[Path], object]) -> Parser:
    return Parser(place, json.dumps(sample).encode(), mutations.json_of(sample), read)


def _root(folder: Path) -> Root:
    return Root(folder, has_own_hub=False)


def _links(folder: Path) -> object:
    root, owner = _root(folder), OWNER
    content = links.read(root)
    adoption.offer(root, owner)
    for file in (content, content.with_links(owner, root, links.recorded(root, owner))):
        relink_script.shell_script("id", file), relink_script.powershell_script("id", file), file.to_json()
    return (
        link_uses.link_uses(root, folder, {}),
        links.of_unknown_owner(root, folder),
        link_uses.earlier_roots([], root),
    )


def _journal(folder: Path) -> object:
    root = _root(folder)
    uses = link_uses.link_uses(root, folder, link_uses.read_journals(root))
    for run in undo.runs(root):
        json.dumps(run.to_dict())
        undo.kept_changes(run)
        steps = undo.steps(run, root, folder, journals.Journal(root.journal))
        return [(step.describe(), step.check()) for step in steps]
    return uses


def _variables(folder: Path) -> object:
    values = variables.read(_root(folder), OWNER)
    assert set(values) <= variables.NAMES
    return [variables.script(values, shell) for shell in variables.SHELLS]


def _pins(folder: Path) -> object:
    root = _root(folder)
    return pins.apply(root, MODEL), pins.source(root, MODEL, "w.txt"), pins.by_mirrors(root, MODEL)


def _mirrors(folder: Path) -> object:
    record = chosen_mirrors.read(_root(folder))
    if record is None:
        return None
    addresses = [source.conda_addresses for tool in record.choices for source in record.sources(tool)]
    return addresses, chosen_mirrors.to_json(record)


def _home(folder: Path) -> object:
    root = _root(folder)
    home_record.content_with_paths(folder, root, "id", [links.Link(folder / "x", folder / "y")])
    return home_record.used(folder, root), home_record._content(home_record.read(folder))


def _marker_of_environment(folder: Path) -> object:
    owner = read_owner(folder)
    return environments(_root(folder), folder, {}) if owner is None else python_source(owner)


def _conda_meta(folder: Path) -> object:
    environment = folder / "env"
    (environment / "share").mkdir(exist_ok=True)
    (environment / "share/x").write_bytes(b"x")
    package = CondaPackage("hello", "1.0", "noarch", "https://conda.example/hello-1.0-0.conda", "", SHA256)
    damage = prefix.damaged_conda_packages(environment, [package], deep=True)
    return damage, conda_pip_conflicts.conflicts(environment)


def _wheel(folder: Path) -> object:
    site = folder / "env/lib/python3.11/site-packages"
    (site / "hello").mkdir(exist_ok=True)
    (site / "hello/__init__.py").write_bytes(b"x")
    return installed_wheels.damaged_packages(site, [LockedPackage("hello", "1.0")], deep=True)


def _snapshots(folder: Path) -> object:
    repo = folder / REPO
    for blob in (SHA1, SHA256):
        (repo / "blobs").mkdir(parents=True, exist_ok=True)
        (repo / "blobs" / blob).write_bytes(b"x")
    for tree in (repo / "trees").glob("*.json"):
        tree_listing.listed_blobs(tree)
    step = snapshots.SnapshotStep(_root(folder), [MODEL], journals.Journal(folder / "journal"))
    missing = step._missing(repo)
    for commit, rows in missing.links.items() if missing else ():
        snapshots.link(repo, commit, rows)
    return step.check()


def _merge(folder: Path) -> object:
    pair = MovePair(folder / "old", folder / "new")
    journal = journals.Journal(folder / ".firstlight/journal")
    step = UndoMergeStep(pair, [folder / "manifest.json"], _root(folder), folder, journal, earlier_target=pair.target)
    (folder / "new").mkdir(exist_ok=True)
    return step._entries(), step.check(), step.size_to_copy()


def _conda_settings(folder: Path) -> object:
    own = conda_settings.own_channels({}, folder, ["https://x"])
    return own, conda_settings.mirrors({}, folder), environments(_root(folder / "root"), folder, {})


def _condarc(folder: Path) -> object:
    values = {"channel_alias": "https://m.example", "custom_channels": {"main": "https://m.example/c"}}
    return config_text.condarc((folder / ".condarc").read_bytes(), values)


def _uv_toml(folder: Path) -> object:
    settings, _ = uv_settings.read({"UV_CONFIG_FILE": str(folder / "uv.toml")}, folder)
    text = uv_settings.write(settings)
    uv_settings.parse(text)
    return uv_settings.indexes(settings), uv_settings.find_links(settings)


def _lock(folder: Path) -> object:
    text = (folder / "cpu.lock").read_text(encoding="utf-8", errors="replace")
    hashes = requirements.hashes(text)
    return requirements.parse(text, "3.11.7", folder / "cpu.lock"), hashes, requirements.split(text, ["torch"])


def _safetensors(sample: Any) -> Parser:
    def file(header: bytes) -> bytes:
        return struct.pack("<Q", len(header)) + header + b"\0" * 8

    whole = file(json.dumps(sample).encode())
    inputs = mutations.json_of(sample).map(file) | mutations.bytes_of(whole)
    return Parser("w.safetensors", whole, inputs, lambda folder: safetensors.read_header(folder / "w.safetensors"))


def _page(kind: str) -> Callable[[Path], object]:
    return lambda folder: index_page.read((folder / "page").read_bytes(), kind, "https://index.example/simple/x/")


def _acts() -> list[dict[str, object]]:
    """Return one row for each act, with relative paths below a folder that does not exist."""
    values: dict[object, object] = {"Path": "/nowhere/x", "str": "x", "int": 7}
    rows: list[dict[str, object]] = []
    for record in journal_acts.Act.__args__:
        row: dict[str, object] = {"act": record.act, "at": 1e9}
        for field in dataclasses.fields(record):
            hint = str(field.type)
            row[field.name] = ["/nowhere/x"] if hint.startswith("tuple") else values[hint.partition(" ")[0]]
        rows.append(row)
    return rows


_HEADER = {"schema": 2, "started": "20260101T000000Z", "command": "setup", "host": "h", "home": "/h", "root": "/r"}
_ROW = {"host": "host", "home": "/home/me", "root": "/mnt", "path": "~/x", "target": "cache/x"}
_SOURCE = {
    "name": "m",
    "url": "https://m.example/",
    "kind": "index",
    "channels": {"a": "https://c/a"},
    "defaults": None,
}
_WRITTEN = {"path": "/h/.condarc", "kept": None, "mode": 420, "sha256": SHA256, "folders": ["/h"]}
_MIRRORS = {"choices": {"pip": {"asked": "auto", "sources": [_SOURCE], "why": "w"}}, "written": [_WRITTEN]}
_ENTRY = {"path": "a/b", "kind": "file", "action": "added", "other": None, "mode": 420, "size": 1, "mtime_ns": 5}
_CONDA_FILE = {"_path": "share/x", "path_type": "hardlink", "sha256": SHA256, "size_in_bytes": 1}
_CONDA = {"name": "hello", "version": "1.0", "build": "0", "depends": ["python >=3"], "sha256": SHA256}
_TREE = {
    "w.txt": {"size": 1, "blob_id": SHA1},
    "a/b": {"size": 9, "blob_id": SHA1, "lfs_sha256": SHA256, "lfs_size": 1},
}
_MODELS = f"""[tiny]
repo = "me/tiny"
revision = "{COMMIT}"
license = "mit"
architecture = "tiny-ddpm"
files = [{{path = "w.txt", size = 1, sha256 = "{SHA256}"}}, {{path = "a/b"}}]
extras = {{more = [{{path = "c"}}]}}
"""
_HOST = """root = "/mnt"
relocate = ["pip", {path = "~/work", to = "work"}]
mirror = {pip = "evil", hf = "official"}
models = ["tiny"]
login = true
"""
_CONDARC = "channels:\n  - conda-forge\nchannel_alias: https://x.example/\ncustom_channels:\n  a: https://y\n"
_UV = 'find-links = ["wheels"]\n[[index]]\nurl = "https://x"\nname = "a"\n[pip]\nno-index = true\n'
_LOCK = f"# a lock\ntorch==2.0 ; python_full_version < '3.12' \\\n    --hash=sha256:{SHA256}\nx[y]==1 \\\n"
_CONDA_LOCK = f"""version: 1
package:
- name: hello
  version: '1.0'
  manager: conda
  platform: linux-64
  dependencies: {{python: '>=3'}}
  url: https://conda.example/hello-1.0-0.conda
  hash: {{md5: {"d" * 32}, sha256: {SHA256}}}
"""
_TORCH = 'python = ["3.11"]\n[[variant]]\nname = "cpu"\ntorch = "2.0"\ndriver = "535"\n[older_cards]\nP4 = "6.1"\n'
_PAGE = {"files": [{"filename": "x-1-py3-none-any.whl", "url": "x.whl", "hashes": {"sha256": SHA256}, "size": 3}]}
_HTML = f'<!DOCTYPE html><title>x</title><a href="x-1-py3-none-any.whl#sha256={SHA256}">x</a>\n'
_CAPABILITIES = {"writable": True, "symlink": True, "mtime_ns": 1}
_IDENTITY = {"host": "h", "pid": 4, "boot": "b", "namespace": "n", "start": "1", "machine": "m"}
_ARCHITECTURE = {
    "classes": {"unet": ["diffusers", "UNet2DModel"]},
    "unet": {"a": 1},
    "parameters": {"unet": 3},
    "native": {"class": "X"},
}


def _recorded_features(folder: Path) -> object:
    root = _root(folder)
    recorded(root)
    return known(root).kept


PARSERS = {
    "links.json": _json(
        ".firstlight/links.json", {"schema": 2, "links": [_ROW], "adopted": [_ROW | {"by": _ROW}]}, _links
    ),
    "volume.json": _json(
        ".firstlight/volume.json", {"schema": 1, "id": "x", "created": "c"}, lambda f: marker.read_marker(_root(f))
    ),
    "journal": Parser(
        ".firstlight/journal/20260101T000000Z-1.jsonl",
        mutations._lines([_HEADER, *_acts()]),
        mutations.lines_of([_HEADER, *_acts()]),
        _journal,
    ),
    "variables.json": _json(
        ".firstlight/variables.json", {"schema": 1, "variables": {"HF_ENDPOINT": "https://x"}}, _variables
    ),
    "variables of a home": _json(
        str(variables.shell_file(Root(Path()), OWNER).with_suffix(".json")),
        {"schema": 2, "host": "host", "home": "/home/me", "variables": {"HF_ENDPOINT": "https://x"}},
        _variables,
    ),
    "mirrors.json": _json(
        ".firstlight/mirrors.json", {"schema": 1, "nodefaults": False, "restored": False, **_MIRRORS}, _mirrors
    ),
    "stand-ins.json": _json(".firstlight/stand-ins.json", {"tiny": "w"}, lambda f: model_step.recorded(_root(f))),
    "model-pins.json": _json(
        ".firstlight/model-pins.json",
        {"pins": {f"me/tiny@{COMMIT}": {"w.txt": {"size": 3, "sha256": SHA256, "from": "m"}}}},
        _pins,
    ),
    "holder.json": _json(
        ".firstlight/holder.json", {"pid": 1, "host": "h", "started": "s"}, lambda f: _older_holder_text(_root(f))
    ),
    "capabilities.json": _json(
        ".firstlight/capabilities.json",
        {"schema": 1, "hosts": {"h 0": {"mount": {}, "capabilities": _CAPABILITIES}}},
        _recorded_features,
    ),
    "lease": _json(
        ".firstlight/lock.lease-1",
        {**_IDENTITY, "token": "t", "started": "s"},
        lambda f: str(lease._holder((f / ".firstlight/lock.lease-1").read_bytes())),
    ),
    "roots.json": _json(
        ".local/state/firstlight/roots.json",
        {"roots": [{"path": "/r", "id": "x", "mount": "/mnt", "paths": ["/h/x"]}]},
        _home,
    ),
    ".firstlight.json": _json(
        ".firstlight.json",
        {"env": "tiny", "variant": "cpu", "interpreter": "system", "prefix": "/p"},
        _marker_of_environment,
    ),
    "conda-meta": _json(
        "env/conda-meta/hello-1.0-0.json", {**_CONDA, "paths_data": {"paths": [_CONDA_FILE]}}, _conda_meta
    ),
    "RECORD": _text(
        "env/lib/python3.11/site-packages/hello-1.0.dist-info/RECORD",
        'hello/__init__.py,sha256=LXEWQrcmsEQBYnyp-6wy9chTD7GQPMTbAiWHF5IaSIE,1\n"a,b.py",,\nhello-1.0.dist-info/RECORD,,\n',
        _wheel,
    ),
    "tree": _json(f"{REPO}/trees/{COMMIT}.json", {"format_version": 1, "files": _TREE}, _snapshots),
    "refs/main": _text(f"{REPO}/refs/main", COMMIT, _snapshots),
    "merge manifest": _json("manifest.json", [_ENTRY, {**_ENTRY, "path": "a", "kind": "folder"}], _merge),
    "host.toml": _toml("host.toml", _HOST, lambda f: toml.load(f / "host.toml", HostSpec)),
    "models.toml": _toml("models.toml", _MODELS, lambda f: manifest.load(f / "models.toml").with_all_extras()),
    "mirrors.toml": _toml(
        "mirrors.toml",
        '[pip.evil]\nurl = "https://m.example/simple"\n[conda.c]\nurl = "https://m.example"\n',
        lambda f: catalogue.load(f / "mirrors.toml"),
    ),
    "torch.toml": _toml("torch.toml", _TORCH, lambda f: toml.load(f / "torch.toml", TorchSpec)),
    "pip.conf": _text(
        "pip.conf",
        "[global]\nindex-url = https://x\n  more\n[install]\nfind-links=/w\n",
        lambda f: config_text.pip_config((f / "pip.conf").read_bytes(), "https://m.example", ["/w"]),
    ),
    "pip config list": _text(
        "list",
        "global.index-url='https://x'\n:env:.find-links='/w /v'\n",
        lambda f: parse_pip_config((f / "list").read_text(encoding="utf-8", errors="replace")),
    ),
    "conda's .condarc": _yaml(".condarc", _CONDARC, _conda_settings),
    "changed .condarc": _yaml(".condarc", _CONDARC, _condarc),
    "uv.toml": _toml("uv.toml", _UV, _uv_toml),
    "changed uv.toml": _toml(
        "uv.toml", _UV, lambda f: config_text.uv_config((f / "uv.toml").read_bytes(), "https://m.example")
    ),
    "requirements.lock": _text("cpu.lock", _LOCK, _lock),
    "conda-lock.yml": _yaml("conda-lock.yml", _CONDA_LOCK, lambda f: conda_lock.read_lock(f / "conda-lock.yml")),
    "environment.yml": _yaml(
        "environment.yml",
        "channels: [conda-forge]\ndependencies:\n- python>=3\n- pip:\n  - x==1\nplatforms: [linux-64]\n",
        lambda f: conda_lock.read_environment(f / "environment.yml"),
    ),
    "architecture": _json("architectures/a.json", _ARCHITECTURE, lambda f: architectures.load(f, "a")),
    "safetensors": _safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {}}),
    "index page in JSON": _json("page", _PAGE, _page("application/vnd.pypi.simple.v1+json")),
    "index page in HTML": _text("page", _HTML, _page("text/html")),
}
