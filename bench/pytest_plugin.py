"""Extends pytest-benchmark: a fixture for one case, the facts of this machine in its JSON, and suites as tests."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.core.result import Case, Result
    from bench.launch.in_process import DiffusionCase
    from bench.run.cases import Cell
    from bench.run.measure_cases import Session

_SUITES = pytest.StashKey["Suites"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `pytest --pyargs bench.suites`."""
    group = parser.getgroup("firstlight", "diffusion benchmarks")
    group.addoption("--diffusion-suite", help="The suite of bench.suites: a name, or a .toml file; default: quick.")
    group.addoption("--diffusion-device", help="auto, cpu, cuda, cuda:N or mps.")
    group.addoption("--diffusion-python", help="The interpreter that bench.suites measures.")
    group.addoption("--diffusion-root", help="firstlight's folder on the volume.")
    group.addoption("--diffusion-out", help="The folder for the run's files.")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker `diffusion`."""
    config.addinivalue_line(
        "markers",
        "diffusion(model, **axes): the case of the fixture diffusion_case: dtype, scheduler, size, steps, …, device",
    )


@pytest.hookimpl(optionalhook=True)  # this hook belongs to pytest-benchmark, which may not be installed
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add the facts of this machine and the versions of torch and diffusers to pytest-benchmark's JSON."""
    from provision.host import facts

    machine_info["firstlight"] = facts.probe().to_dict()
    for name in ("torch", "diffusers"):
        try:
            machine_info[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine_info[name] = None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Replace the versions of torch and diffusers by those of the environment in which a suite was measured."""
    if _SUITES in config.stash:
        output_json["machine_info"].update(config.stash[_SUITES].software)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the path of the run of a suite."""
    if _SUITES in config.stash and config.stash[_SUITES].kept is not None:
        terminalreporter.write_line(f"kept: {config.stash[_SUITES].kept}")


@pytest.fixture
def diffusion_case(request: pytest.FixtureRequest) -> Iterator[DiffusionCase]:
    """Yield the case that the test's marker `diffusion` or an indirect parameter (a dict with the same keys) describes.

    The case is loaded in this process. torch's settings (TF32, threads) are restored afterwards. If the test uses
    pytest-benchmark's fixture `benchmark`, the case, its FLOPs and its memory are added to `extra_info`.
    """
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    axes = _axes(request)
    if "model" not in axes:
        pytest.fail(
            'no model is given. Mark the test: @pytest.mark.diffusion("ddpm-cat-256", dtype="bf16")', pytrace=False
        )
    from bench.core.errors import SkipError
    from bench.launch import in_process
    from provision.core.errors import FirstlightError

    weights = axes.pop("weights", {})
    try:
        case = _case(axes)
    except FirstlightError as error:
        pytest.fail(str(error), pytrace=False)
    if case.dtype == "tf32" and not case.device.startswith("cuda"):
        pytest.skip("only NVIDIA GPUs have the format TF32")
    with in_process.torch_settings(case):
        try:
            loaded_case = in_process.DiffusionCase(case, weights)
            yield loaded_case
            if benchmark is not None:
                benchmark.extra_info.update(loaded_case.extra_info())
        except SkipError as error:
            pytest.skip(str(error))


def _axes(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return {"model": name, axis: value} of the marker and of an indirect parameter, which overrides the marker."""
    marker = request.node.get_closest_marker("diffusion")
    parameter = getattr(request, "param", {})
    if not isinstance(parameter, dict) or (marker and len(marker.args) > 1):
        pytest.fail(
            'Mark the test as @pytest.mark.diffusion("MODEL", AXIS=VALUE), or give an indirect parameter: a dict with '
            "these keys.",
            pytrace=False,
        )
    named = {"model": marker.args[0]} if marker and marker.args else {}
    return {**named, **(marker.kwargs if marker else {}), **parameter}


def _case(axes: dict[str, Any]) -> Case:
    """Return the default case of a model for this machine, with these axes changed.

    Raises:
        FirstlightError: a name is wrong, or the device cannot be used.
    """
    from bench.gpu import choose_device
    from bench.launch import in_process
    from bench.run import cases

    device = axes.pop("device", "auto")
    choose_device.check_name(str(device))
    default = cases.default_case(axes.pop("model"), in_process.find_device(device))
    return cases.change(default, {axis: str(value) for axis, value in axes.items()})


class Replay:
    """Replay measured seconds as a clock, so that pytest-benchmark times the samples of another process."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ahead: Iterator[float] = iter(())

    def __call__(self) -> float:
        """Return the present time of the clock in seconds."""
        return self._now

    def wind(self, seconds: list[float]) -> None:
        """Set the seconds by which the next calls of `tick` advance the clock."""
        self._ahead = iter(seconds)

    def tick(self) -> None:
        """Advance the clock by the seconds of the next round.

        After the last one (as in a profiler's round) by nothing.
        """
        self._now += next(self._ahead, 0.0)


class Suites:
    """Hold the cases of the chosen suite, and the session that measures them as `bench run` does."""

    def __init__(self, config: pytest.Config) -> None:
        from bench.run import cases, request, suite_run

        if not config.pluginmanager.hasplugin("benchmark"):
            raise pytest.UsageError("bench.suites requires pytest-benchmark")
        if hasattr(config, "workerinput"):
            raise pytest.UsageError("bench.suites measures one case at a time. Run it without -n.")
        python = _option(config, "python")
        self._run_request = request.RunRequest(
            suite=_option(config, "suite") or "quick",
            out=Path(_option(config, "out") or "results"),
            device=_option(config, "device") or "auto",
            python=Path(python) if python else None,
            root=_option(config, "root"),
            command="pytest --pyargs bench.suites",
        )
        suite = cases.load_suite(self._run_request.suite)
        self._bench = suite_run.find_bench(self._run_request)
        self.device = suite_run.choose_device(self._run_request, self._bench, self)
        self._budget = getattr(suite.budget, self.device.partition(":")[0])
        self._dtype_support, self._notes, self.cells = suite_run.find_cells(
            suite, self._run_request, self._bench, self.device, self
        )
        self.kept: Path | None = None
        self._session: Session | None = None
        self._results: dict[Case, Result] = {}

    def measure(self, cell: Cell) -> Result:
        """Measure one case within its share of the suite's budget, which begins with the first case."""
        from bench.core.errors import BYTES_FOR_A_RUN
        from bench.run import measure_cases
        from provision.core.errors import from_os_error

        if self._session is None:
            try:
                self._session = measure_cases.Session(
                    self._run_request,
                    self._bench,
                    self._budget,
                    self,
                    dtype_support=self._dtype_support,
                    notes=self._notes,
                )
            except OSError as error:
                raise from_os_error(error, needed_bytes=BYTES_FOR_A_RUN, flag="--diffusion-out") from error
        later = self.cells[self.cells.index(cell) + 1 :]
        began = time.monotonic()
        result = self._session.measure_one(cell, later, f"  {cell.case.name}")
        # pytest has fixed the order of the tests, so a disturbed case is repeated now; time for later ones is reserved.
        result = self._session.measure_again(cell, result, time.monotonic() - began, f"  {cell.case.name}", later)
        self._results[cell.case] = result
        return result

    @property
    def software(self) -> dict[str, str]:
        """Return the software versions of the measured environment."""
        return next((result.software for result in self._results.values() if result.software), {})

    def keep(self) -> None:
        """Write the run's file."""
        if self._session is not None:
            self._session.close()
            self._session.keep(list(self._results.values()))
            self.kept = self._session.folder / "run.json"

    def begin(self, line: str) -> None:
        """Do nothing: pytest shows the current test."""

    def update(self, line: Callable[[], str]) -> None:
        """Do nothing: pytest shows the progress of its tests."""

    def report(self, line: str) -> None:
        """Do nothing: the outcome is in the test's report."""


def suites(config: pytest.Config) -> Suites:
    """Return the suite of this pytest run.

    Raises:
        pytest.UsageError: the suite cannot be measured here; the message has the reason and the remedy.
    """
    from provision.core.errors import FirstlightError

    if _SUITES not in config.stash:
        try:
            config.stash[_SUITES] = Suites(config)
        except FirstlightError as error:
            raise pytest.UsageError(str(error).replace(" --", " --diffusion-")) from None
    return config.stash[_SUITES]


def _option(config: pytest.Config, name: str) -> str | None:
    """Return the value of an option; None also if the plugin was loaded only after the options were parsed."""
    value: str | None = config.getoption(f"--diffusion-{name}", None)
    return value
