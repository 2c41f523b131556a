"""Validates a host: every device by itself, then all at once, then the same again for as long as is wished."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.core.protocol import Linking
from bench.core.validation_records import PROCESS, Reading, Validation
from bench.gpu import choose_device, diagnosis
from bench.gpu.device_nodes import NUMBERED
from bench.launch import worker_process
from bench.run import session, suite_run, verdict
from bench.validate import history, judge
from bench.validate.device import AGAIN_SHARE, GRACE_SECONDS, START_SECONDS, DeviceExamination
from bench.validate.expectations import TOGETHER, Evidence, shown
from bench.validate.rule_checks import is_wrong
from provision.core import layout
from provision.core.errors import BlockedError, FirstlightError, SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from bench.core.result import Run
    from bench.run.request import BenchHost, Progress, RunRequest

SUITE = "validate"
_BUDGET_SECONDS = 60.0  # of one device: an answer within a minute
_LATER_SECONDS = 40.0  # for each other one
_TOGETHER_SECONDS = 20.0
_LINKS_SECONDS = 12.0
_AT_ONCE = ("product", "pinned", "sustained", "loop")  # what all devices take from their host at the same time
_ROUND = ("product", "copy", "memory", "sustained")
_ROUND_SECONDS = 30.0
_HEED_SECONDS = 0.5  # as often as a worker is looked at
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


@dataclass(frozen=True)
class HostValidation:
    """A validation, and all that are on the volume, this one at last.

    `interrupted`: its soak was ended before its time. `notes`: what else is to be said.
    """

    run: Run
    kept: tuple[Run, ...]
    interrupted: bool = False
    notes: tuple[str, ...] = ()


def validate(run_request: RunRequest, progress: Progress, *, soak_seconds: float | None = None) -> HostValidation:
    """Validate the devices that are wished for: with "auto" every card, and the CPU where there is none.

    Args:
        run_request: where and what; its budget is for the plan without a soak.
        progress: is told what happens.
        soak_seconds: for how long the same is asked again afterwards.

    Raises:
        SpecError: no such device.
        BlockedError: the interpreter, a device that is named or the disk cannot be used.
    """
    choose_device.check_name(run_request.device)
    if run_request.device == "mps":
        raise SpecError("bench validate knows cpu and cuda; for an Apple GPU: bench run --device mps.")
    bench = suite_run.find_bench(run_request)
    began = time.monotonic()
    found = worker_process.query(bench.python)
    chosen = _choose(run_request.device, bench, found)
    budget = run_request.budget_seconds or _BUDGET_SECONDS + _LATER_SECONDS * (len(chosen.devices) - 1)
    begun = session.Session(replace(run_request, suite=SUITE), bench, budget, progress, began=began)
    kept = history.load(bench.root.validations)
    known = Evidence((), (), own=history.bests(kept.runs, str(found.get("torch"))))
    asking = time.monotonic() - began
    examination = _Examination(bench, progress, plan_seconds(budget - asking, len(chosen.devices)), chosen, known)
    validation = examination.run(soak_seconds)
    run = begun.keep((), validation=validation)
    notes = [f"passed over: {why}" for why in kept.unread]
    try:
        history.keep(run, bench.root.validations)
    except FirstlightError as error:  # whatever is wrong there, the run itself is kept
        notes.append(f"not kept on the volume: {error}")
    return HostValidation(run, (*kept.runs, run), examination.is_interrupted, tuple(notes))


def plan_seconds(budget: float, devices: int) -> float:
    """Seconds for the plan of each device, all alike: cards that are held against each other were asked for as long.

    Args:
        budget: of all, without what comes after them; a part stays for what is asked again.
        devices: how many there are.
    """
    later = _TOGETHER_SECONDS + _LINKS_SECONDS if devices > 1 else 0.0
    return max(START_SECONDS, (budget - later) / max(1, devices) / (1 + AGAIN_SHARE))


def soak(text: str | None) -> float | None:
    """Seconds of a time as people write it: 90s, 30m, 1.5h.

    Raises:
        SpecError: it is none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None or not float(found.group(1)):
        raise SpecError(f"--soak {text}: a time, such as 30m, 90s or 1.5h.")
    return float(found.group(1)) * _UNITS[found.group(2)]


@dataclass(frozen=True)
class _Selection:
    """{device: (its name, its uuid)} of those that are examined; {device: why torch cannot use it}."""

    devices: dict[str, tuple[str, str | None]]
    unusable: dict[str, str] = field(default_factory=dict)


def _choose(wanted: str, bench: BenchHost, found: dict[str, Any]) -> _Selection:
    site = diagnosis.inspect_machine(bench.machine, bench.envs)
    if wanted not in {"auto", "cpu"}:
        name = choose_device.choose(wanted, site, found)
        return _Selection({name: _named(found["devices"][int(name.partition(":")[2])])})
    if "error" in found:
        verify = layout.next_command("verify")
        raise BlockedError(f"the environment's torch does not start. Run `{verify}`. It said:\n{found['error']}")
    cards = {f"cuda:{index}": _named(each) for index, each in enumerate(found["devices"])}
    has_cards = bool(cards or bench.machine.gpus or site.visibility.on_bus or site.visibility.loaded)
    if wanted == "cpu" or not has_cards:
        return _Selection({"cpu": (bench.machine.cpu, None)})
    faults = {name: diagnosis.diagnose(site, found, index) for index, name in enumerate(cards or ["cuda"])}
    unusable = {name: why.text for name, why in faults.items() if why is not None}
    usable = {name: told for name, told in cards.items() if name not in unusable}
    nodes = [node.name for node in site.visibility.nodes if NUMBERED.fullmatch(node.name) and node.fault is None]
    if (
        len(nodes) > len(cards) > 0
        and site.visibility.visible is None
        and not any("MIG" in name for name, _ in cards.values())
    ):
        unusable["cuda"] = (
            f"{len(nodes)} cards have a node that opens, and torch sees {len(cards)}: `nvidia-smi` and "
            "`sudo dmesg | grep -i xid` tell which of them was lost"
        )
    return _Selection(usable, unusable)


def _named(told: dict[str, Any]) -> tuple[str, str | None]:
    return str(told["name"]), str(told.get("uuid") or "") or None


class _Examination:
    """All devices of a validation, from the first question to the verdict."""

    def __init__(self, bench: BenchHost, progress: Progress, plan: float, chosen: _Selection, known: Evidence) -> None:
        self._bench, self._progress, self._plan, self._chosen = bench, progress, plan, chosen
        machine = bench.machine
        self._known = replace(known, cores=machine.cores, cpu_quota=machine.cpu_quota, unusable=chosen.unusable)
        self._checkups: list[DeviceExamination] = []
        self._seconds: dict[str, float] = {}
        self.readings: list[Reading] = []
        self.is_interrupted = False

    def run(self, soak_seconds: float | None) -> Validation:
        """Ask, judge, and say all that was found."""
        soaked = None
        with contextlib.ExitStack() as stack:
            # One pool for all of it: the kernel ends a worker with the thread that has started it.
            pool = stack.enter_context(ThreadPoolExecutor(max(1, len(self._chosen.devices))))
            for name, (title, uuid) in self._chosen.devices.items():
                checkup = stack.enter_context(DeviceExamination(self._bench, name, title, uuid))
                self._checkups.append(checkup)
                self._one(checkup)
            if len(self._checkups) > 1:
                self._together(pool)
            if soak_seconds is not None and self._checkups:
                soaked = self._soak(pool, soak_seconds)
            for checkup in self._checkups:
                checkup.finish()
            # Last: a card may let one process in alone.
            if len(self._checkups) > 1 and not self.is_interrupted:
                self._links()
        return self._told(soaked)

    def _one(self, checkup: DeviceExamination) -> None:
        self._progress.begin(f"  {checkup.device:<8} {checkup.before.name}")
        checkup.examine(self._plan, self._with_host)
        self.readings += checkup.readings
        self._progress.say(f"  {checkup.device:<8} {_gist(checkup.readings)}")

    def _with_host(self, of_device: Evidence) -> Evidence:
        known = self._known
        return replace(of_device, own=known.own, cores=known.cores, cpu_quota=known.cpu_quota)

    def _together(self, pool: ThreadPoolExecutor) -> None:
        """All devices at once: whether the host feeds them."""
        self._progress.begin("  all at once")
        began = time.monotonic()
        found = self._at_once(pool, _AT_ONCE, _TOGETHER_SECONDS)
        if self.is_interrupted:
            raise KeyboardInterrupt
        # A worker's end is a fault of its phase, as it would be alone.
        self.readings += [replace(each, probe=TOGETHER) if each.fault is None else each for each in found]
        self._seconds[TOGETHER] = time.monotonic() - began
        self._progress.say(f"  all at once {_gist(found)}")

    def _links(self) -> None:
        """What goes from device to device."""
        names = tuple(checkup.device for checkup in self._checkups)
        self._progress.begin("  from device to device")
        began = time.monotonic()
        found = self._linked(names)
        if any(is_wrong(reading) for reading in found):
            found = judge.merged(found, self._linked(names))
        self.readings += found
        self._seconds["links"] = time.monotonic() - began
        self._progress.say(f"  from device to device {_gist(found)}")

    def _linked(self, names: tuple[str, ...]) -> tuple[Reading, ...]:
        request = Linking(names, time.time(), _LINKS_SECONDS)
        with worker_process.Worker(request, self._bench.python, self._bench.root.hub_in_use) as worker:
            worker.listen(time.monotonic() + _LINKS_SECONDS + GRACE_SECONDS)
        found = tuple(worker.received.readings)
        if worker.received.answer is not None:
            return found
        return (*found, Reading("links", "links", names[0], "", None, fault=worker.fault()))

    def _soak(self, pool: ThreadPoolExecutor, seconds: float) -> float:
        """Round after round until the time is over, or somebody has seen enough. Returns how long it was."""
        began, number = time.monotonic(), 0
        while time.monotonic() - began < seconds and any(checkup.is_alive for checkup in self._checkups):
            number += 1
            self._progress.begin(f"  round {number}")
            found = self._at_once(pool, _ROUND, _ROUND_SECONDS)
            # The raw samples of hours would fill a disk; the plan before has kept its own.
            self.readings += [replace(each, round=number, samples=()) for each in found]
            if self.is_interrupted:
                self._progress.say("  interrupted: what was found until now is judged")
                break
            left = max(0.0, seconds - (time.monotonic() - began))
            self._progress.say(f"  round {number}, {left:.0f} s left: {_gist(found)}{self._errors()}")
        return time.monotonic() - began

    def _errors(self) -> str:
        """What the drivers have counted since the beginning, where they have."""
        told = ""
        for checkup in self._checkups:
            now, before = checkup.card(), checkup.before
            grown = (now.ecc_corrected or 0) - (before.ecc_corrected or 0)
            lost = (now.ecc_uncorrected or 0) - (before.ecc_uncorrected or 0)
            told += f"; {checkup.device}: {grown} memory errors corrected" if grown else ""
            told += f"; {checkup.device}: {lost} memory errors not corrected" if lost else ""
            told += f"; {checkup.device}: XID {', '.join(map(str, now.xids))}" if now.xids else ""
        return told

    def _at_once(self, pool: ThreadPoolExecutor, phases: Sequence[str], seconds: float) -> list[Reading]:
        """Each device whose worker lives, in a thread that listens to it; what was heard until an interrupt, too."""
        alive = [checkup for checkup in self._checkups if checkup.is_alive]
        found: dict[str, list[Reading]] = {}

        def ask(checkup: DeviceExamination) -> None:
            found[checkup.device] = checkup.go_on(phases, seconds)

        told: list[Future[None]] = []
        # An interrupt before the wait would stop some devices that were never asked. The mask is this thread's alone:
        # where another one takes the signal, Python raises it here at any time, so each thread tells its end by itself.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            told.extend(pool.submit(ask, checkup) for checkup in alive)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            while wait(told, _HEED_SECONDS).not_done:
                pass  # Python heeds a signal that another thread has taken between two waits alone
        except KeyboardInterrupt:
            self.is_interrupted = True
            for checkup in alive:
                checkup.stop()
            pool.shutdown()  # also the one whose future an interrupt has kept from us
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for each in told:
            each.result()  # a fault of ours in a thread is raised here
        readings = [reading for checkup in alive for reading in found.get(checkup.device, [])]
        # Whom we have ended ourselves has not died.
        return [each for each in readings if each.name != PROCESS] if self.is_interrupted else readings

    def _told(self, soaked: float | None) -> Validation:
        checkups = self._checkups
        phases = {name for checkup in checkups for name in checkup.seconds}
        longest = {name: max(checkup.seconds.get(name, 0.0) for checkup in checkups) for name in phases}
        hosts = {checkup.device: checkup.host for checkup in checkups if checkup.host is not None}
        # A card works by itself once it was told: what else its host does is no reason to doubt it.
        crowds = {name: verdict.crowded(host, name) for name, host in hosts.items() if name == "cpu"}
        validation = Validation(
            cards=tuple(checkup.card() for checkup in checkups),
            before=tuple(checkup.before for checkup in checkups),
            readings=tuple(self.readings),
            judgements=(),
            seconds={name: round(took, 3) for name, took in sorted((longest | self._seconds).items())},
            watched={checkup.device: gpu for checkup in checkups if (gpu := checkup.watched) is not None},
            disturbed={name: why for name, why in crowds.items() if why is not None},
            software=next((checkup.software for checkup in checkups if checkup.software), {}),
            soak_seconds=round(soaked, 1) if soaked is not None else None,
        )
        evidence = replace(
            self._known,
            cards=validation.cards,
            before=validation.before,
            readings=validation.readings,
            watched=validation.watched,
            disturbed=validation.disturbed,
            hosts=hosts,
        )
        return replace(validation, judgements=judge.judge(evidence))


def _gist(readings: Sequence[Reading]) -> str:
    """What was found, in a line: what is wrong, else the figures that tell most."""
    wrong = [f"{each.device} {each.name}: {(each.fault or '').splitlines()[0]}" for each in readings if each.fault]
    if wrong:
        return "; ".join(wrong)
    best: dict[str, Reading] = {}
    for each in readings:
        if each.value and each.unit in {"FLOP/s", "B/s"}:
            held = best.get(each.probe)
            best[each.probe] = each if held is None or each.value > (held.value or 0.0) else held
    return ", ".join(f"{each.name} {shown(each.value or 0.0, each.unit)}" for each in best.values()) or "no figure"
