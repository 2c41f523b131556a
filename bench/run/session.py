"""The session of a run: its cases one after another within the budget, or in pairs, image by image in turns."""

from __future__ import annotations

import datetime as dt
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.core import stats
from bench.core.codec import plain
from bench.core.errors import BUDGET
from bench.core.protocol import Request
from bench.core.result import SCHEMA, Result, Run, Status
from bench.core.validation_records import Verdict, VerdictState
from bench.launch import in_process, worker_process
from bench.run import cases, image_quality, store, time_left, verdict
from provision.config import models, toml

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.core.result import Case, Tuning
    from bench.core.validation_records import Validation
    from bench.launch.received_events import ReceivedEvents
    from bench.run.cases import Cell
    from bench.run.dtype_support import DtypeSupport
    from bench.run.request import BenchHost, Progress, RunRequest

_FIRST_OVERHEAD_SECONDS = 6.0  # until the first case of a model has told
_FIRST_COMPILE_SECONDS = 20.0  # what asking the compiler for a price adds to it
_REQUIRED_SECONDS = 600.0  # what a case that must be measured may take, whatever the budget of its suite is
_PYTHON = "python"  # the one setting of a pair that is no axis


class Session:
    """The cases of one run, and where it is kept. What a case leaves of its share of the budget goes to later ones."""

    def __init__(
        self,
        run_request: RunRequest,
        bench: BenchHost,
        budget_seconds: float,
        progress: Progress,
        *,
        began: float | None = None,
        dtype_support: DtypeSupport | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Make the run's folder; from now on its time counts, or from `began` on (time.monotonic).

        `dtype_support` prices the cases, where it was probed. `notes` say what it changes. The run keeps both.
        """
        self._wish, self._bench, self._progress = run_request, bench, progress
        self._started = dt.datetime.now(dt.timezone.utc)
        self._began = began if began is not None else time.monotonic()
        self.ends = self._began + budget_seconds
        # A file's name may hold bytes that are no characters: a run's own may not.
        self._suite = Path(run_request.suite).stem.encode("utf-8", "replace").decode("utf-8")
        name = f"{self._started:%Y%m%dT%H%M%SZ}-{self._suite}-{uuid.uuid4().hex[:6]}"
        self.folder = run_request.out / name
        self.folder.mkdir(parents=True)
        self._manifest = toml.load_tables(bench.envs / "models.toml", models.ModelSpec)
        self._overheads: dict[tuple[str, str], float] = {}  # {(model, compile): seconds}
        self._compared: set[Case] = set()
        self._precisions = dtype_support.precisions if dtype_support is not None else ()
        self._notes = notes
        self._rates: dict[tuple[Path, str, str], float] = {}  # {(interpreter, device, dtype): FLOPs a second}
        if dtype_support is not None:
            device = dtype_support.device
            self._rates |= {(bench.python, device, dtype): rate for dtype, rate in dtype_support.rates}
        self._interrupted: str | None = None

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
        results = image_quality.with_psnr(results, self.folder)
        found = verdict.judge(results, self._wish.suite) if tuning is None else verdict.judge_tuning(results, tuning)
        if self._interrupted is not None:
            found = Verdict(VerdictState.NOT_JUDGED, (self._interrupted, *found.reasons))
        done = Run(
            schema=SCHEMA,
            id=self.folder.name,
            started=self._started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._began, 3),
            machine=plain(self._bench.machine.to_dict()),
            suite=self._suite,
            results=tuple(results),
            verdict=found if validation is None else verdict.conclude(validation.judgements),
            command=self._wish.command,
            interleaved=interleaved,
            tuning=tuning,
            validation=validation,
            precisions=self._precisions,
            notes=self._notes,
        )
        store.keep(done, self.folder)
        return done

    def measure(self, cells: list[Cell]) -> list[Result]:
        """Each case once, those that must be measured first; then those that were disturbed again, while there is time.

        The required ones are repeated before any other begins.
        """
        results: dict[int, Result] = {}
        required = [number for number, cell in enumerate(cells) if cell.required]
        others = [number for number, cell in enumerate(cells) if not cell.required]
        try:
            self._measure_in_order(cells, required, others, results)
        except KeyboardInterrupt:
            if any(result.status is Status.OK for result in results.values()):
                self._interrupted = f"interrupted after {len(results)} of {len(cells)} cases"
                rest = {number: _unreached(cell) for number, cell in enumerate(cells) if number not in results}
                self.keep([(results | rest)[number] for number in range(len(cells))])
                self._progress.say(f"kept: {self.folder / 'run.json'} ({self._interrupted})")
            raise
        return [results[number] for number in range(len(cells))]

    def _measure_in_order(
        self, cells: list[Cell], required: list[int], others: list[int], results: dict[int, Result]
    ) -> None:
        order = required + others
        for part in (required, others):
            took = {}
            for number in part:
                cell, place = cells[number], order.index(number)
                began = time.monotonic()
                later = [cells[each] for each in order[place + 1 :]]
                where = f"  [{place + 1}/{len(cells)}] {cell.case.name:<52}"
                results[number] = self.measure_one(cell, later, where)
                took[number] = time.monotonic() - began
            for number in part:
                where = f"  [{order.index(number) + 1} again] {cells[number].case.name:<52}"
                later = [cells[each] for each in others] if part is required else []
                results[number] = self.measure_again(cells[number], results[number], took[number], where, later)

    def measure_again(self, cell: Cell, before: Result, took: float, where: str, later: Sequence[Cell] = ()) -> Result:
        """A case once more if it went well and was disturbed, while there is time; the better of both.

        It takes what it `took` before, so that others can be repeated too. Only its times are new: what an evaluation
        was compared with stands. `later`: the cases after it; for those that must be measured, time is kept.
        """
        disturbed = before.status is Status.OK and verdict.contended(before) is not None
        left = self.ends - time.monotonic() - took * sum(each.required for each in later)
        if not disturbed or left < took:
            return before
        again = replace(self.one(cell, took, left, where, later=later), required=cell.required)
        again = compared_as(again, before)
        return replace(again if _is_clean(again) else before, attempts=2)

    def measure_pairs(self, cells: list[Cell], one: Mapping[str, str], two: Mapping[str, str]) -> list[Result]:
        """Measure each case in both settings, image by image in turns; cases that become the same pair are one."""
        results: list[Result] = []
        pythons = tuple(Path(each.get(_PYTHON, self._bench.python)) for each in (one, two))
        axes = [{axis: value for axis, value in each.items() if axis != _PYTHON} for each in (one, two)]
        pairs: dict[tuple[Case, Case], Cell] = {}
        for cell in cells:
            pairs.setdefault((cases.change(cell.case, axes[0]), cases.change(cell.case, axes[1])), cell)
        cells = list(pairs.values())
        for number, (both, cell) in enumerate(pairs.items()):
            where = f"  [{number + 1}/{len(cells)}] {' / '.join(case.name for case in both)}"
            left = self.ends - time.monotonic()
            share, limit = self._times(cells[number + 1 :], each=2)
            start = 2 * self.overhead(cell.case)
            if limit < start:
                reason = f"{BUDGET} {max(left, 0):.0f} s, and starting a pair takes {start:.0f} s"
                results += [Result(case, Status.SKIPPED, reason=reason, required=cell.required) for case in both]
                self._progress.say(f"{where} {outcome(results[-1])}")
                continue
            began = time.monotonic()
            pair = self.pair(both, (pythons[0], pythons[1]), share, limit, where)
            took = time.monotonic() - began
            if _is_disturbed(pair) and limit - took > took:
                again = self.pair(both, (pythons[0], pythons[1]), took, took, f"{where} again")
                pair = again if all(map(_is_clean, again)) else pair
            results += [replace(result, required=cell.required) for result in pair]
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
        on_received = self._progress_line(where, 2 * self.overhead(both[0]), share / 2, ())
        measured = worker_process.run_pair(requests, pythons, hub=self._bench.root.hub_in_use, on_received=on_received)
        found = [self._finished(result, python) for result, python in zip(measured, pythons, strict=True)]
        self._progress.say(f"{where} {' / '.join(outcome(result) for result in found)}")
        return found

    def one(
        self,
        cell: Cell,
        share: float,
        limit: float,
        where: str,
        *,
        checks: float | None = None,
        later: Sequence[Cell] = (),
    ) -> Result:
        """One case: no image is begun after `share` seconds from now, and all of it ends within `limit`.

        The checks after its samples end within `checks` where that is given. `later`: the cases after it.
        """
        start = self.overhead(cell.case)
        if limit < start:
            reason = f"{BUDGET} {max(limit, 0):.0f} s, and starting a case takes {start:.0f} s"
            result = Result(cell.case, Status.SKIPPED, reason=reason)
            self._progress.say(f"{where} {outcome(result)}")
            return result
        self._progress.begin(where)
        python = self._bench.python
        asked = time.monotonic()
        plain = self._request(cell.case, share, limit, f"{cell.case.name}.png", python)
        request = replace(plain, find_max=cell.find_max, checks_seconds=checks)
        if self._wish.in_process:
            result = in_process.run_here(request, python)
        else:
            on_received = self._progress_line(where, start, share, later)
            result = worker_process.run_case(request, python, hub=self._bench.root.hub_in_use, on_received=on_received)
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

    def _progress_line(
        self, where: str, overhead: float, share: float, later: Sequence[Cell]
    ) -> Callable[[ReceivedEvents], None]:
        """Return the callback that shows the progress of a case."""
        now, what = time.monotonic(), " ".join(where.split())
        required = sum(cell.required for cell in later) if self._wish.budget_seconds is None else 0
        known = time_left.CaseBudget(what, overhead, now, now + share, self.ends, len(later), required)
        return lambda received: self._progress.at(lambda: f"  {known.line(received)}")

    def overhead(self, case: Case) -> float:
        """Seconds that a case takes beside its images, as the quickest one of its model did."""
        extra = _FIRST_COMPILE_SECONDS if case.compile != "eager" else 0.0
        return self._overheads.get((case.model, case.compile), _FIRST_OVERHEAD_SECONDS + extra)

    def _times(self, later: Sequence[Cell], *, each: int = 1) -> tuple[float, float]:
        """(this one's share of what is left, all that the later ones do not need for their start)."""
        left = self.ends - time.monotonic()
        return left / (len(later) + 1), left - each * sum(self.overhead(cell.case) for cell in later)

    def measure_one(self, cell: Cell, later: Sequence[Cell], where: str) -> Result:
        """One case, with its share of the time that the later ones do not need for their start.

        A case that must be measured may take all that the later ones of its kind do not need, and go over the budget
        where no `--budget` was given: its samples alone, not the checks after them.
        """
        share, limit = self._times(later)
        if not cell.required:
            return self.one(cell, share, limit, where, later=later)
        _, checks = self._times([each for each in later if each.required])
        limit = checks if self._wish.budget_seconds is not None else max(_REQUIRED_SECONDS, checks)
        return replace(self.one(cell, share, limit, where, checks=checks, later=later), required=True)

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
            cpus=self._bench.machine.cpu_quota,
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


def _unreached(cell: Cell) -> Result:
    return Result(cell.case, Status.SKIPPED, reason="interrupted before its turn", required=cell.required)


def _is_clean(result: Result) -> bool:
    return result.status is Status.OK and verdict.contended(result) is None


def _is_disturbed(pair: Sequence[Result]) -> bool:
    """Return whether both were measured and at least one was disturbed."""
    return all(result.status is Status.OK for result in pair) and not all(map(_is_clean, pair))


def outcome(result: Result) -> str:
    """Return the outcome of a case in a few words."""
    steps = stats.step_seconds(result)
    if result.status is Status.OK and steps is not None:
        disturbed = verdict.contended(result)
        return f"{steps.median:.3g} s/step over {len(result.samples)} images{f' ({disturbed})' if disturbed else ''}"
    return f"{result.status.value}: {result.cause}".removesuffix(": ")
