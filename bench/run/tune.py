"""The search for a model's fastest setting on a machine: axis by axis, every try measured and held against fp32."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.core import stats
from bench.core.axes import DTYPES, LAYOUTS
from bench.core.codec import plain
from bench.core.errors import BUDGET, PARTNER, Exit
from bench.core.result import Status, Tuning
from bench.gpu import choose_device
from bench.run import cases, compare, recipe, suite_run, verdict
from bench.run import session as run_session
from provision.config import models, toml
from provision.core.errors import FirstlightError, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bench.core.result import Case, Result, Run
    from bench.core.stats import Summary
    from bench.run.request import BenchHost, Progress, RunRequest
    from bench.run.session import Session

BUDGETS = {"cpu": 300.0, "cuda": 240.0, "mps": 300.0}
# What is worth a try beside torch's own choice. On a CPU torch has two kernels; sliced saves memory and costs time.
_ATTENTIONS = {"cpu": ("flash", "eager"), "cuda": ("flash", "efficient", "cudnn", "eager"), "mps": ("eager",)}
_COMPILES = {"cpu": ("compiled",), "cuda": ("compiled", "compiled-graphs"), "mps": ()}
_MOST_BATCH = 64
_ROOM = 0.9  # of the host's free memory that a larger batch may be predicted to take
_MOST_CHANGE = 1.6  # no change of a machine that we saw made a case so much slower (1.3 times, on a shared one)


@dataclass(frozen=True)
class TuneResult:
    """What was found: `default` and `best` as they were last measured, every try, and the run that keeps them."""

    default: Result
    best: Result
    tries: tuple[Result, ...]
    run: Run
    tuning: Tuning

    @property
    def exit(self) -> Exit:
        """5 where what was found is not to be believed."""
        return Exit.NOT_JUDGED if self.tuning.doubt else Exit.GOOD


def tune(run_request: RunRequest, progress: Progress) -> TuneResult:
    """Search the fastest setting of one model; what `run_request.changes` names is given, and not searched.

    Numbers out of tolerance, a crash or too little memory rule a setting out. The default is fp32 and contiguous, as
    diffusers loads a model; on a card with TF32 where it has it, as torch's own convolutions do, so that the gain is
    rather too small than too large.

    Raises:
        SpecError: a name or a setting is wrong.
        FirstlightError: the default itself cannot be measured.
        BlockedError: the device, the interpreter or the disk cannot be used.
    """
    choose_device.check_name(run_request.device)
    (model,) = run_request.models
    cases.check_picks([model], [])
    given = suite_run.settings(",".join(run_request.changes))
    for axis in ("model", "device"):
        if axis in given:
            raise SpecError(f"--set {axis}=…: the {axis} is named by --{axis}.")
    bench = suite_run.find_bench(run_request)
    chosen = suite_run.choose_device(run_request, bench, progress)
    default = _default(model, chosen, given)
    begun = run_session.Session(
        run_request, bench, run_request.budget_seconds or BUDGETS[chosen.partition(":")[0]], progress
    )
    search = _Search(begun, bench, default, given)
    return search.run()


def told(found: TuneResult) -> dict[str, Any]:
    """What was found, as JSON's own types."""
    default = stats.least_image_seconds(found.default)
    tries = [
        {
            "case": plain(each.case),
            "status": each.status.value,
            "reason": each.reason or verdict.ruled_out(each),
            "image_seconds": stats.least_image_seconds(each) if each.samples else None,
            "gain": default / stats.least_image_seconds(each) if each.samples else None,
            "forward_error": each.numerics.forward_error if each.numerics else None,
        }
        for each in found.tries
    ]
    return {
        "schema": 1,
        **plain(found.tuning),
        "tries": tries,
        "run": found.run.id,
        "exit": int(found.exit),
    }


def _default(model: str, chosen: str, given: Mapping[str, str]) -> Case:
    """The model as diffusers loads it, in a size that fits the device."""
    plain = {"dtype": "tf32" if chosen.startswith("cuda") else "fp32", "layout": "contiguous", "batch": "1"}
    return cases.change(cases.usual(model, chosen), plain | dict(given))


@dataclass
class _Search:
    """One axis after another, from the best setting that is known."""

    session: Session
    bench: BenchHost
    default: Case
    given: Mapping[str, str]
    tries: dict[Case, Result] = field(default_factory=dict)
    best: Result = field(init=False)

    def run(self) -> TuneResult:
        """Measure the default, search, and measure the best against the default once more, image by image."""
        first = self._measure(self.default, later=8)
        if first.status is not Status.OK:
            raise FirstlightError(
                f"the default itself cannot be measured ({first.status.value}: {first.cause}). "
                "Give a smaller --set size=… or --set steps=…, or a larger --budget."
            )
        self.best = first
        for stage in (self._precisions, self._attentions, self._compiles, self._batches):
            for case, later in stage(self.best.case):
                if case not in self.tries and self._is_faster(self._measure(case, later), later):
                    self.best = self.tries[case]
        if self.best.case == self.default:
            return self._told(first, first, None)
        return self._confirmed(self.best)

    def _precisions(self, best: Case) -> Iterator[tuple[Case, int]]:
        """Every dtype in every layout; a dtype that cannot be is not tried in a second layout."""
        dtypes = [name for name in DTYPES if name != "fp64" and (name != "tf32" or best.device.startswith("cuda"))]
        wanted = [best.dtype] if "dtype" in self.given else dtypes
        layouts = [best.layout] if "layout" in self.given else LAYOUTS
        pairs = [(dtype, layout) for dtype in wanted for layout in layouts]
        ruled_out: set[str] = set()
        for number, (dtype, layout) in enumerate(pairs):
            case = replace(best, dtype=dtype, layout=layout)
            if dtype in ruled_out:
                continue
            yield case, len(pairs) - number + 2
            if (found := self.tries.get(case)) is not None and found.status is not Status.OK:
                ruled_out.add(dtype)

    def _attentions(self, best: Case) -> Iterator[tuple[Case, int]]:
        if "attention" not in self.given:
            known = _ATTENTIONS[best.device.partition(":")[0]]
            for number, attention in enumerate(known):
                yield replace(best, attention=attention), len(known) - number + 1

    def _compiles(self, best: Case) -> Iterator[tuple[Case, int]]:
        if "compile" not in self.given:
            for mode in _COMPILES[best.device.partition(":")[0]]:
                case = replace(best, compile=mode)
                yield case, 1
                if self.tries[case].status is not Status.OK:
                    return

    def _batches(self, best: Case) -> Iterator[tuple[Case, int]]:
        """Twice as many images at once, as long as that is faster an image and will fit."""
        batch = best.batch * 2
        while "batch" not in self.given and batch <= _MOST_BATCH and self._fits(self.best, batch):
            yield replace(best, batch=batch), 0
            if self.best.case.batch != batch:
                return
            batch *= 2

    def _fits(self, before: Result, batch: int) -> bool:
        """Whether a batch will fit the host's memory, as if all that it takes grew with it. A card says so itself."""
        if before.case.device.startswith("cuda") or before.memory.host_run_peak_bytes is None:
            return True
        import psutil

        predicted = before.memory.host_run_peak_bytes * batch / before.case.batch
        room = min(psutil.virtual_memory().available, self.bench.machine.memory_bytes)  # a container may grant less
        return predicted < _ROOM * room

    def _measure(self, case: Case, later: int) -> Result:
        """One try, with its share of the time that the confirmation does not need."""
        left = self.session.ends - time.monotonic() - self._reserve(case.batch)
        if case.compile != "eager":
            left /= 2  # the confirmation compiles once more
        found = self.session.one(cases.Cell(case, find_max=False), left / (later + 1), left, f"  {case.name:<60}")
        self.tries[case] = found
        return found

    def _is_faster(self, found: Result, later: int) -> bool:
        """Whether a try is right, and faster than the best; in turns, where the machine was not the same for both."""
        best = self.best
        if verdict.ruled_out(found) or verdict.same_machine(found, best):
            return _beats(found, best)
        ratio = stats.least_image_seconds(found) / stats.least_image_seconds(best)
        if not 1 / _MOST_CHANGE < ratio < _MOST_CHANGE:
            return ratio < 1
        images = stats.least_image_seconds(found) * found.case.batch + stats.least_image_seconds(best) * best.case.batch
        needed = 2 * self.session.overhead(found.case) + (stats.FEWEST_PAIRS + 3) * images
        left = (self.session.ends - time.monotonic() - self._reserve(found.case.batch)) / (later + 1)
        if left < needed:
            return _beats(found, best)
        pythons = (self.bench.python, self.bench.python)
        where = f"  {', '.join(found.case.settings)} beside the best"
        pair = self.session.pair((best.case, found.case), pythons, needed, left, where)
        if not all(each.status is Status.OK for each in pair):
            return _beats(found, best)
        gain = compare.paired_ratio(pair[0], pair[1])
        # Of a few pairs the interval is wide; what is taken wrongly here the confirmation finds out.
        is_sure = gain.high < 1 or compare.too_few(gain) is not None
        return is_sure and gain.median < 1 - compare.LEAST_EFFECT

    def _reserve(self, batch: int) -> float:
        """Seconds for the confirmation: two processes, and as many pairs as an interval needs."""
        first = self.tries.get(self.default)
        if first is None:
            return 0.0
        images = stats.least_image_seconds(first) * (self.default.batch + batch)
        return 2 * self.session.overhead(self.default) + (stats.FEWEST_PAIRS + 3) * images

    def _confirmed(self, best: Result) -> TuneResult:
        """The default and the best, image by image in turns; again where that was disturbed and time is left."""
        first = self.tries[self.default]
        pair = self._pair(best, self.session.ends - time.monotonic(), "")
        faults = sorted((each for each in pair if each.status is not Status.OK), key=lambda each: each.cause == PARTNER)
        if faults:
            fault = f"{faults[0].status.value}: {faults[0].cause}"
            return self._told(first, best, None, doubt=f"it could not be confirmed, {fault}")
        one, two = pair
        gain = compare.paired_ratio(two, one)
        if gain.low <= 1:
            seemed = f"{', '.join(best.case.settings)} seemed faster, and was not when both were made in turns"
            return self._told(one, one, None, notes=(seemed,))
        few = compare.too_few(gain)
        return self._told(one, two, gain, doubt=_doubt(pair) or few)

    def _pair(self, best: Result, limit: float, again: str) -> list[Result]:
        began = time.monotonic()
        both = (self.default, best.case)
        pythons = (self.bench.python, self.bench.python)
        found = self.session.pair(both, pythons, limit, limit, f"  default / best{again}")
        pair = [run_session.compared_as(result, self.tries[result.case]) for result in found]
        took = time.monotonic() - began
        is_good = all(each.status is Status.OK for each in pair)
        if again or not (is_good and _doubt(pair)) or self.session.ends - time.monotonic() < took:
            return pair
        second = self._pair(best, took, ", again")
        is_better = all(each.status is Status.OK for each in second) and not _doubt(second)
        return second if is_better else pair

    def _told(
        self, default: Result, best: Result, gain: Summary | None, doubt: str | None = None, notes: tuple[str, ...] = ()
    ) -> TuneResult:
        self.tries |= {default.case: default, best.case: best}
        tries = tuple(self.tries.values())
        untried = sum(self._is_untried(each) for each in tries)
        if untried:
            notes += (f"{untried} of {len(tries)} settings were not tried for want of time: give a larger --budget",)
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

    def _is_untried(self, found: Result) -> bool:
        """Whether a try was left out for want of time, though it is not known to be slower than the default."""
        usual = stats.step_seconds(self.tries[self.default])
        predicted = found.work.predicted_step_seconds
        is_slower = usual is not None and predicted is not None and predicted > usual.median
        return found.status is Status.SKIPPED and BUDGET in (found.reason or "") and not is_slower


def _beats(found: Result, best: Result) -> bool:
    """Whether a try is right, and faster by more than two tries of one setting differ."""
    both = [summary for each in (found, best) if (summary := stats.image_seconds(each)) is not None]
    if verdict.ruled_out(found) or len(both) < 2:
        return False
    return both[0].minimum < both[1].minimum * (1 - max(compare.LEAST_EFFECT, *(each.spread for each in both)))


def _doubt(pair: Iterable[Result]) -> str | None:
    return next((found for each in pair if (found := verdict.contended(each))), None)
