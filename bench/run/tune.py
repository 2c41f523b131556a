"""Searches the fastest setting of a model on a device, axis by axis.

Each setting is measured and compared with fp32.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.core import stats
from bench.core.axes import DTYPES, LAYOUTS
from bench.core.codec import plain
from bench.core.errors import BUDGET, PARTNER, Exit
from bench.core.result import Status, Tuning
from bench.gpu import choose_device
from bench.run import case_outcome, cases, compare, disturbance, judge_cases, recipe, suite_run
from bench.run import measure_cases as run_session
from provision.config import models, toml
from provision.core.errors import FirstlightError, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bench.core.result import Case, Result, Run
    from bench.core.stats import Summary
    from bench.run.measure_cases import Session
    from bench.run.request import BenchHost, Progress, RunRequest

BUDGETS = {"cpu": 300.0, "cuda": 240.0, "mps": 300.0}
# {kind of device: the values of the axis `attention` to try besides "sdpa"}. On a CPU torch has two kernels. "sliced"
# is left out, since it saves memory and takes more time.
_ATTENTIONS = {"cpu": ("flash", "eager"), "cuda": ("flash", "efficient", "cudnn", "eager"), "mps": ("eager",)}
_COMPILES = {"cpu": ("compiled",), "cuda": ("compiled", "compiled-graphs"), "mps": ()}
_MAX_BATCH = 64
_MEMORY_SHARE = 0.9  # a larger batch is tried if its predicted memory is below this share of the free memory
_MAX_DRIFT = 1.6  # a change of the machine's speed does not explain a larger ratio; 1.3 was seen on a shared host


@dataclass(frozen=True)
class TuneResult:
    """Hold the result of a search.

    `default`, `best`: the results of these settings as last measured. `tries`: the results of all settings. `run`: the
    stored run. `tuning`: the part of the run about the search.
    """

    default: Result
    best: Result
    tries: tuple[Result, ...]
    run: Run
    tuning: Tuning

    @property
    def exit(self) -> Exit:
        """Return exit code 5 if the result is doubtful, otherwise 0."""
        return Exit.NOT_JUDGED if self.tuning.doubt else Exit.GOOD


def tune(run_request: RunRequest, progress: Progress) -> TuneResult:
    """Search the fastest setting of one model; axes in `run_request.changes` are fixed and not searched.

    A setting is excluded if its numbers are out of tolerance, or if it crashes or needs too much memory. The default is
    fp32 and contiguous, as diffusers loads a model; on a CUDA device it is TF32, as torch's own convolutions compute.
    So the gain is rather too small than too large.

    Raises:
        SpecError: a name or a setting is unknown.
        FirstlightError: the default setting cannot be measured.
        BlockedError: the device, the interpreter or the disk cannot be used.
    """
    choose_device.check_name(run_request.device)
    (model,) = run_request.models
    cases.check_names([model], [])
    fixed = suite_run.settings(",".join(run_request.changes))
    for axis in ("model", "device"):
        if axis in fixed:
            raise SpecError(f"--set cannot change the {axis}. Use --{axis} instead.")
    bench = suite_run.find_bench(run_request)
    device = suite_run.choose_device(run_request, bench, progress)
    default = _default(model, device, fixed)
    session = run_session.Session(
        run_request, bench, run_request.budget_seconds or BUDGETS[device.partition(":")[0]], progress
    )
    with contextlib.closing(session):
        return _Search(session, bench, default, fixed).run()


def to_json(tuned: TuneResult) -> dict[str, Any]:
    """Return the result of a search with the types of JSON, as `bench tune --json` prints it."""
    default = stats.least_image_seconds(tuned.default)
    tries = [
        {
            "case": plain(result.case),
            "status": result.status.value,
            "reason": result.reason or judge_cases.exclusion_reason(result),
            "image_seconds": stats.least_image_seconds(result) if result.samples else None,
            "gain": default / stats.least_image_seconds(result) if result.samples else None,
            "forward_error": result.numerics.forward_error if result.numerics else None,
        }
        for result in tuned.tries
    ]
    return {
        "schema": 1,
        **plain(tuned.tuning),
        "tries": tries,
        "run": tuned.run.id,
        "exit": int(tuned.exit),
    }


def _default(model: str, device: str, fixed: Mapping[str, str]) -> Case:
    """Return the case with the settings with which diffusers loads the model, and a size that fits the device."""
    plain = {"dtype": "tf32" if device.startswith("cuda") else "fp32", "layout": "contiguous", "batch": "1"}
    return cases.change(cases.default_case(model, device), plain | dict(fixed))


@dataclass
class _Search:
    """Search one axis after another, each from the best setting so far."""

    session: Session
    bench: BenchHost
    default: Case
    fixed: Mapping[str, str]
    tries: dict[Case, Result] = field(default_factory=dict)
    best: Result = field(init=False)

    def run(self) -> TuneResult:
        """Measure the default, search, and then measure the default and the best setting again in turns."""
        first = self._measure(self.default, later=8)
        if first.status is not Status.OK:
            raise FirstlightError(
                f"the default setting cannot be measured ({first.status.value}: {first.cause}). "
                "Give a smaller --set size=… or --set steps=…, or a larger --budget."
            )
        self.best = first
        for stage in (self._precisions, self._attentions, self._compiles, self._batches):
            for case, later in stage(self.best.case):
                if case not in self.tries and self._is_faster(self._measure(case, later), later):
                    self.best = self.tries[case]
        if self.best.case == self.default:
            return self._finish(first, first, None)
        return self._confirmed(self.best)

    def _precisions(self, best: Case) -> Iterator[tuple[Case, int]]:
        """Yield (case, number of later tries) for each dtype in each memory format.

        A dtype that failed in one memory format is not tried in another.
        """
        dtypes = [name for name in DTYPES if name != "fp64" and (name != "tf32" or best.device.startswith("cuda"))]
        searched = [best.dtype] if "dtype" in self.fixed else dtypes
        layouts = [best.layout] if "layout" in self.fixed else LAYOUTS
        pairs = [(dtype, layout) for dtype in searched for layout in layouts]
        failed: set[str] = set()
        for number, (dtype, layout) in enumerate(pairs):
            case = replace(best, dtype=dtype, layout=layout)
            if dtype in failed:
                continue
            yield case, len(pairs) - number + 2
            if (result := self.tries.get(case)) is not None and result.status is not Status.OK:
                failed.add(dtype)

    def _attentions(self, best: Case) -> Iterator[tuple[Case, int]]:
        """Yield (case, number of later tries) for each attention that the device may have."""
        if "attention" not in self.fixed:
            kernels = _ATTENTIONS[best.device.partition(":")[0]]
            for number, attention in enumerate(kernels):
                yield replace(best, attention=attention), len(kernels) - number + 1

    def _compiles(self, best: Case) -> Iterator[tuple[Case, int]]:
        """Yield (case, number of later tries) for each mode of torch.compile, until one fails."""
        if "compile" not in self.fixed:
            for mode in _COMPILES[best.device.partition(":")[0]]:
                case = replace(best, compile=mode)
                yield case, 1
                if self.tries[case].status is not Status.OK:
                    return

    def _batches(self, best: Case) -> Iterator[tuple[Case, int]]:
        """Yield twice the batch of the last case, as long as that was faster per image and fits in memory."""
        batch = best.batch * 2
        while "batch" not in self.fixed and batch <= _MAX_BATCH and self._fits(self.best, batch):
            yield replace(best, batch=batch), 0
            if self.best.case.batch != batch:
                return
            batch *= 2

    def _fits(self, before: Result, batch: int) -> bool:
        """Return whether a batch fits in the host's memory, which is assumed to grow in proportion to the batch.

        It is not checked for a GPU, where a batch that is too large only raises an error.
        """
        if before.case.device.startswith("cuda") or before.memory.host_run_peak_bytes is None:
            return True
        import psutil

        predicted = before.memory.host_run_peak_bytes * batch / before.case.batch
        # psutil reports the memory of the machine; a container may be allowed less.
        available = min(psutil.virtual_memory().available, self.bench.machine.memory_bytes)
        return predicted < _MEMORY_SHARE * available

    def _measure(self, case: Case, later: int) -> Result:
        """Measure one setting within its share of the time; time for the final measurement in turns is reserved.

        `later`: the number of tries after this one.
        """
        self.session.prepare(case, later + 3)
        left = self.session.ends - time.monotonic() - self._reserve(case.batch)
        if case.compile != "eager":
            left /= 2  # the final measurement in turns compiles once more
        result = self.session.run_case(cases.Cell(case, find_max=False), left / (later + 1), left, f"  {case.name:<60}")
        self.tries[case] = result
        return result

    def _is_faster(self, candidate: Result, later: int) -> bool:
        """Return whether a setting has right numbers and is faster than the best one so far.

        If the speed of the machine changed between the two measurements, both are measured again in turns.
        """
        best = self.best
        if judge_cases.exclusion_reason(candidate) or disturbance.same_machine(candidate, best):
            return _beats(candidate, best)
        ratio = stats.least_image_seconds(candidate) / stats.least_image_seconds(best)
        if not 1 / _MAX_DRIFT < ratio < _MAX_DRIFT:
            return ratio < 1
        images = (
            stats.least_image_seconds(candidate) * candidate.case.batch
            + stats.least_image_seconds(best) * best.case.batch
        )
        needed = 2 * self.session.overhead(candidate.case) + (stats.FEWEST_PAIRS + 3) * images
        left = (self.session.ends - time.monotonic() - self._reserve(candidate.case.batch)) / (later + 1)
        if left < needed:
            return _beats(candidate, best)
        pythons = (self.bench.python, self.bench.python)
        label = f"  {', '.join(candidate.case.settings)} beside the best"
        pair = self.session.run_pair((best.case, candidate.case), pythons, needed, left, label)
        if not all(result.status is Status.OK for result in pair):
            return _beats(candidate, best)
        gain = compare.paired_ratio(pair[0], pair[1])
        # The interval of a few pairs is too wide to be sure. The final measurement in turns detects a wrong choice.
        is_sure = gain.high < 1 or compare.too_few_pairs(gain) is not None
        return is_sure and gain.median < 1 - compare.MIN_EFFECT

    def _reserve(self, batch: int) -> float:
        """Return the seconds of the final measurement in turns: the start of two processes, and the pairs needed."""
        first = self.tries.get(self.default)
        if first is None:
            return 0.0
        images = stats.least_image_seconds(first) * (self.default.batch + batch)
        return 2 * self.session.overhead(self.default) + (stats.FEWEST_PAIRS + 3) * images

    def _confirmed(self, best: Result) -> TuneResult:
        """Measure the default and the best setting in turns, and once more if that was disturbed and there is time."""
        first = self.tries[self.default]
        pair = self._pair(best, self.session.ends - time.monotonic(), "")
        faults = sorted(
            (result for result in pair if result.status is not Status.OK), key=lambda result: result.cause == PARTNER
        )
        if faults:
            fault = f"{faults[0].status.value}: {faults[0].cause}"
            return self._finish(first, best, None, doubt=f"the best setting could not be confirmed: {fault}")
        one, two = pair
        gain = compare.paired_ratio(two, one)
        if gain.low <= 1:
            note = f"{', '.join(best.case.settings)} looked faster, but measured in turns with the default it was not"
            return self._finish(one, one, None, notes=(note,))
        few = compare.too_few_pairs(gain)
        return self._finish(one, two, gain, doubt=_doubt(pair) or few)

    def _pair(self, best: Result, limit: float, again: str) -> list[Result]:
        self.session.prepare(best.case, 2)
        began = time.monotonic()
        both = (self.default, best.case)
        pythons = (self.bench.python, self.bench.python)
        measured = self.session.run_pair(both, pythons, limit, limit, f"  default / best{again}")
        pair = [case_outcome.with_comparison_of(result, self.tries[result.case]) for result in measured]
        took = time.monotonic() - began
        is_good = all(result.status is Status.OK for result in pair)
        if again or not (is_good and _doubt(pair)) or self.session.ends - time.monotonic() < took:
            return pair
        second = self._pair(best, took, ", again")
        is_better = all(result.status is Status.OK for result in second) and not _doubt(second)
        return second if is_better else pair

    def _finish(
        self, default: Result, best: Result, gain: Summary | None, doubt: str | None = None, notes: tuple[str, ...] = ()
    ) -> TuneResult:
        self.tries |= {default.case: default, best.case: best}
        tries = tuple(self.tries.values())
        untried = sum(self._is_untried(result) for result in tries)
        if untried:
            notes += (f"{untried} of {len(tries)} settings were not tried for lack of time. Use a larger --budget",)
        if best is default:
            doubt = doubt or _doubt(tries) or (notes[-1] if untried else None)
        manifest = toml.load_tables(self.bench.envs / "models.toml", models.ModelSpec)
        tuning = Tuning(
            default=default.case,
            best=best.case,
            gain=gain.median if gain else None,
            gain_low=gain.low if gain else None,
            gain_high=gain.high if gain else None,
            code=recipe.code(best.case, manifest),
            doubt=doubt,
            notes=notes,
        )
        return TuneResult(default, best, tries, self.session.keep(tries, tuning=tuning), tuning)

    def _is_untried(self, result: Result) -> bool:
        """Return whether a setting had no time, unless it is predicted to be slower than the default."""
        default_steps = stats.step_seconds(self.tries[self.default])
        predicted = result.work.predicted_step_seconds
        is_slower = default_steps is not None and predicted is not None and predicted > default_steps.median
        return result.status is Status.SKIPPED and BUDGET in (result.reason or "") and not is_slower


def _beats(candidate: Result, best: Result) -> bool:
    """Return whether a setting has right numbers and is faster than the best by more than the noise of a setting."""
    both = [summary for result in (candidate, best) if (summary := stats.image_seconds(result)) is not None]
    if judge_cases.exclusion_reason(candidate) or len(both) < 2:
        return False
    return both[0].minimum < both[1].minimum * (1 - max(compare.MIN_EFFECT, *(summary.spread for summary in both)))


def _doubt(pair: Iterable[Result]) -> str | None:
    return next((reason for result in pair if (reason := disturbance.of_case(result))), None)
