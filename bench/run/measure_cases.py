"""Measures the cases of one run within its time budget, one after another or in pairs, and stores the run."""

from __future__ import annotations

import datetime as dt
import itertools
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.core import verdict
from bench.core.codec import plain
from bench.core.errors import BUDGET
from bench.core.result import SCHEMA, Result, Run, Status
from bench.core.verdict import Verdict, VerdictState
from bench.core.worker_requests import CaseRequest
from bench.launch import in_process, worker_process
from bench.launch.standby import StandbyWorkers, fitting
from bench.run import case_outcome, cases, disturbance, image_quality, judge_cases, progress_line, store
from provision.config import models, toml

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.core.result import Case, Tuning
    from bench.core.validation_records import Validation
    from bench.launch.received_events import ReceivedEvents
    from bench.run.cases import Cell
    from bench.run.dtype_support import DtypeSupport
    from bench.run.request import BenchHost, Progress, RunRequest

_FIRST_OVERHEAD_SECONDS = 6.0  # the assumed time of a case besides its images, until a case of its model is measured
_PREPARED_OVERHEAD_SECONDS = 3.0  # the same with a prepared worker
_FIRST_COMPILE_SECONDS = 20.0  # is added to these if the case is compiled
_REQUIRED_SECONDS = 600.0  # a required case may take this long even if the suite's budget is shorter
_PYTHON = "python"  # the only setting of a pair that is not an axis
_LEAST_SAMPLING_SECONDS = 2.0  # the shortest time in which a case takes its samples


class Session:
    """Measure the cases of one run, and store it.

    A case gets a share of the time that is left, so what a case does not use goes to the later ones.
    """

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
        """Create the run's folder, and start to count the run's time.

        Args:
            run_request: the request of the run.
            bench: the root, the interpreter and the machine.
            budget_seconds: the time for all cases.
            progress: shows the progress to the user.
            began: the start of the run (time.monotonic); None: now.
            dtype_support: the probe of the device's dtypes, whose rates help to predict the time of the cases. The run
                stores it.
            notes: texts on how the device changes the suite. The run stores them.
        """
        self._run_request, self._bench, self._progress = run_request, bench, progress
        self._started = dt.datetime.now(dt.timezone.utc)
        self._began = began if began is not None else time.monotonic()
        self.ends = self._began + budget_seconds
        # A file name may hold bytes that are not UTF-8; the id of a run must not.
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
        most = 0 if run_request.in_process else fitting(bench.machine)
        self._standby = StandbyWorkers(bench.python, bench.root.hub_in_use, most)

    def close(self) -> None:
        """End the prepared workers that no case has taken."""
        self._standby.close()

    def keep(
        self,
        results: Sequence[Result],
        *,
        interleaved: bool = False,
        tuning: Tuning | None = None,
        validation: Validation | None = None,
    ) -> Run:
        """Write the run's file, and return the run.

        Args:
            results: the results of the cases.
            interleaved: the cases are pairs whose images were made in turns.
            tuning: the result of `bench tune`; the verdict then covers only the default and the best setting.
            validation: the result of `bench validate`; the verdict then follows from its judgements.

        Raises:
            BlockedError: the disk is full, or cannot be written.
        """
        results = image_quality.with_psnr(results, self.folder)
        judged = (
            judge_cases.judge(results, self._run_request.suite)
            if tuning is None
            else judge_cases.judge_tuning(results, tuning)
        )
        if self._interrupted is not None:
            judged = Verdict(VerdictState.NOT_JUDGED, (self._interrupted, *judged.reasons))
        run = Run(
            schema=SCHEMA,
            id=self.folder.name,
            started=self._started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._began, 3),
            machine=plain(self._bench.machine.to_dict()),
            suite=self._suite,
            results=tuple(results),
            verdict=judged if validation is None else verdict.conclude(validation.judgements),
            command=self._run_request.command,
            interleaved=interleaved,
            tuning=tuning,
            validation=validation,
            precisions=self._precisions,
            notes=self._notes,
        )
        store.keep(run, self.folder)
        return run

    def measure(self, cells: list[Cell]) -> list[Result]:
        """Measure each case once, the required ones first, and disturbed cases a second time if there is time.

        A disturbed required case is repeated before any case that is not required. After Ctrl-C the cases measured so
        far are stored, if there are any.
        """
        results: dict[int, Result] = {}
        required = [number for number, cell in enumerate(cells) if cell.required]
        others = [number for number, cell in enumerate(cells) if not cell.required]
        try:
            self._measure_in_order(cells, required, others, results)
        except KeyboardInterrupt:
            if any(result.status is Status.OK for result in results.values()):
                self._interrupted = f"interrupted after {len(results)} of {len(cells)} cases"
                unreached = {number: _unreached(cell) for number, cell in enumerate(cells) if number not in results}
                self.keep([(results | unreached)[number] for number in range(len(cells))])
                self._progress.report(f"kept: {self.folder / 'run.json'} ({self._interrupted})")
            raise
        return [results[number] for number in range(len(cells))]

    def _measure_in_order(
        self, cells: list[Cell], required: list[int], others: list[int], results: dict[int, Result]
    ) -> None:
        """Measure the required cases, then the others, and repeat disturbed cases of each part at its end.

        `required` and `others` are indexes into `cells`. The results are added to `results`, which is {index: result}.
        """
        order = required + others
        for part in (required, others):
            seconds = {}
            for number in part:
                cell, place = cells[number], order.index(number)
                began = time.monotonic()
                later = [cells[index] for index in order[place + 1 :]]
                label = f"  [{place + 1}/{len(cells)}] {cell.case.name:<52}"
                results[number] = self.measure_one(cell, later, label)
                seconds[number] = time.monotonic() - began
            for number in part:
                label = f"  [{order.index(number) + 1} again] {cells[number].case.name:<52}"
                later = [cells[index] for index in others] if part is required else []
                results[number] = self.measure_again(cells[number], results[number], seconds[number], label, later)

    def measure_again(self, cell: Cell, before: Result, took: float, label: str, later: Sequence[Cell] = ()) -> Result:
        """Measure a case again if it succeeded but was disturbed and there is time.

        Return the better of the two results.

        It gets only the time of the first measurement (`took` seconds), so that other cases can be repeated too. The
        comparison with fp32 is kept from the first result, `before`. `later`: the cases after it; time for the required
        ones is reserved.
        """
        disturbed = before.status is Status.OK and disturbance.of_case(before) is not None
        left = self.ends - time.monotonic() - took * sum(other.required for other in later)
        if not disturbed or left < took:
            return before
        again = replace(self.run_case(cell, took, left, label, later=later), required=cell.required)
        again = case_outcome.with_comparison_of(again, before)
        return replace(again if case_outcome.is_clean(again) else before, attempts=2)

    def measure_pairs(self, cells: list[Cell], one: Mapping[str, str], two: Mapping[str, str]) -> list[Result]:
        """Measure each case in two settings whose images are made in turns.

        Cases that give the same pair are measured once.

        `one`, `two`: {axis: value} of each setting; the axis "python" is the interpreter.
        """
        results: list[Result] = []
        pythons = tuple(Path(settings.get(_PYTHON, self._bench.python)) for settings in (one, two))
        axes = [{axis: value for axis, value in settings.items() if axis != _PYTHON} for settings in (one, two)]
        pairs: dict[tuple[Case, Case], Cell] = {}
        for cell in cells:
            pairs.setdefault((cases.change(cell.case, axes[0]), cases.change(cell.case, axes[1])), cell)
        cells = list(pairs.values())
        for number, (both, cell) in enumerate(pairs.items()):
            label = f"  [{number + 1}/{len(cells)}] {' / '.join(case.name for case in both)}"
            self.prepare(both[0], 2 * (len(cells) - number))
            left = self.ends - time.monotonic()
            share, limit = self._times(cells[number + 1 :], processes=2)
            start = 2 * self.overhead(cell.case)
            if limit < start:
                reason = f"{BUDGET} {max(left, 0):.0f} s, but starting a pair takes {start:.0f} s"
                results += [Result(case, Status.SKIPPED, reason=reason, required=cell.required) for case in both]
                self._progress.report(f"{label} {case_outcome.text(results[-1])}")
                continue
            began = time.monotonic()
            pair = self.run_pair(both, (pythons[0], pythons[1]), share, limit, label)
            took = time.monotonic() - began
            if case_outcome.is_disturbed_pair(pair) and limit - took > took:
                again = self.run_pair(both, (pythons[0], pythons[1]), took, took, f"{label} again")
                pair = again if all(map(case_outcome.is_clean, again)) else pair
            results += [replace(result, required=cell.required) for result in pair]
        return results

    def run_pair(
        self, both: tuple[Case, Case], pythons: tuple[Path, Path], share: float, limit: float, label: str
    ) -> list[Result]:
        """Measure two cases whose images are made in turns, each under its interpreter.

        No pair of images begins more than `share` seconds from now, and both cases end within `limit` seconds.
        """
        self._progress.begin(label)
        plain_requests = [
            self._request(case, share, limit, f"{case.name}-{side}.png", python)
            for case, side, python in zip(both, "ab", pythons, strict=True)
        ]
        requests = (replace(plain_requests[0], paced=True), replace(plain_requests[1], paced=True))
        on_received = self._progress_line(label, 2 * self.overhead(both[0]), share / 2, ())
        measured = worker_process.run_pair(
            requests,
            pythons,
            hub=self._bench.root.hub_in_use,
            on_received=on_received,
            prepared=(self._standby.take(pythons[0]), self._standby.take(pythons[1])),
        )
        results = [self._finished(result, python) for result, python in zip(measured, pythons, strict=True)]
        self._progress.report(f"{label} {' / '.join(case_outcome.text(result) for result in results)}")
        return results

    def run_case(
        self,
        cell: Cell,
        share: float,
        limit: float,
        label: str,
        *,
        checks: float | None = None,
        later: Sequence[Cell] = (),
    ) -> Result:
        """Measure one case: no image begins more than `share` seconds from now, and it ends within `limit` seconds.

        `checks`: the seconds from now within which its checks end; None: `limit`. `later`: the cases after it.
        """
        start = self.overhead(cell.case)
        if limit < start:
            reason = f"{BUDGET} {max(limit, 0):.0f} s, but starting a case takes {start:.0f} s"
            result = Result(cell.case, Status.SKIPPED, reason=reason)
            self._progress.report(f"{label} {case_outcome.text(result)}")
            return result
        self._progress.begin(label)
        python = self._bench.python
        began = time.monotonic()
        plain_request = self._request(cell.case, share, limit, f"{cell.case.name}.png", python)
        request = replace(plain_request, find_max=cell.find_max, checks_seconds=checks)
        if self._run_request.in_process:
            result = in_process.run_in_process(request, python)
        else:
            on_received = self._progress_line(label, start, share, later)
            result = worker_process.run_case(
                request,
                python,
                hub=self._bench.root.hub_in_use,
                on_received=on_received,
                prepared=self._standby.take(python),
            )
        result = self._finished(result, python)
        if result.samples:
            images = (*result.warmups, *result.samples)
            image_seconds = sum(image.seconds for image in images) + (result.phases.first_image_seconds or 0.0)
            took = max(0.0, time.monotonic() - began - image_seconds)
            # The least time counts: a start that other processes slowed down would make the prediction too long.
            if disturbance.of_case(result) is None or took < start:
                key = (cell.case.model, cell.case.compile)
                self._overheads[key] = min(took, self._overheads.get(key, took))
        self._progress.report(f"{label} {case_outcome.text(result)}")
        return result

    def _progress_line(
        self, label: str, overhead: float, share: float, later: Sequence[Cell]
    ) -> Callable[[ReceivedEvents], None]:
        """Return a function that shows the progress of a case, to be called with the events of its worker."""
        now, title = time.monotonic(), " ".join(label.split())
        required = sum(cell.required for cell in later) if self._run_request.budget_seconds is None else 0
        progress = progress_line.CaseProgress(title, overhead, now, now + share, self.ends, len(later), required)
        return lambda received: self._progress.update(lambda: f"  {progress.line(received)}")

    def overhead(self, case: Case) -> float:
        """Return the seconds that a case takes besides its images: the least of the cases of its model so far."""
        extra = _FIRST_COMPILE_SECONDS if case.compile != "eager" else 0.0
        first = _PREPARED_OVERHEAD_SECONDS if self._standby.size > 1 else _FIRST_OVERHEAD_SECONDS
        return self._overheads.get((case.model, case.compile), first + extra) + self._standby.seconds_per_worker

    def prepare(self, case: Case, needed: int) -> None:
        """Prepare workers for this case and later ones, if none is left and the case runs on a CUDA device.

        On a CPU a case gains little, since its images take longer than its start; and the imports would disturb other
        cases. `needed`: the number of workers that the rest of the run needs.
        """
        if case.device.startswith("cuda") and not self._standby.count:
            self._progress.begin("  importing the libraries for the next cases")
            self._standby.fill(needed)

    def _times(self, later: Sequence[Cell], *, processes: int = 1) -> tuple[float, float]:
        """Return (share, limit) of a case in seconds from now.

        The share is that of as many cases as fit into the time left with few images each, in their order. Below the
        limit, only the time in which later required cases start is reserved, so other cases may find no time and are
        skipped. `processes`: the processes of a case: 1, or 2 for a pair.
        """
        left = self.ends - time.monotonic()
        costs = [processes * (self.overhead(cell.case) + _LEAST_SAMPLING_SECONDS) for cell in later]
        fitting = sum(total <= left for total in itertools.accumulate(costs))
        reserved = processes * sum(self.overhead(cell.case) for cell in later if cell.required)
        return left / (fitting + 1), left - reserved

    def measure_one(self, cell: Cell, later: Sequence[Cell], label: str) -> Result:
        """Measure one case within its share of the time that is left.

        A case may use all of it except for the time in which later required cases start. Without `--budget` the samples
        of a required case may exceed the suite's budget, but not its checks.
        """
        self.prepare(cell.case, len(later) + 1)
        share, limit = self._times(later)
        if not cell.required:
            return self.run_case(cell, share, limit, label, later=later)
        checks = limit
        if self._run_request.budget_seconds is None:
            limit = max(_REQUIRED_SECONDS, limit)
        return replace(self.run_case(cell, share, limit, label, checks=checks, later=later), required=True)

    def _request(self, case: Case, share: float, limit: float, image: str, python: Path) -> CaseRequest:
        weights = cases.weights(case.model, self._manifest, self._bench.root)
        comparison_key = replace(case, scheduler="", steps=0, seed=0, vae="whole", threads=0)
        compare = comparison_key not in self._compared
        return CaseRequest(
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
        return replace(result, trust=disturbance.trust(result))


def _unreached(cell: Cell) -> Result:
    return Result(cell.case, Status.SKIPPED, reason="interrupted before its turn", required=cell.required)
