"""A whole run: the cases of a suite one after another, within its budget; or in pairs, image by image in turns."""

from __future__ import annotations

import datetime as dt
import os
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bench import cases, causes, device, judging, pictures, runner, runs, stats, verdict
from bench.codec import plain
from bench.errors import BUDGET
from bench.result import SCHEMA, Result, Run, Status
from bench.worker import Request
from provision import facts, paths, profiles, spec
from provision.errors import BlockedError, SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.cases import Cell
    from bench.readings import Validation
    from bench.result import Case, Tuning
    from provision.facts import Facts
    from provision.paths import Root

_FIRST_OVERHEAD_SECONDS = 6.0  # until the first case of a model has told
_FIRST_COMPILE_SECONDS = 20.0  # what asking the compiler for a price adds to it
_PYTHON = "python"  # the one setting of a pair that is no axis


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a run is asked for. `interleave`: the two settings of a pair, as people write them."""

    suite: str
    out: Path
    device: str = "auto"
    python: Path | None = None
    root: str | None = None
    host: Path | None = None
    envs: Path | None = None
    budget_seconds: float | None = None
    models: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    find_max: bool = False
    interleave: tuple[str, str] | None = None
    changes: tuple[str, ...] = ()
    in_process: bool = False
    command: str | None = None


class Progress(Protocol):
    """Who is told what happens."""

    def begin(self, line: str) -> None:
        """A case begins."""

    def say(self, line: str) -> None:
        """Something is known."""


@dataclass(frozen=True)
class Bench:
    """Where and on what a run is done."""

    root: Root
    python: Path
    machine: Facts
    envs: Path


def run(wish: Wish, progress: Progress) -> Run:
    """Measure what is wished for, and keep it.

    Raises:
        SpecError: a suite, a name or a setting is wrong.
        BlockedError: the device, the interpreter or the disk cannot be used.
    """
    suite = cases.load_suite(wish.suite)
    # A wrong name is told before anything is started.
    device.check_name(wish.device)
    cases.check_picks(wish.models, wish.dtypes)
    changes = settings(",".join(wish.changes))
    pair = tuple(settings(each) for each in wish.interleave) if wish.interleave else None
    for flag, is_given in (("--in-process", wish.in_process), ("--find-max", wish.find_max)):
        if pair is not None and is_given:
            raise SpecError(f"{flag} and --interleave: a pair is two processes that time images alone. Leave one out.")
    bench = find_bench(wish)
    chosen = choose_device(wish, bench, progress)
    cells = cases.unroll(suite, chosen, only_models=wish.models, only_dtypes=wish.dtypes, changes=changes)
    if wish.find_max:
        cells = [replace(cell, find_max=True) for cell in cells]
    session = Session(wish, bench, wish.budget_seconds or getattr(suite.budget, chosen.partition(":")[0]), progress)
    results = session.measure_pairs(cells, pair[0], pair[1]) if pair else session.measure(cells)
    return session.keep(results, interleaved=pair is not None)


def settings(text: str) -> dict[str, str]:
    """Read "axis=value,axis=value".

    Raises:
        SpecError: it is not of this form.
    """
    found = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        axis, sign, value = part.partition("=")
        if not (axis and sign and value):
            raise SpecError(f"{part!r} is no setting: write AXIS=VALUE, such as dtype=bf16.")
        found[axis.strip()] = value.strip()
    return found


def find_bench(wish: Wish) -> Bench:
    """Where the run is done.

    Raises:
        BlockedError: there is no interpreter.
    """
    host = spec.load_host(wish.host)
    envs = (wish.envs or paths.shipped_envs()).absolute()
    root = find_root(wish)
    python = wish.python or paths.interpreter(root.prefix(host.env))
    if not python.exists():
        raise BlockedError(f"{python} is not there. Run `make setup`, or name an interpreter with --python.")
    return Bench(root, python.absolute(), facts.probe(), envs)


def find_root(wish: Wish) -> Root:
    """The persistent folder, as it is named or as this host's profile has it."""
    envs = (wish.envs or paths.shipped_envs()).absolute()
    return profiles.choose(wish.root, spec.load_host(wish.host), envs, os.environ, Path.home()).root


def choose_device(wish: Wish, bench: Bench, progress: Progress) -> str:
    """The device of the run.

    Raises:
        BlockedError: the one that is wished for cannot be used.
    """
    # Where auto can only mean the CPU, torch need not be asked: that saves its import.
    ask = wish.device not in {"auto", "cpu"} or bool(bench.machine.gpus) or bench.machine.system == "darwin"
    found = runner.query(bench.python) if ask and wish.device != "cpu" else None
    site = causes.Site(bench.machine) if found is None else causes.site(bench.machine, bench.envs)
    chosen = device.choose(wish.device, site, found)
    if wish.device == "auto" and chosen == "cpu" and bench.machine.gpus and found is not None:
        why_not = causes.cause(site, found)
        progress.say(f"on the CPU: {why_not.text if why_not is not None else 'torch lists no card'}")
    return chosen


class Session:
    """The cases of one run, and where it is kept. What a case leaves of its share of the budget goes to later ones."""

    def __init__(
        self, wish: Wish, bench: Bench, budget_seconds: float, progress: Progress, *, began: float | None = None
    ) -> None:
        """Make the run's folder; from now on its time counts, or from `began` on (time.monotonic)."""
        self._wish, self._bench, self._progress = wish, bench, progress
        self._started = dt.datetime.now(dt.timezone.utc)
        self._began = began if began is not None else time.monotonic()
        self.ends = self._began + budget_seconds
        # A file's name may hold bytes that are no characters: a run's own may not.
        self._suite = Path(wish.suite).stem.encode("utf-8", "replace").decode("utf-8")
        name = f"{self._started:%Y%m%dT%H%M%SZ}-{self._suite}-{uuid.uuid4().hex[:6]}"
        self.folder = wish.out / name
        self.folder.mkdir(parents=True)
        self._manifest = spec.load_tables(bench.envs / "models.toml", spec.ModelSpec)
        self._overheads: dict[tuple[str, str], float] = {}  # {(model, compile): seconds}
        self._compared: set[Case] = set()
        self._rates: dict[tuple[Path, str, str], float] = {}  # {(interpreter, device, dtype): FLOPs a second}

    def keep(
        self,
        results: Sequence[Result],
        *,
        interleaved: bool = False,
        tuning: Tuning | None = None,
        validation: Validation | None = None,
    ) -> Run:
        """Write the run; its verdict is on all of its results, on the two of a search that count, or on a host.

        Raises:
            BlockedError: the disk cannot be used.
        """
        results = pictures.with_psnr(results, self.folder)
        found = verdict.judge(results, self._wish.suite) if tuning is None else verdict.judge_tuning(results, tuning)
        done = Run(
            schema=SCHEMA,
            id=self.folder.name,
            started=self._started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._began, 3),
            machine=plain(self._bench.machine.to_dict()),
            suite=self._suite,
            results=tuple(results),
            verdict=found if validation is None else judging.conclude(validation.judgements),
            command=self._wish.command,
            interleaved=interleaved,
            tuning=tuning,
            validation=validation,
        )
        runs.keep(done, self.folder)
        return done

    def measure(self, cells: list[Cell]) -> list[Result]:
        """Each case once; those that were disturbed again, while there is time."""
        results = []
        took = {}
        for number, cell in enumerate(cells):
            where = f"  [{number + 1}/{len(cells)}] {cell.case.name:<52}"
            began = time.monotonic()
            results.append(self.measure_one(cell, cells[number + 1 :], where))
            took[number] = time.monotonic() - began
        for number, cell in enumerate(cells):
            results[number] = self.measure_again(
                cell, results[number], took[number], f"  [{number + 1} again] {cell.case.name:<52}"
            )
        return results

    def measure_again(self, cell: Cell, before: Result, took: float, where: str) -> Result:
        """A case once more if it went well and was disturbed, while there is time; the better of both.

        Only its times are new: what an evaluation was compared with stands.
        """
        disturbed = before.status is Status.OK and verdict.contended(before) is not None
        if not disturbed or self.ends - time.monotonic() < took:
            return before
        again = compared_as(self.measure_one(cell, [], where), before)
        return replace(again if _is_clean(again) else before, attempts=2)

    def measure_pairs(self, cells: list[Cell], one: Mapping[str, str], two: Mapping[str, str]) -> list[Result]:
        """Each case in both settings, image by image in turns."""
        results: list[Result] = []
        pythons = tuple(Path(each.get(_PYTHON, self._bench.python)) for each in (one, two))
        axes = [{axis: value for axis, value in each.items() if axis != _PYTHON} for each in (one, two)]
        for number, cell in enumerate(cells):
            both = [cases.change(cell.case, changes) for changes in axes]
            where = f"  [{number + 1}/{len(cells)}] {' / '.join(case.name for case in both)}"
            left = self.ends - time.monotonic()
            share, limit = self._times(cells[number + 1 :], each=2)
            start = 2 * self.overhead(cell.case)
            if limit < start:
                reason = f"{BUDGET} {max(left, 0):.0f} s, and starting a pair takes {start:.0f} s"
                results += [Result(case, Status.SKIPPED, reason=reason) for case in both]
                self._progress.say(f"{where} {outcome(results[-1])}")
                continue
            began = time.monotonic()
            pair = self.pair((both[0], both[1]), (pythons[0], pythons[1]), share, limit, where)
            took = time.monotonic() - began
            if _is_disturbed(pair) and limit - took > took:
                again = self.pair((both[0], both[1]), (pythons[0], pythons[1]), took, took, f"{where} again")
                pair = again if all(map(_is_clean, again)) else pair
            results += pair
        return results

    def pair(
        self, both: tuple[Case, Case], pythons: tuple[Path, Path], share: float, limit: float, where: str
    ) -> list[Result]:
        """Two cases whose images are made in turns, each under its interpreter; both times count from now."""
        self._progress.begin(where)
        asked = [
            self._request(case, share, limit, f"{case.name}-{which}.png", python)
            for case, which, python in zip(both, "ab", pythons, strict=True)
        ]
        requests = (replace(asked[0], paced=True), replace(asked[1], paced=True))
        measured = runner.run_pair(requests, pythons, hub=self._bench.root.hub_in_use)
        found = [self._finished(result, python) for result, python in zip(measured, pythons, strict=True)]
        self._progress.say(f"{where} {' / '.join(outcome(result) for result in found)}")
        return found

    def one(self, cell: Cell, share: float, limit: float, where: str) -> Result:
        """One case: no image is begun after `share` seconds from now, and all of it ends within `limit`."""
        start = self.overhead(cell.case)
        if limit < start:
            reason = f"{BUDGET} {max(limit, 0):.0f} s, and starting a case takes {start:.0f} s"
            result = Result(cell.case, Status.SKIPPED, reason=reason)
            self._progress.say(f"{where} {outcome(result)}")
            return result
        self._progress.begin(where)
        python = self._bench.python
        asked = time.monotonic()
        request = replace(
            self._request(cell.case, share, limit, f"{cell.case.name}.png", python), find_max=cell.find_max
        )
        if self._wish.in_process:
            result = runner.run_here(request, python)
        else:
            result = runner.run_case(request, python, hub=self._bench.root.hub_in_use)
        result = self._finished(result, python)
        if result.samples:
            images = (*result.warmups, *result.samples)
            spent = sum(image.seconds for image in images) + (result.phases.first_image_seconds or 0.0)
            took = max(0.0, time.monotonic() - asked - spent)
            # A start that others slowed down would make the later cases look too dear: the quickest one counts.
            if verdict.contended(result) is None or took < start:
                key = (cell.case.model, cell.case.compile)
                self._overheads[key] = min(took, self._overheads.get(key, took))
        self._progress.say(f"{where} {outcome(result)}")
        return result

    def overhead(self, case: Case) -> float:
        """Seconds that a case takes beside its images, as the quickest one of its model did."""
        extra = _FIRST_COMPILE_SECONDS if case.compile != "eager" else 0.0
        return self._overheads.get((case.model, case.compile), _FIRST_OVERHEAD_SECONDS + extra)

    def _times(self, later: Sequence[Cell], *, each: int = 1) -> tuple[float, float]:
        """(this one's share of what is left, all that the later ones do not need for their start)."""
        left = self.ends - time.monotonic()
        return left / (len(later) + 1), left - each * sum(self.overhead(cell.case) for cell in later)

    def measure_one(self, cell: Cell, later: Sequence[Cell], where: str) -> Result:
        """One case, with its share of the time that the later ones do not need for their start."""
        share, limit = self._times(later)
        return self.one(cell, share, limit, where)

    def _request(self, case: Case, share: float, limit: float, image: str, python: Path) -> Request:
        weights = cases.weights(case.model, self._manifest, self._bench.root)
        alike = replace(case, scheduler="", steps=0, seed=0, vae="whole", threads=0)
        compare = alike not in self._compared
        return Request(
            case,
            time.time(),
            share,
            limit,
            weights,
            str((self.folder / image).absolute()),
            compare=compare,
            rate_known=self._rates.get((python, case.device, case.dtype)),
            rate_fp32=self._rates.get((python, case.device, "fp32")),
        )

    def _finished(self, result: Result, python: Path) -> Result:
        numerics = result.numerics
        if result.status is Status.OK and numerics is not None and numerics.forward_error is not None:
            self._compared.add(replace(result.case, scheduler="", steps=0, seed=0, vae="whole", threads=0))
        key = (python, result.case.device, result.case.dtype)
        self._rates[key] = max(result.work.probe_flops_per_second or 0.0, self._rates.get(key, 0.0))
        return replace(result, trust=verdict.trust(result))


def compared_as(result: Result, before: Result) -> Result:
    """A result that was not compared with fp32, with what an earlier one of the same case was found to be."""
    one, two = before.numerics, result.numerics
    if one is None or two is None or one.forward_error is None or two.forward_error is not None:
        return result
    return replace(
        result,
        numerics=replace(two, forward_error=one.forward_error, tolerance=one.tolerance, not_compared=None),
    )


def _is_clean(result: Result) -> bool:
    return result.status is Status.OK and verdict.contended(result) is None


def _is_disturbed(pair: Sequence[Result]) -> bool:
    """Whether both went well, and one was disturbed."""
    return all(result.status is Status.OK for result in pair) and not all(map(_is_clean, pair))


def outcome(result: Result) -> str:
    """What became of a case, in a few words."""
    steps = stats.step_seconds(result)
    if result.status is Status.OK and steps is not None:
        disturbed = verdict.contended(result)
        return f"{steps.median:.3g} s/step over {len(result.samples)} images{f' ({disturbed})' if disturbed else ''}"
    return f"{result.status.value}: {result.cause}".removesuffix(": ")
