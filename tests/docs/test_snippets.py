"""Runs the snippets of the documents: shell lines in a sandbox, Python by an interpreter; reads the TOML and JSON.

The Chinese documents have the same snippets (test_structure.py tests that), so only the English ones run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from bench.run import cases
from provision.config.host import load_host
from provision.mirrors import catalogue
from provision.models import manifest
from tests.bench.conftest import environment
from tests.bench.test_pytest_plugin import PYTEST_WITH_TORCH
from tests.conftest import CHECKOUT
from tests.docs import markdown, sandbox
from tests.provision.http_server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.docs.markdown import Fence
    from tests.docs.sandbox import Sandbox

# {command line that no test of this file runs: the reason}. test_names.py checks its commands and flags.
MINUTES = "it measures for minutes; tests/bench/cli runs this command with small models"
NOT_RUN = {
    "make bench": MINUTES,
    "make bench SUITE=precision DEVICE=cpu": MINUTES,
    "make validate": MINUTES,
    "make validate SOAK=30m": MINUTES,
    "make validate DEVICE=cpu": MINUTES,
    ".venv/bin/bench run schedulers": MINUTES,
    ".venv/bin/bench run quick --set steps=50 --find-max": MINUTES,
    ".venv/bin/bench run quick --interleave dtype=bf16 dtype=bf16,layout=channels_last": MINUTES,
    ".venv/bin/bench run --python P": MINUTES,
    ".venv/bin/bench tune --model stable-diffusion-v1-5": MINUTES,
    "make test": "it would run this test again",
    ".venv/bin/provision models seed --bind 0.0.0.0": "it serves without an end; models/test_seed_server.py runs it",
    ".venv/bin/provision env lock NAME": "it solves against a whole package index; cli/test_env.py runs it",
}
# {command line: the line that runs instead}
INSTEAD = {
    "git clone REPOSITORY firstlight && cd firstlight": f"git clone -q '{CHECKOUT}' firstlight && cd firstlight",
    # These two prompt on a terminal, which the sandbox does not have.
    ".venv/bin/provision models remove stable-diffusion-v1-5": (
        ".venv/bin/provision models remove stable-diffusion-v1-5 --yes"
    ),
    ".venv/bin/provision env remove NAME": ".venv/bin/provision env remove diffusers --yes",
    # The cases need minutes, so pytest only collects them.
    "pytest -p bench.pytest_plugin --pyargs bench.suites --diffusion-suite precision": (
        "pytest -p bench.pytest_plugin --pyargs bench.suites --diffusion-suite precision --collect-only -q"
    ),
}
# {command line: its exit code, where it is not 0}. A plan with changes exits with 3, and make turns that into 2.
# OLDNAME is the host name of no run in the sandbox.
EXPECTED_EXIT = {
    "make plan": 2,
    ".venv/bin/provision models pull stable-diffusion-v1-5@fp16 --dry-run": 3,
    ".venv/bin/provision relocate ~/work --dry-run": 3,
    ".venv/bin/provision repair --root /data --adopt OLDNAME": 2,
}
# A command in the sandbox's environment. That environment has no real torch, so the examples run by another one.
IN_ENVIRONMENT = ".venv/bin/provision env run -- python"
PAGES = [page for page in markdown.ENGLISH if any(fence.language == "sh" for fence in markdown.fences(page))]
# The pages whose own first lines run `make setup`.
BEGINNINGS = {"docs/new-host.md"}
TOML: dict[str, Callable[[Path], object]] = {
    "host.toml": load_host,
    "mirrors.toml": lambda file: catalogue.load(CHECKOUT / "envs/mirrors.toml", str(file)),
    "models.toml": lambda file: manifest.load(CHECKOUT / "envs/models.toml", str(file)),
    "my.toml": lambda file: cases.load_suite(str(file)),
}
SNIPPETS = [(document, fence) for document in markdown.ENGLISH for fence in markdown.fences(document)]


def each_snippet(language: str) -> pytest.MarkDecorator:
    """Parametrize a test by the fenced blocks of the English documents in a language, as `fence`."""
    chosen = [(document, fence) for document, fence in SNIPPETS if fence.language == language]
    names = [f"{markdown.name_of(document)} {fence.title}" for document, fence in chosen]
    return pytest.mark.parametrize("fence", [fence for _, fence in chosen], ids=names)


@pytest.fixture
def box(tmp_path: Path, home: Path, saved_pipelines: dict[str, Path]) -> Iterator[Sandbox]:
    """Return a sandbox whose hub on loopback runs until the test ends."""
    hub = Server({})
    yield sandbox.build(tmp_path / "box", home, hub, saved_pipelines)
    hub.close()


def sandbox_line(line: str, box: Sandbox, measured_python: Path) -> str:
    """Return the command line that the sandbox runs for a line of a document.

    /data becomes the sandbox's volume. An example runs by the interpreter with real torch, with two steps.
    """
    line = INSTEAD.get(line, line).replace(f"{IN_ENVIRONMENT} examples/", f"{measured_python} examples/")
    line = line.replace("/data", str(box.volume))
    return f"{line} --steps 2" if "examples/squirrel.py" in line or "examples/cat.py" in line else line


@pytest.mark.worker
@pytest.mark.parametrize("document", PAGES, ids=map(markdown.name_of, PAGES))
def test_command_lines_of_a_page_succeed_from_top_to_bottom(
    document: Path, box: Sandbox, measured_python: Path
) -> None:
    if markdown.name_of(document) not in BEGINNINGS:
        done = box.run(f"make setup ROOT={box.volume}")
        assert done.returncode == 0, done.stdout + done.stderr
    if document.name == "models.md":
        assert box.run(".venv/bin/provision models pull ddpm-cat-256 stable-diffusion-v1-5").returncode == 0
    for line in markdown.command_lines(document):
        if line in NOT_RUN:
            continue
        done = box.run(sandbox_line(line, box, measured_python))
        assert done.returncode == EXPECTED_EXIT.get(line, 0), f"$ {line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("line", [*NOT_RUN, *INSTEAD, *EXPECTED_EXIT])
def test_command_line_that_is_skipped_or_changed_here_exists_in_a_document(line: str) -> None:
    assert line in {each for document in PAGES for each in markdown.command_lines(document)}


@pytest.mark.parametrize("document", markdown.DOCUMENTS, ids=map(markdown.name_of, markdown.DOCUMENTS))
def test_every_fenced_block_is_in_a_language_that_these_tests_check(document: Path) -> None:
    tested = {
        "sh",
        "python",
        "toml",
        "json",
        "text",
    }  # "text" is the output of a command, or a drawing; no test checks it
    languages = [fence.language for fence in markdown.fences(document)]
    if document.parent != CHECKOUT or document in markdown.READMES:
        assert set(languages) <= tested
        assert markdown.prose(document).count("```") == 0


@each_snippet("toml")
def test_toml_snippet_is_accepted_by_the_loader_of_its_file(fence: Fence, tmp_path: Path) -> None:
    file = tmp_path / fence.title
    file.write_text(fence.text, encoding="utf-8")
    assert TOML[fence.title](file)


@each_snippet("json")
def test_json_snippet_has_the_keys_and_values_that_its_command_prints(fence: Fence) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *fence.title.split()], capture_output=True, text=True, check=False, env=environment()
    )
    shown, printed = json.loads(fence.text), json.loads(done.stdout)
    assert done.returncode == printed["exit"] == shown["exit"]
    assert {**printed, "error": {**printed["error"], "message": "…", "next": "…"}} == shown
    assert printed["error"]["message"]
    assert printed["error"]["next"]


@pytest.mark.worker
@each_snippet("python")
def test_python_snippet_runs_without_an_error(
    fence: Fence, box: Sandbox, measured_python: Path, tmp_path: Path
) -> None:
    """Run a test file by pytest with bench's plugin, and any other snippet by the interpreter with torch, offline."""
    if fence.title.startswith("test_"):
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        (tmp_path / fence.title).write_text(fence.text, encoding="utf-8")
        argv = [sys.executable, "-c", PYTEST_WITH_TORCH, str(measured_python), "-p", "no:cacheprovider"]
        argv += ["-p", "bench.pytest_plugin", "--benchmark-disable", fence.title]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment())
        assert "1 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
        return
    for line in (f"make setup ROOT={box.volume}", ".venv/bin/provision models pull stable-diffusion-v1-5@fp16"):
        done = box.run(line)
        assert done.returncode == 0, done.stdout + done.stderr
    (box.checkout / "snippet.py").write_text(fence.text, encoding="utf-8")
    done = box.run(f"HF_HUB_OFFLINE=1 '{measured_python}' snippet.py")
    assert done.returncode == 0, done.stderr[-3000:]
