"""Test what the import contract cannot express: heavy packages, the modules that print, and the length of files."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from provision.mirrors.tools import all_tools

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGES = ("provision", "bench")
# {package that is slow to import or that only a few modules need: the modules that may import it}
KEPT = {
    "torch": {"bench.worker", "bench.launch.in_process", "provision.models.describe_architecture"},
    "diffusers": {"bench.worker", "provision.models.describe_architecture"},
    "transformers": {"bench.worker.components", "bench.worker.libraries", "provision.models.describe_architecture"},
    "PIL": {"bench.worker.numerics", "bench.run.image_quality"},
    "matplotlib": {"bench.report.charts"},
    "jinja2": {"bench.report.html_page", "bench.run.recipe"},
    "huggingface_hub": {"provision.models.hf_listing", "provision.models.hub_client", "provision.mirrors.official"},
    "uv": {"provision.installers.uv"},
    "rattler": {"provision.installers.rattler_worker"},
    "ruamel": {"provision.core.yaml_text", "provision.mirrors.config_text"},
    "tomlkit": {"provision.mirrors.config_text", "provision.models.lock_manifest"},
    "pynvml": {"provision.host.facts", "bench.gpu.nvml"},
    "typer": {"provision.cli", "bench.cli", "provision.core.command_end"},
    "pydantic": {"provision.config", "provision.mirrors", "bench.run.cases", "bench.gpu.specs", "bench.validate.rules"},
}
# The modules that may call `print`. The worker and the bootstrap write to streams directly.
PRINTING = {"provision.cli", "bench.cli", "provision.core.command_end"}
# The packages that run under the measured interpreter, which has none of firstlight's own dependencies.
MEASURED = ("bench.worker", "bench.core")


def modules() -> list[tuple[str, Path]]:
    """Return (dotted name, file) of every module in `provision` and `bench`; a package's file is its __init__.py."""
    found = []
    for package in PACKAGES:
        for file in sorted((CHECKOUT / package).rglob("*.py")):
            parts = file.relative_to(CHECKOUT).with_suffix("").parts
            found.append((".".join(parts).removesuffix(".__init__"), file))
    return found


MODULES = modules()
EACH = pytest.mark.parametrize(("name", "file"), MODULES, ids=[name for name, _ in MODULES])


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imports(file: Path) -> frozenset[str]:
    """Return the dotted names of the modules that a file imports, without those under `if TYPE_CHECKING`."""
    tree = tree_of(file)
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in set(ast.walk(tree)) - skipped:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return frozenset(found)


def lies_in(name: str, places: set[str] | tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@EACH
def test_heavy_package_is_imported_only_by_the_modules_that_may(name: str, file: Path) -> None:
    for imported in imports(file):
        top = imported.split(".")[0]
        assert top not in KEPT or lies_in(name, KEPT[top]), f"{name} imports {imported}"


@pytest.mark.parametrize("package", list(KEPT))
def test_every_module_that_may_import_a_heavy_package_imports_it(package: str) -> None:
    users = {name for name, file in MODULES if package in {each.split(".")[0] for each in imports(file)}}
    assert {place for place in KEPT[package] if not any(lies_in(user, {place}) for user in users)} == set()


@EACH
def test_worker_code_imports_only_the_standard_library_torch_and_diffusers(name: str, file: Path) -> None:
    if not lies_in(name, MEASURED):
        return
    libraries = {"torch", "diffusers", "transformers", "PIL"}
    for imported in imports(file):
        top = imported.split(".")[0]
        assert top in libraries or top in sys.stdlib_module_names or lies_in(imported, MEASURED), f"{name}: {imported}"


@pytest.mark.parametrize(
    "module",
    [
        "provision.cli.main",
        "provision.setup.plan",
        "bench.cli.main",
        "bench.report.tables",
        "bench.launch.worker_process",
    ],
)
def test_importing_a_command_module_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'transformers', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]"


@EACH
def test_print_is_called_only_in_the_cli_packages(name: str, file: Path) -> None:
    calls = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
    prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
    assert not prints or lies_in(name, PRINTING), f"{name} prints"


@EACH
def test_init_file_holds_a_docstring_and_no_code(name: str, file: Path) -> None:
    if file.name != "__init__.py":
        return
    tree = tree_of(file)
    assert len(ast.get_docstring(tree) or "") > 10 or name in PACKAGES
    assert len(tree.body) <= 1, f"{name}/__init__.py holds more than its docstring"


@pytest.mark.parametrize("package", ["environments", "models", "relocation"])
def test_package_with_a_setup_step_defines_it_in_step_py(package: str) -> None:
    classes = [
        node.name
        for node in tree_of(CHECKOUT / "provision" / package / "step.py").body
        if isinstance(node, ast.ClassDef)
    ]
    assert any(name.endswith("Step") for name in classes)


def literals(node: ast.expr) -> set[object]:
    """Return the constants in an expression: its own value, the elements of a list, tuple or set, or a dict's keys."""
    if isinstance(node, ast.Dict):
        return {key.value for key in node.keys if isinstance(key, ast.Constant)}
    elements = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {element.value for element in elements if isinstance(element, ast.Constant)}


def switches(tree: ast.Module, subject: str, values: set[str]) -> list[str]:
    """Return the source of the expressions that compare a name with a constant of `values`, or index a dict of them.

    Args:
        tree: the module to search.
        subject: a regular expression; the expression has to contain a name that matches it.
        values: the constants that the code should not tell apart, such as the names of the mirror tools.
    """
    found = []
    for node in ast.walk(tree):
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            operands = [node.value, node.slice]
        elif isinstance(node, ast.Match):
            patterns = [part.value for part in ast.walk(node) if isinstance(part, ast.MatchValue)]
            operands = [node.subject, *patterns]
        named = any(re.search(rf"(?<![a-z]){subject}(?![a-z])", ast.unparse(each)) for each in operands)
        if named and any(literals(each) & values for each in operands):
            found.append(ast.unparse(node))
    return found


TOOL_NAMES = set(all_tools.names())


def tool_switches(tree: ast.Module) -> list[str]:
    """Return the source of the expressions that compare the name of a mirror tool, or pass one to a look-up by name."""
    keyed = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"chosen", "sources", "of", "by_name"}
        and any(literals(argument) & TOOL_NAMES for argument in node.args)
    ]
    return [*switches(tree, "tool", TOOL_NAMES), *keyed]


@EACH
def test_tool_names_are_compared_only_in_mirrors_tools(name: str, file: Path) -> None:
    if not lies_in(name, {"provision.mirrors.tools"}):
        assert tool_switches(tree_of(file)) == [], (
            f"{name}: call a method of the tool (provision/mirrors/tools) instead of comparing its name"
        )


@EACH
def test_conda_and_system_interpreters_are_told_apart_only_in_python_source(name: str, file: Path) -> None:
    if name != "provision.volume.environment_marker":  # parses the word in the marker file
        found = switches(tree_of(file), "(interpreter|python_source)", {"auto", "conda", "system"})
        assert found == [], f"{name}: call PythonSource (provision/core/python_source.py) instead of comparing its name"


@pytest.mark.parametrize(
    "line",
    [
        'x = tool == "pip"',
        'x = "torch" != self.asked.tool',
        'x = tool.name in {"conda", "hf"}',
        'x = {"pip": 1, "hf": 2}[target.tool]',
        'match tool:\n    case "conda": pass',
        'x = record.chosen("hf").url',
        'x = record.sources("pip")',
    ],
)
def test_comparison_with_a_tool_name_is_found(line: str) -> None:
    assert len(tool_switches(ast.parse(line))) == 1


@pytest.mark.parametrize("line", ['owner.get("interpreter") == "conda"', 'wanted.interpreter not in {"auto", kind}'])
def test_comparison_with_an_interpreter_name_is_found(line: str) -> None:
    assert len(switches(ast.parse(line), "(interpreter|python_source)", {"auto", "conda", "system"})) == 1


@pytest.mark.parametrize("line", ['each == "conda"', 'package_name(line) == "torch"', 'manager != "conda"'])
def test_comparison_of_another_variable_with_the_same_word_is_not_found(line: str) -> None:
    assert tool_switches(ast.parse(line)) == []


def test_no_python_file_has_more_than_400_lines() -> None:
    for file in CHECKOUT.glob("*/**/*.py"):
        if ".venv" not in file.parts and ".cache" not in file.parts:
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, f"{file} has grown over 400 lines"


def test_envs_folder_holds_no_python_file() -> None:
    assert not list((CHECKOUT / "envs").rglob("*.py"))


def test_pyproject_declares_the_dependencies_of_the_toolbox_and_pip() -> None:
    text = (CHECKOUT / "envs" / "toolbox" / "requirements.in").read_text(encoding="utf-8")
    toolbox = {re.split(r"[^\w.-]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}
    project = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert declared is not None
    names = {re.split(r"[^\w.-]", each)[0] for each in re.findall(r'"(.*?)"', declared.group(1))}
    assert names == toolbox | {"pip"}, "the toolbox is a venv, which has a pip of its own"


# {file: (a forbidden import to add to it, the start of the name of the contract in pyproject.toml that forbids it)}
PLANTED = {
    "provision/core/errors.py": ("import provision.fs.tree", "provision: seven layers"),
    "provision/models/step.py": ("import provision.relocation.move", "provision: seven layers"),
    "bench/core/stats.py": ("import bench.run.judge_cases", "bench: seven layers"),
    "provision/fs/tree.py": ("import bench.core.stats", "provision knows nothing of bench"),
    "bench/run/judge_cases.py": ("import provision.models.manifest", "bench knows of provision only"),
    "bench/worker/timing.py": ("import bench.gpu.nvml", "the worker side runs under the measured interpreter"),
    "bench/run/store.py": ("import bench.worker.timing", "only bench.launch.in_process loads"),
    "provision/host/tool_caches.py": ("import provision.host.provider", "no cycles"),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for package in PACKAGES:
        shutil.copytree(CHECKOUT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    return folder


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "lint-imports"
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def test_import_linter_accepts_the_packages(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("place", list(PLANTED))
def test_import_linter_names_the_contract_that_a_forbidden_import_breaks(copy: Path, place: str) -> None:
    line, contract = PLANTED[place]
    file = copy / place
    right = file.read_text(encoding="utf-8")
    try:
        file.write_text(f"{right}\n{line}\n", encoding="utf-8")
        done = lint(copy)
    finally:
        file.write_text(right, encoding="utf-8")
    assert done.returncode == 1
    broken = [told for told in done.stdout.splitlines() if told.endswith("BROKEN")]
    assert any(told.startswith(contract) for told in broken), done.stdout
