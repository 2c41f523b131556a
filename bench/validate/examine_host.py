"""Validates a host: examines each device alone, then all at once, and repeats phases for the time of a soak."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.core.validation_records import PROCESS, Reading, Validation
from bench.core.worker_requests import LinkTest
from bench.gpu import choose_device, diagnosis
from bench.gpu.device_nodes import NUMBERED
from bench.launch import worker_process
from bench.run import disturbance, measure_cases, suite_run
from bench.validate import history, judge, merge_readings
from bench.validate.examine_device import AGAIN_SHARE, GRACE_SECONDS, START_SECONDS, DeviceExamination
from bench.validate.expectations import TOGETHER, Evidence, shown
from bench.validate.reading_checks import is_wrong
from provision.core import layout
from provision.core.errors import BlockedError, FirstlightError, SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from bench.core.result import Run
    from bench.run.request import BenchHost, Progress, RunRequest

SUITE = "validate"
_BUDGET_SECONDS = 60.0  # the default time budget with one device
_LATER_SECONDS = 40.0  # the default time budget grows by this for each further device
_TOGETHER_SECONDS = 20.0
_LINKS_SECONDS = 12.0
# The phases that run on all devices at the same time.
_AT_ONCE = ("product", "pinned", "sustained", "loop")
_ROUND = ("product", "copy", "memory", "sustained")
_ROUND_SECONDS = 30.0
_WAIT_SECONDS = 0.5  # the interval at which workers are polled, too
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


@dataclass(frozen=True)
class HostValidation:
    """Hold the run of a validation, and all validations on the volume (`kept`) including this one.

    `interrupted`: the user ended the soak before its time. `notes`: further messages for the user.
    """

    run: Run
    kept: tuple[Run, ...]
    interrupted: bool = False
    notes: tuple[str, ...] = ()


def validate(run_request: RunRequest, progress: Progress, *, soak_seconds: float | None = None) -> HostValidation:
    """Validate the requested device; "auto" means every GPU, or the CPU if there is no GPU.

    Args:
        run_request: the request; its budget does not include the soak.
        progress: shows the progress to the user.
        soak_seconds: the time for which phases are repeated afterwards; None for no soak.

    Raises:
        SpecError: the device name is not valid, or is mps.
        BlockedError: the interpreter, a requested device or the disk cannot be used.
    """
    choose_device.check_name(run_request.device)
    if run_request.device == "mps":
        raise SpecError("bench validate supports cpu and cuda only. For an Apple GPU: bench run --device mps.")
    bench = suite_run.find_bench(run_request)
    began = time.monotonic()
    query = worker_process.query(bench.python)
    selection = _choose(run_request.device, bench, query)
    budget = run_request.budget_seconds or _BUDGET_SECONDS + _LATER_SECONDS * (len(selection.devices) - 1)
    run_session = measure_cases.Session(replace(run_request, suite=SUITE), bench, budget, progress, began=began)
    kept = history.load(bench.root.validations)
    host_evidence = Evidence((), (), own=history.best_figures(kept.runs, str(query.get("torch"))))
    query_seconds = time.monotonic() - began
    examination = _HostExamination(
        bench, progress, plan_seconds(budget - query_seconds, len(selection.devices)), selection, host_evidence
    )
    validation = examination.run(soak_seconds)
    run = run_session.keep((), validation=validation)
    notes = [f"skipped: {reason}" for reason in kept.unread]
    try:
        history.keep(run, bench.root.validations)
    except FirstlightError as error:  # the run is stored in its own folder already
        notes.append(f"the validation is not stored on the volume: {error}")
    return HostValidation(run, (*kept.runs, run), examination.is_interrupted, tuple(notes))


def plan_seconds(budget: float, devices: int) -> float:
    """Return the seconds for the phases of one device.

    They are equal for all devices, since GPUs that had different times cannot be compared.

    Args:
        budget: the seconds for all devices; a part is reserved for repeated phases, and for the phases with all
            devices.
        devices: the number of devices.
    """
    later = _TOGETHER_SECONDS + _LINKS_SECONDS if devices > 1 else 0.0
    return max(START_SECONDS, (budget - later) / max(1, devices) / (1 + AGAIN_SHARE))


def parse_soak(text: str | None) -> float | None:
    """Return the seconds of a text such as "90s", "30m" or "1.5h"; None for None.

    Raises:
        SpecError: the text is not a time.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or not float(match.group(1)):
        raise SpecError(f"--soak {text} is not a time above 0. Give a time such as 30m, 90s or 1.5h.")
    return float(match.group(1)) * _UNITS[match.group(2)]


@dataclass(frozen=True)
class _Selection:
    """Hold the devices to examine, {device: (name, uuid)}, and the unusable ones, {device: why torch cannot use it}."""

    devices: dict[str, tuple[str, str | None]]
    unusable: dict[str, str] = field(default_factory=dict)


def _choose(requested: str, bench: BenchHost, query: dict[str, Any]) -> _Selection:
    machine = diagnosis.inspect_machine(bench.machine, bench.envs)
    if requested not in {"auto", "cpu"}:
        name = choose_device.choose(requested, machine, query)
        return _Selection({name: _name_and_uuid(query["devices"][int(name.partition(":")[2])])})
    if "error" in query:
        verify = layout.next_command("verify")
        raise BlockedError(f"the environment's torch does not start. Run `{verify}`. Its error:\n{query['error']}")
    cards = {f"cuda:{index}": _name_and_uuid(described) for index, described in enumerate(query["devices"])}
    has_cards = bool(cards or bench.machine.gpus or machine.visibility.on_bus or machine.visibility.loaded)
    if requested == "cpu" or not has_cards:
        return _Selection({"cpu": (bench.machine.cpu, None)})
    faults = {name: diagnosis.diagnose(machine, query, index) for index, name in enumerate(cards or ["cuda"])}
    unusable = {name: cause.text for name, cause in faults.items() if cause is not None}
    usable = {name: identity for name, identity in cards.items() if name not in unusable}
    nodes = [node.name for node in machine.visibility.nodes if NUMBERED.fullmatch(node.name) and node.fault is None]
    if (
        len(nodes) > len(cards) > 0
        and machine.visibility.visible is None
        and not any("MIG" in name for name, _ in cards.values())
    ):
        unusable["cuda"] = (
            f"{len(nodes)} cards have a device node that can be opened, but torch lists {len(cards)}. `nvidia-smi` and "
            "`sudo dmesg | grep -i xid` show which card has failed"
        )
    return _Selection(usable, unusable)


def _name_and_uuid(described: dict[str, Any]) -> tuple[str, str | None]:
    return str(described["name"]), str(described.get("uuid") or "") or None


class _HostExamination:
    """Examine all devices of a host, and judge them."""

    def __init__(
        self,
        bench: BenchHost,
        progress: Progress,
        seconds_per_device: float,
        selection: _Selection,
        host_evidence: Evidence,
    ) -> None:
        self._bench, self._progress = bench, progress
        self._seconds_per_device, self._selection = seconds_per_device, selection
        machine = bench.machine
        self._host_evidence = replace(
            host_evidence, cores=machine.cores, cpu_quota=machine.cpu_quota, unusable=selection.unusable
        )
        self._examinations: list[DeviceExamination] = []
        self._seconds: dict[str, float] = {}
        self.readings: list[Reading] = []
        self.is_interrupted = False

    def run(self, soak_seconds: float | None) -> Validation:
        """Examine the devices, and return all readings with the judgements."""
        soaked = None
        with contextlib.ExitStack() as stack:
            # The threads live until the end, since the kernel kills a worker when the thread that started it ends.
            pool = stack.enter_context(ThreadPoolExecutor(max(1, len(self._selection.devices))))
            for name, (model, uuid) in self._selection.devices.items():
                examination = stack.enter_context(DeviceExamination(self._bench, name, model, uuid))
                self._examinations.append(examination)
                self._examine_one(examination)
            if len(self._examinations) > 1:
                self._together(pool)
            if soak_seconds is not None and self._examinations:
                soaked = self._soak(pool, soak_seconds)
            for examination in self._examinations:
                examination.finish()
            # The links come last: a GPU in exclusive mode admits one process, so its worker must have ended.
            if len(self._examinations) > 1 and not self.is_interrupted:
                self._links()
        return self._validation(soaked)

    def _examine_one(self, examination: DeviceExamination) -> None:
        self._progress.begin(f"  {examination.device:<8} {examination.before.name}")
        examination.examine(self._seconds_per_device, self._with_host)
        self.readings += examination.readings
        self._progress.report(f"  {examination.device:<8} {_summary_line(examination.readings)}")

    def _with_host(self, of_device: Evidence) -> Evidence:
        host = self._host_evidence
        return replace(of_device, own=host.own, cores=host.cores, cpu_quota=host.cpu_quota)

    def _together(self, pool: ThreadPoolExecutor) -> None:
        """Run some phases on all devices at the same time, which shows whether the host limits them."""
        self._progress.begin("  all at once")
        began = time.monotonic()
        readings = self._at_once(pool, _AT_ONCE, _TOGETHER_SECONDS)
        if self.is_interrupted:
            raise KeyboardInterrupt
        # A reading with a fault (the end of a worker, too) keeps its phase.
        self.readings += [
            replace(reading, probe=TOGETHER) if reading.fault is None else reading for reading in readings
        ]
        self._seconds[TOGETHER] = time.monotonic() - began
        self._progress.report(f"  all at once {_summary_line(readings)}")

    def _links(self) -> None:
        """Test the links between the devices; if a reading is wrong, test them once more."""
        names = tuple(examination.device for examination in self._examinations)
        self._progress.begin("  links between devices")
        began = time.monotonic()
        readings = self._link_readings(names)
        if any(is_wrong(reading) for reading in readings):
            readings = merge_readings.merge(readings, self._link_readings(names))
        self.readings += readings
        self._seconds["links"] = time.monotonic() - began
        self._progress.report(f"  links between devices {_summary_line(readings)}")

    def _link_readings(self, names: tuple[str, ...]) -> tuple[Reading, ...]:
        request = LinkTest(names, time.time(), _LINKS_SECONDS)
        with worker_process.Worker(request, self._bench.python, self._bench.root.hub_in_use) as worker:
            worker.listen(time.monotonic() + _LINKS_SECONDS + GRACE_SECONDS)
        readings = tuple(worker.received.readings)
        if worker.received.answer is not None:
            return readings
        return (*readings, Reading("links", "links", names[0], "", None, fault=worker.fault()))

    def _soak(self, pool: ThreadPoolExecutor, seconds: float) -> float:
        """Repeat rounds of phases until the time is over or the user interrupts; return the seconds that this took."""
        began, number = time.monotonic(), 0
        while time.monotonic() - began < seconds and any(examination.is_alive for examination in self._examinations):
            number += 1
            self._progress.begin(f"  round {number}")
            readings = self._at_once(pool, _ROUND, _ROUND_SECONDS)
            # The raw samples of hours would fill the disk; those of the examination before the soak are kept.
            self.readings += [replace(reading, round=number, samples=()) for reading in readings]
            if self.is_interrupted:
                self._progress.report("  interrupted: the readings so far are judged")
                break
            left = max(0.0, seconds - (time.monotonic() - began))
            self._progress.report(f"  round {number}, {left:.0f} s left: {_summary_line(readings)}{self._errors()}")
        return time.monotonic() - began

    def _errors(self) -> str:
        """Return a text on the errors that the drivers have counted since the beginning; "" without errors."""
        text = ""
        for examination in self._examinations:
            card, before = examination.card(), examination.before
            corrected = (card.ecc_corrected or 0) - (before.ecc_corrected or 0)
            uncorrected = (card.ecc_uncorrected or 0) - (before.ecc_uncorrected or 0)
            text += f"; {examination.device}: {corrected} memory errors corrected" if corrected else ""
            text += f"; {examination.device}: {uncorrected} memory errors not corrected" if uncorrected else ""
            text += f"; {examination.device}: XID {', '.join(map(str, card.xids))}" if card.xids else ""
        return text

    def _at_once(self, pool: ThreadPoolExecutor, phases: Sequence[str], seconds: float) -> list[Reading]:
        """Repeat phases on all devices at the same time, each device in a thread, and return the readings.

        Devices without a live worker are left out. If the user interrupts, the readings until then are returned.
        """
        alive = [examination for examination in self._examinations if examination.is_alive]
        readings_by_device: dict[str, list[Reading]] = {}

        def repeat(examination: DeviceExamination) -> None:
            readings_by_device[examination.device] = examination.repeat(phases, seconds)

        futures: list[Future[None]] = []
        # With the signals blocked, no interrupt comes between the submissions, after which only some devices would have
        # begun. That is so for this thread only: if another thread takes the signal, Python may raise
        # KeyboardInterrupt here at any time.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            futures.extend(pool.submit(repeat, examination) for examination in alive)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            while wait(futures, _WAIT_SECONDS).not_done:
                pass  # Python handles a signal that another thread has taken only between two waits
        except KeyboardInterrupt:
            self.is_interrupted = True
            for examination in alive:
                examination.stop()
            pool.shutdown()  # waits for all threads; an interrupt may have kept a future out of the list
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for future in futures:
            future.result()  # raises the exception of the thread, if there is one
        all_readings = [reading for examination in alive for reading in readings_by_device.get(examination.device, [])]
        # After an interrupt this process has killed the workers, so the readings of their end are dropped.
        return [reading for reading in all_readings if reading.name != PROCESS] if self.is_interrupted else all_readings

    def _validation(self, soaked: float | None) -> Validation:
        examinations = self._examinations
        phases = {name for examination in examinations for name in examination.seconds}
        longest = {name: max(examination.seconds.get(name, 0.0) for examination in examinations) for name in phases}
        hosts = {examination.device: examination.host for examination in examinations if examination.host is not None}
        # Other processes on the host do not disturb a GPU, which computes alone once its work is queued.
        disturbances = {name: disturbance.of_host(host, name) for name, host in hosts.items() if name == "cpu"}
        validation = Validation(
            cards=tuple(examination.card() for examination in examinations),
            before=tuple(examination.before for examination in examinations),
            readings=tuple(self.readings),
            judgements=(),
            seconds={name: round(took, 3) for name, took in sorted((longest | self._seconds).items())},
            watched={
                examination.device: gpu for examination in examinations if (gpu := examination.watched) is not None
            },
            disturbed={name: reason for name, reason in disturbances.items() if reason is not None},
            software=next((examination.software for examination in examinations if examination.software), {}),
            soak_seconds=round(soaked, 1) if soaked is not None else None,
        )
        evidence = replace(
            self._host_evidence,
            cards=validation.cards,
            before=validation.before,
            readings=validation.readings,
            watched=validation.watched,
            disturbed=validation.disturbed,
            hosts=hosts,
        )
        return replace(validation, judgements=judge.judge(evidence))


def _summary_line(readings: Sequence[Reading]) -> str:
    """Return one line on some readings: their faults, or else the largest rate of each phase."""
    wrong = [
        f"{reading.device} {reading.name}: {(reading.fault or '').splitlines()[0]}"
        for reading in readings
        if reading.fault
    ]
    if wrong:
        return "; ".join(wrong)
    best: dict[str, Reading] = {}
    for reading in readings:
        if reading.value and reading.unit in {"FLOP/s", "B/s"}:
            before = best.get(reading.probe)
            best[reading.probe] = reading if before is None or reading.value > (before.value or 0.0) else before
    return (
        ", ".join(f"{reading.name} {shown(reading.value or 0.0, reading.unit)}" for reading in best.values())
        or "no figure"
    )
