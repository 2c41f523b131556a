"""pytest-benchmark's plugin: one image of a case as a fixture, this machine in its JSON, and our suites as tests."""

from __future__ import annotations

import importlib.metadata
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bench.core.result import Case, Result
    from bench.run.cases import Cell
    from bench.run.session import Session
    from bench.worker.sampling import Images

_SUITES = pytest.StashKey["Suites"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `pytest --pyargs bench.suites` takes."""
    group = parser.getgroup("firstlight", "diffusion benchmarks")
    group.addoption("--diffusion-suite", help="The suite of bench.suites: a name, or a .toml file; default: quick.")
    group.addoption("--diffusion-device", help="auto, cpu, cuda, cuda:N or mps.")
    group.addoption("--diffusion-python", help="The interpreter that bench.suites measures.")
    group.addoption("--diffusion-root", help="The persistent folder.")
    group.addoption("--diffusion-out", help="Where bench.suites keeps its run.")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        "diffusion(model, **axes): what diffusion_case makes: dtype, scheduler, size, steps, batch, layout, …, device",
    )


@pytest.hookimpl(optionalhook=True)  # of pytest-benchmark, which may be absent
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Say on what was measured."""
    from provision.host import facts

    machine_info["firstlight"] = facts.probe().to_dict()
    for name in ("torch", "diffusers"):
        try:
            machine_info[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine_info[name] = None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Where a suite was measured, name the software of the environment that it was measured in."""
    if _SUITES in config.stash:
        output_json["machine_info"].update(config.stash[_SUITES].software)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say where the run of a suite lies."""
    if _SUITES in config.stash and config.stash[_SUITES].kept is not None:
        terminalreporter.write_line(f"kept: {config.stash[_SUITES].kept}")


class DiffusionCase:
    """One case in this very process: called, it makes a batch of images and waits until the device has done so."""

    def __init__(self, case: Case, weights: Mapping[str, str]) -> None:
        """Build the model, give it its weights, and make a first batch: kernels are chosen, caches are warm.

        Args:
            case: what is made.
            weights: {architecture: snapshot folder}; empty: seeded random ones.
        """
        import torch

        from bench.worker import clocks, components, sampling
        from bench.worker import memory as device_memory

        self.case = case
        self.weights = "real" if weights else "random"
        self._torch, self._synchronize = torch, clocks.synchronize
        with torch.no_grad():
            model = components.Model(torch, case)
            self.flops = model.flops()
            model.load({name: Path(folder) for name, folder in weights.items()})
            self._loop = sampling.Loop(model)
        self.unet = model.components["unet"]
        self()
        self._memory = device_memory.Peaks(torch, case.device)

    def __call__(self) -> Images:
        """Make a batch of images."""
        with self._torch.no_grad():
            images = self._loop(lambda: None)
            self._synchronize(self._torch, self.case.device)
        return images

    def extra_info(self) -> dict[str, Any]:
        """What belongs beside its times: the case, FLOPs, and the memory since it was ready."""
        self._memory.pause()
        memory = {name: value for name, value in asdict(self._memory.memory()).items() if value is not None}
        work = {"flops_per_step": self.flops.step, "flops_per_batch": self.flops.batch, "weights": self.weights}
        return {"case": asdict(self.case), **work, **memory}


@pytest.fixture
def diffusion_case(request: pytest.FixtureRequest) -> Iterator[DiffusionCase]:
    """The case of the test's `diffusion` marker, or of an indirect parameter (a dict of the same).

    What torch is set to meanwhile (TF32, threads) is put back. Where the test has pytest-benchmark's `benchmark`, the
    case, its FLOPs and its memory are in `extra_info`.
    """
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    told = _told(request)
    if "model" not in told:
        pytest.fail('which model? Mark the test: @pytest.mark.diffusion("ddpm-cat-256", dtype="bf16")', pytrace=False)
    import torch

    from bench.core.errors import SkipError
    from bench.worker import components
    from provision.core.errors import FirstlightError

    weights = told.pop("weights", {})
    try:
        case = _case(torch, told)
    except FirstlightError as error:
        pytest.fail(str(error), pytrace=False)
    if case.dtype == "tf32" and not case.device.startswith("cuda"):
        pytest.skip("TF32 is a format of NVIDIA's cards alone")
    threads = torch.get_num_threads()
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    components.set_precision(torch, case.dtype)
    try:
        if case.threads:
            torch.set_num_threads(case.threads)
        made = DiffusionCase(case, weights)
        yield made
        if benchmark is not None:
            benchmark.extra_info.update(made.extra_info())
    except SkipError as error:
        pytest.skip(str(error))
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _told(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the marker says, and an indirect parameter goes before it."""
    marker = request.node.get_closest_marker("diffusion")
    parameter = getattr(request, "param", {})
    if not isinstance(parameter, dict) or (marker and len(marker.args) > 1):
        pytest.fail('a case is told as @pytest.mark.diffusion("MODEL", AXIS=VALUE), or a dict of these', pytrace=False)
    named = {"model": marker.args[0]} if marker and marker.args else {}
    return {**named, **(marker.kwargs if marker else {}), **parameter}


def _case(torch: Any, told: dict[str, Any]) -> Case:
    """A case as the suites have it for this machine, with what is told changed."""
    from bench.gpu import choose_device
    from bench.run import cases
    from provision.core.errors import BlockedError

    chosen = told.pop("device", "auto")
    choose_device.check_name(str(chosen))
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen == "auto":
        chosen = "cuda:0" if cards else "mps" if torch.backends.mps.is_available() else "cpu"
    if chosen == "cuda":
        chosen = "cuda:0"
    if chosen.startswith("cuda:") and int(chosen.partition(":")[2]) >= cards:
        raise BlockedError(f"there is no {chosen}: torch sees {cards} cards")
    return cases.change(cases.usual(told.pop("model"), chosen), {axis: str(value) for axis, value in told.items()})


class Replay:
    """A clock that moves by what was measured: pytest-benchmark reads the samples of another process from it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ahead: Iterator[float] = iter(())

    def __call__(self) -> float:
        """The time, in seconds."""
        return self._now

    def wind(self, seconds: list[float]) -> None:
        """What the next rounds take."""
        self._ahead = iter(seconds)

    def tick(self) -> None:
        """One round; a round more than was measured (a profiler's) takes no time."""
        self._now += next(self._ahead, 0.0)


class Suites:
    """The cells of the chosen suite, and the session that measures them as `bench run` does."""

    def __init__(self, config: pytest.Config) -> None:
        from bench.run import cases, request, suite_run

        if not config.pluginmanager.hasplugin("benchmark"):
            raise pytest.UsageError("bench.suites needs pytest-benchmark")
        if hasattr(config, "workerinput"):
            raise pytest.UsageError("bench.suites measures one case after another: run it without -n")
        python = _option(config, "python")
        self._wish = request.RunRequest(
            suite=_option(config, "suite") or "quick",
            out=Path(_option(config, "out") or "results"),
            device=_option(config, "device") or "auto",
            python=Path(python) if python else None,
            root=_option(config, "root"),
            command="pytest --pyargs bench.suites",
        )
        suite = cases.load_suite(self._wish.suite)
        self._bench = suite_run.find_bench(self._wish)
        self.device = suite_run.choose_device(self._wish, self._bench, self)
        self._budget = getattr(suite.budget, self.device.partition(":")[0])
        self._known, self._notes, self.cells = suite_run.find_cells(suite, self._wish, self._bench, self.device, self)
        self.kept: Path | None = None
        self._session: Session | None = None
        self._results: dict[Case, Result] = {}

    def measure(self, cell: Cell) -> Result:
        """One case, within its share of the suite's budget, which begins with the first."""
        from bench.core.errors import BYTES_FOR_A_RUN
        from bench.run import session
        from provision.core.errors import from_os_error

        if self._session is None:
            try:
                self._session = session.Session(self._wish, self._bench, self._budget, self)
                self._session.know(self._known, self._notes)
            except OSError as error:
                raise from_os_error(error, needed_bytes=BYTES_FOR_A_RUN, flag="--diffusion-out") from error
        later = self.cells[self.cells.index(cell) + 1 :]
        began = time.monotonic()
        found = self._session.measure_one(cell, later, f"  {cell.case.name}")
        # Pytest goes on in its own order, so a case is repeated at once: not in the time that later ones need.
        found = self._session.measure_again(cell, found, time.monotonic() - began, f"  {cell.case.name}", later)
        self._results[cell.case] = found
        return found

    @property
    def software(self) -> dict[str, str]:
        """What was measured: the environment's, not this process's."""
        return next((result.software for result in self._results.values() if result.software), {})

    def keep(self) -> None:
        """Write the run."""
        if self._session is not None:
            self._session.keep(list(self._results.values()))
            self.kept = self._session.folder / "run.json"

    def begin(self, line: str) -> None:
        """Pytest says which test is at work."""

    def at(self, line: Callable[[], str]) -> None:
        """Ignore progress: pytest shows its own."""

    def say(self, line: str) -> None:
        """What became of it is in its report."""


def suites(config: pytest.Config) -> Suites:
    """The suite of a run of pytest.

    Raises:
        pytest.UsageError: it cannot be measured here; the message says why, and what helps.
    """
    from provision.core.errors import FirstlightError

    if _SUITES not in config.stash:
        try:
            config.stash[_SUITES] = Suites(config)
        except FirstlightError as error:
            raise pytest.UsageError(str(error).replace(" --", " --diffusion-")) from None
    return config.stash[_SUITES]


def _option(config: pytest.Config, name: str) -> str | None:
    """An option; None also where the plugin came too late to be asked for any."""
    told: str | None = config.getoption(f"--diffusion-{name}", None)
    return told
