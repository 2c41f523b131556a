"""The house: which module stands on which floor, and what may be imported where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

# Imports point down; modules of one floor never import each other.
FLOORS: dict[str, list[set[str]]] = {
    "provision": [
        {"inherited", "redact"},
        {"waiting"},
        {
            "bootstrap",
            "uv_files",
            "errors",
            "digests",
            "bodies",
            "weights",
            "stand_in_worker",
            "ledger",
            "patience",
            "streams",
            "progress",
        },
        {
            "command",
            "paths",
            "spec",
            "wire",
            "partial",
            "conda_lock",
            "hashing",
            "folder",
            "capabilities",
            "addresses",
            "pages",
            "architectures",
            "seeding",
            "locking",
            "client",
        },
        {
            "step",
            "ending",
            "journal",
            "hub",
            "delivery",
            "rattler",
            "rattler_worker",
            "prefix",
            "wheels",
            "tree",
            "caches",
            "catalogue",
            "settings",
            "manifest",
            "stand_in_files",
        },
        {"facts", "sources", "volume", "preflight", "contents", "profiles", "probing", "download"},
        {
            "variants",
            "holder",
            "links",
            "copying",
            "witnesses",
            "choices",
            "pins",
            "checking",
            "snapshots",
            "refs",
            "locating",
            "aliases",
        },
        {"variables", "stand_ins", "asking"},
        {"relay", "structure", "loading", "recording"},
        {"supply", "routes"},
        {"pip_part", "conda_part", "pulling"},
        {"environment", "models", "model_care", "smoke", "conda_lock_tool", "merging"},
        {"moving"},
        {"relocate", "keeping", "login", "parting"},
        {"activation", "removal", "locks", "undo", "choosing", "writing"},
        {"plan", "discover"},
        {"doctor"},
        {"report", "mirror_report", "model_report"},
        {"model_work"},
        {"console"},
        {"env_cli", "care_cli", "mirrors_cli", "models_cli"},
        {"cli"},
        {"__main__"},
    ],
    "bench": [
        {"errors", "readings"},
        {"result", "axes", "codec"},
        {"meter", "stats", "components", "cases", "nvml", "pipes", "hearing", "gpus", "rules"},
        {"probes", "sampling", "numerics", "timing", "watching", "compiling", "evidence", "nodes", "seam"},
        {"fitting", "pricing", "rating", "causes", "arithmetic", "traffic", "patterns", "loops", "links"},
        {"examining"},
        {"worker"},
        {"runner", "outlook", "verdict", "device", "runs", "recipe", "console", "pictures", "judging"},
        {"precisions", "session"},
        {"running", "compare", "history", "checkup"},
        {"tuning", "validating"},
        {"report", "charts", "export", "schema", "ticket"},
        {"findings"},
        {"page"},
        {"forms"},
        {"cli_host"},
        {"cli", "pytest_plugin"},
        {"__main__"},
    ],
}
# The only parts of provision that bench knows: what the machine is, where things lie, what people wrote, what fits,
# what a program of ours inherits, and how a command ends.
SHARED = {
    "inherited",
    "redact",
    "facts",
    "spec",
    "paths",
    "errors",
    "command",
    "profiles",
    "variants",
    "ending",
    "streams",
}
# Heavy or peculiar packages, and the modules that may import them.
KEPT = {
    "torch": {
        "bench.pytest_plugin",
        "bench.worker",
        "bench.examining",
        "bench.links",
        "bench.sampling",
        "bench.components",
        "bench.compiling",
        "provision.stand_in_worker",
    },
    "diffusers": {
        "bench.worker",
        "bench.loops",
        "bench.sampling",
        "bench.components",
        "bench.numerics",
        "provision.stand_in_worker",
    },
    "transformers": {"bench.components", "provision.stand_in_worker"},
    "PIL": {"bench.numerics", "bench.pictures"},
    "matplotlib": {"bench.charts"},
    "jinja2": {"bench.page", "bench.recipe"},
    "huggingface_hub": {"provision.hub", "provision.client"},
    "uv": {"provision.sources"},
    "rattler": {"provision.rattler_worker"},
    "ruamel": {"provision.conda_lock", "provision.rattler", "provision.settings"},
    "tomlkit": {"provision.settings", "provision.model_care"},
    "pynvml": {"provision.facts", "bench.nvml"},
    "typer": {
        "provision.cli",
        "provision.env_cli",
        "provision.care_cli",
        "provision.mirrors_cli",
        "provision.models_cli",
        "provision.console",
        "provision.ending",
        "bench.cli",
        "bench.cli_host",
        "bench.console",
    },
    "pydantic": {
        "provision.spec",
        "provision.catalogue",
        "provision.witnesses",
        "bench.cases",
        "bench.gpus",
        "bench.rules",
    },
}
# What the measured interpreter runs: it has none of the toolbox's packages.
WORKER_SIDE = {
    "worker",
    "examining",
    "arithmetic",
    "traffic",
    "patterns",
    "loops",
    "links",
    "seam",
    "fitting",
    "pricing",
    "compiling",
    "probes",
    "sampling",
    "numerics",
    "timing",
    "components",
    "meter",
    "stats",
    "result",
    "readings",
    "codec",
    "axes",
    "errors",
}


def modules() -> list[tuple[str, str, Path]]:
    return [
        (package, file.stem, file)
        for package in FLOORS
        for file in sorted((CHECKOUT / package).glob("*.py"))
        if file.stem != "__init__"
    ]


def imports(file: Path) -> set[str]:
    """Every module that a file imports outside of type checking, as dotted names."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module in FLOORS
            found |= {f"{node.module}.{alias.name}" if inside else node.module for alias in node.names}
    return found


def floor_of(package: str, module: str) -> int:
    for number, names in enumerate(FLOORS[package]):
        if module in names:
            return number
    pytest.fail(f"{package}/{module}.py stands on no floor: put it in the table of tests/test_floors.py first")


@pytest.mark.parametrize(("package", "module", "file"), modules(), ids=lambda value: getattr(value, "stem", value))
def test_imports_point_down(package: str, module: str, file: Path) -> None:
    here = floor_of(package, module)
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1:
            assert floor_of(package, parts[1]) < here, f"{package}.{module} imports {name}, which does not lie below"
        elif parts[0] in FLOORS and len(parts) > 1:
            assert (package, parts[0]) == ("bench", "provision"), f"{package}.{module} imports {name}"
            assert parts[1] in SHARED, f"bench.{module} imports {name}; it may know {sorted(SHARED)} alone"


@pytest.mark.parametrize(("package", "module", "file"), modules(), ids=lambda value: getattr(value, "stem", value))
def test_heavy_imports_stay_in_their_rooms(package: str, module: str, file: Path) -> None:
    for name in imports(file):
        top = name.split(".")[0]
        if top in KEPT:
            assert f"{package}.{module}" in KEPT[top], f"{package}.{module} imports {top}"


@pytest.mark.parametrize("module", sorted(WORKER_SIDE))
def test_the_worker_needs_no_toolbox(module: str) -> None:
    ours = {"bench", "torch", "diffusers", "transformers", "PIL"}
    for name in imports(CHECKOUT / "bench" / f"{module}.py"):
        top = name.split(".")[0]
        assert top in ours or top in sys.stdlib_module_names, f"bench.{module} imports {name}"
        if top == "bench":
            assert name.split(".")[1] in WORKER_SIDE


@pytest.mark.parametrize("module", ["provision.cli", "provision.plan", "bench.cli", "bench.report", "bench.runner"])
def test_the_parents_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'transformers', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]"


def test_only_reports_and_commands_print() -> None:
    printing = {
        "provision.console",
        "provision.ending",
        "provision.env_cli",
        "provision.care_cli",
        "provision.mirrors_cli",
        "provision.models_cli",
        "provision.report",
        "bench.cli",
        "bench.cli_host",
        "bench.console",
    }
    for package, module, file in modules():
        calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        assert not prints or f"{package}.{module}" in printing, f"{package}.{module} prints"


def test_every_file_is_short() -> None:
    for file in CHECKOUT.glob("*/**/*.py"):
        if ".venv" not in file.parts and ".cache" not in file.parts:
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, f"{file} has grown over 400 lines"


def test_data_folders_hold_no_code() -> None:
    assert not list((CHECKOUT / "envs").rglob("*.py"))


def test_what_is_installed_as_a_package_needs_what_the_toolbox_has() -> None:
    text = (CHECKOUT / "envs" / "toolbox" / "requirements.in").read_text(encoding="utf-8")
    toolbox = {re.split(r"[^\w.-]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}
    project = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert declared is not None
    assert {re.split(r"[^\w.-]", each)[0] for each in re.findall(r'"(.*?)"', declared.group(1))} == toolbox


@pytest.mark.parametrize("package", list(FLOORS))
def test_the_table_for_people_is_this_one(package: str) -> None:
    """CONTRIBUTING.md shows the same floors, `bench` beside `provision` by their order alone."""
    column = 2 + list(FLOORS).index(package)
    lines = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|") for line in lines if re.match(r"\| \d+ \|", line)]
    shown = [{re.sub(r" \(.*", "", name.strip()) for name in row[column].split(",")} - {""} for row in reversed(rows)]
    main = {"__main__"}
    assert [floor for floor in shown if floor] == [floor - main for floor in FLOORS[package] if floor - main]
