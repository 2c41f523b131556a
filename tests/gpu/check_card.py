"""Checks firstlight on the card of this machine, the most valuable checks first, in limited time, offline.

Each check compares a measurement by `bench` with an expected figure: that of a torch loop without firstlight
(bare_torch.py), or a limit of the project. The results are results.json and results.md. A check for which no time is
left is listed as "not run".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).resolve().parent
CHECKOUT = FOLDER.parent.parent
_ENVS = CHECKOUT / "envs" / "architectures"
# The wheels for the measured interpreter, which takes torch from the machine; all other wheels are for `bench` itself.
_MEASURED = ("diffusers", "transformers", "accelerate", "safetensors", "importlib_metadata", "zipp")
_TOOLBOX = CHECKOUT / ".venv" / "bin" / "python"  # `make` installs it
_PASS, _FAIL, _LATE = "pass", "FAIL", "not run"


@dataclass
class Checked:
    """Hold the outcome of one check as texts of the report; `state` is pass, FAIL or not run."""

    name: str
    state: str
    measured: str
    expected: str


@dataclass
class Checks:
    """Run `bench` and collect the outcomes of the checks.

    Attributes:
        device: the device, such as cuda or cpu.
        own: the interpreter that runs `bench`.
        measured: the interpreter that has torch, which `bench` measures.
        out: the folder for the results.
        ends: the time of `time.monotonic` at which the checks must end.
        checked: the outcomes so far.
        runs: {name of a `bench` command: the content of its run.json}.
        seconds: {name of a command: its wall time}.
        bare: the output of bare_torch.py; {} until it has run.
    """

    device: str
    own: Path
    measured: Path
    out: Path
    ends: float
    checked: list[Checked] = field(default_factory=list)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bare: dict[str, Any] = field(default_factory=dict)

    @property
    def is_card(self) -> bool:
        """Return whether the device is a GPU; on a CPU, this script can only be tried out."""
        return self.device.startswith("cuda")

    def note(self, name: str, measured: str, expected: str, *, holds: bool) -> None:
        """Add an outcome, and print it; `holds` says whether the measured text meets the expected one."""
        self.checked.append(Checked(name, _PASS if holds else _FAIL, measured, expected))
        print(f"{self.checked[-1].state:7} {name}: {measured} (expected: {expected})", flush=True)

    def bench(self, name: str, *words: str, timeout: float = 300.0) -> int:
        """Run `bench` with the arguments `words`, and return its exit code; 124 after a timeout.

        The output goes to NAME.txt, and the content of run.json into `runs[name]`.
        """
        began = time.monotonic()
        place = self.out / name
        timeout = max(10.0, min(timeout, self.ends - began))
        command = [str(self.own), "-I", "-m", "bench", *words, "--device", self.device, "--python", str(self.measured)]
        command += ["--root", str(self.out / "root"), "--out", str(place), "--no-color", "--quiet"]
        try:
            done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=timeout, check=False)
            code, text = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            code, text = 124, f"{error}\n"
        (self.out / f"{name}.txt").write_text(text, encoding="utf-8")
        self.seconds[name] = time.monotonic() - began
        for file in place.glob("*/run.json"):
            self.runs[name] = json.loads(file.read_text(encoding="utf-8"))
        return code

    def readings(self, name: str, probe: str) -> dict[str, float]:
        """Return {name of a reading: its value} for one probe, such as "product", of the validation `name`."""
        validation = (self.runs.get(name) or {}).get("validation") or {"readings": []}
        return {row["name"]: row["value"] for row in validation["readings"] if row["probe"] == probe and row["value"]}


def check_bare(checks: Checks) -> None:
    """Measure matrix products and a denoising step with torch only (bare_torch.py)."""
    began = time.monotonic()
    unet = _ENVS / ("stable-diffusion-v1-5.json" if checks.is_card else "tiny-sd.json")
    command = [str(checks.measured), "-I", str(FOLDER / "bare_torch.py"), checks.device, str(unet)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    (checks.out / "bare.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    checks.seconds["bare"] = time.monotonic() - began
    if done.returncode == 0:
        checks.bare = json.loads(done.stdout.splitlines()[-1])
    rates = {name: f"{rate / 1e12:.3g} TFLOP/s" for name, rate in checks.bare.get("products", {}).items()}
    checks.note("bare torch loop", str(rates), "it runs", holds=done.returncode == 0)


def check_validate(checks: Checks) -> None:
    """Validate the card, and compare its rates of matrix products with those of bare_torch.py."""
    code = checks.bench("validate", "validate", timeout=150)
    seconds = checks.seconds["validate"]
    checks.note("validate", f"exit {code}, {seconds:.0f} s", "exit 0 within 60 s", holds=code == 0 and seconds <= 60)
    products = checks.readings("validate", "product")
    for dtype, rate in checks.bare.get("products", {}).items():
        share = products.get(f"product {dtype}", 0.0) / rate
        checks.note(f"product {dtype}", f"{share:.1%} of the bare loop", "at least 95 %", holds=share >= 0.95)


def check_quick(checks: Checks) -> None:
    """Run the quick suite: every case has a result, and the first two cases are both models in fp16."""
    words = ("run", "quick") if checks.is_card else ("run", "tiny")
    code = checks.bench("quick", *words, timeout=200)
    results = (checks.runs.get("quick") or {"results": []})["results"]
    measured = [result for result in results if result["status"] == "ok"]
    seconds = checks.seconds["quick"]
    text = f"exit {code}, {seconds:.0f} s, {len(measured)} of {len(results)} cases"
    is_whole = code == 0 and bool(results) and len(measured) == len(results)
    checks.note("quick", text, "exit 0, every case, within 120 s", holds=is_whole and seconds <= 120)
    if not checks.is_card:
        return
    first = [(result["case"]["model"], result["case"]["dtype"]) for result in measured[:2]]
    models = {model for model, dtype in first if dtype == "fp16"}
    checks.note("quick, first cases", str(first), "both models in fp16", holds=len(models) == 2)
    for result in measured:
        memory = result["memory"]
        kinds = ("device_peak_allocated_bytes", "device_peak_reserved_bytes", "device_process_bytes")
        peaks = [memory[name] for name in kinds]
        if None not in peaks:
            name = f"memory of {result['case']['model']} {result['case']['dtype']} {result['case']['scheduler']}"
            text = " / ".join(f"{peak / 1e9:.2f} GB" for peak in peaks)
            checks.note(name, text, "allocated, reserved and process grow", holds=peaks == sorted(peaks))


def check_cases(checks: Checks) -> None:
    """Measure the cases of card.toml: a step in comparison with bare_torch.py, attention kernels, SDXL."""
    code = checks.bench("cases", "run", str(FOLDER / "card.toml"), "--budget", "110", timeout=160)
    results = (checks.runs.get("cases") or {"results": []})["results"]
    bad = [result for result in results if result["status"] not in {"ok", "skipped"}]
    checks.note("cases", f"exit {code}, {len(results)} cases, {len(bad)} errors", "exit 0, no error", holds=code == 0)
    for result in results:
        case, steps = result["case"], [step for sample in result["samples"] for step in sample["step_seconds"]]
        name = f"{case['model']} {case['dtype']} {case['attention']}"
        median = sorted(steps)[len(steps) // 2] if steps else None
        text = f"{median * 1000:.2f} ms a step" if median else f"{result['status']}: {result['reason']}"
        notes = "; ".join([*result.get("notes", []), f"tf32 {result['software'].get('tf32')}"])
        checks.note(name, f"{text}; {notes}", "a figure, or a skip with its reason", holds=result not in bad)
        if median and case["batch"] > 1 and checks.bare:
            share = median / checks.bare["step_seconds"]
            is_near = abs(share - 1) <= 0.01 or not checks.is_card
            checks.note("step against the bare loop", f"{share:.4f} times", "within 1 %", holds=is_near)


def check_other_process(checks: Checks) -> None:
    """Measure while another process computes on the card; the result has to name that process."""
    command = [str(checks.measured), "-I", str(FOLDER / "bare_torch.py"), checks.device, "load"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        words = ("run", "tiny", "--model", "tiny-sd", "--set", "dtype=fp32", "--budget", "40")
        code = checks.bench("beside", *words, timeout=100)
        other.stdin.close()
    results = (checks.runs.get("beside") or {"results": []})["results"]
    reasons = [reason for result in results for reason in (result["trust"] or {"reasons": []})["reasons"]]
    found = any("other process" in reason or "waited" in reason for reason in reasons)
    checks.note("another process", f"exit {code}, {reasons}", "the result names it", holds=found or not checks.is_card)


def check_again(checks: Checks) -> None:
    """Validate twice more: both pass, and the rates of matrix products of the three validations agree within 5 %."""
    for name in ("validate-2", "validate-3"):
        if checks.ends - time.monotonic() < 40:
            checks.checked.append(Checked(name, _LATE, "no time was left", "exit 0"))
            return
        code = checks.bench(name, "validate", "--budget", "30", timeout=90)
        checks.note(name, f"exit {code}, {checks.seconds[name]:.0f} s", "exit 0", holds=code == 0)
    names = ("validate", "validate-2", "validate-3")
    for reading in checks.readings("validate", "product"):
        values = [value for name in names if (value := checks.readings(name, "product").get(reading))]
        spread = max(values) / min(values) - 1
        checks.note(f"{reading}, three times", f"spread {spread:.1%}", "at most 5 %", holds=spread <= 0.05)


def check_tune(checks: Checks) -> None:
    """Search the fastest setting of Stable Diffusion by `bench tune`: at least twice as fast as the default."""
    model = "stable-diffusion-v1-5" if checks.is_card else "tiny-sd"
    left = checks.ends - time.monotonic() - 20
    code = checks.bench("tune", "tune", "--model", model, "--budget", f"{min(240.0, left):.0f}", timeout=left + 40)
    tuning = (checks.runs.get("tune") or {}).get("tuning") or {}
    gain = tuning.get("gain") or 1.0
    text = f"exit {code}, {gain:.2f} times as fast ({(tuning.get('best') or {}).get('dtype')})"
    checks.note("tune", text, "at least 2.0 times", holds=gain >= 2.0 or not checks.is_card)


# (check, the least seconds that the check needs), the most valuable check first
_CHECKS: tuple[tuple[Callable[[Checks], None], float], ...] = (
    (check_bare, 30.0),
    (check_validate, 50.0),
    (check_quick, 45.0),
    (check_cases, 60.0),
    (check_other_process, 20.0),
    (check_again, 40.0),
    (check_tune, 90.0),
)


def make_environments(base: Path, wheels: Path, folder: Path) -> tuple[Path, Path]:
    """Build two environments from local wheels; return the interpreter for `bench` and the one to be measured.

    Both also import the packages of the interpreter `base`, such as torch; their own packages come first.

    Args:
        base: the interpreter that has torch.
        wheels: the folder with the wheels to install.
        folder: the folder in which both environments are built.

    Raises:
        subprocess.CalledProcessError: a wheel does not fit this interpreter, or `base` has no pip.
    """
    files = sorted(wheels.glob("*.whl"))
    measured = [file for file in files if file.name.startswith(_MEASURED)]
    own = [file for file in files if file not in measured]
    packages = _output(base, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    return (
        _make(base, folder / "own", own, [str(CHECKOUT), packages]),
        _make(base, folder / "measured", measured, [packages]),
    )


def _make(base: Path, folder: Path, wheels: list[Path], paths: list[str]) -> Path:
    _output(base, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    packages = Path(_output(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    if wheels:
        options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(packages))
        _output(base, "-m", "pip", "install", *options, *map(str, wheels))
    (packages / "firstlight-checks.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    return python


def _output(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def page(checks: Checks, machine: str) -> str:
    """Return the outcomes as one page of Markdown; `machine` is the line below the title."""
    head = "| check | result | measured | expected |\n| --- | --- | --- | --- |"
    lines = ["# firstlight on a real card", "", machine, "", head]
    lines += [f"| {row.name} | {row.state} | {row.measured} | {row.expected} |" for row in checks.checked]
    took = ", ".join(f"{name} {seconds:.0f}" for name, seconds in checks.seconds.items())
    return "\n".join([*lines, "", f"seconds: {took}"]) + "\n"


def main() -> int:
    """Run the checks, write results.json and results.md, and return 1 if a check failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the interpreter that has torch")
    parser.add_argument(
        "--wheels", type=Path, help="a folder of wheels; default: bench runs from .venv, which make installs"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder for the results")
    parser.add_argument("--seconds", type=float, default=480.0, help="the time limit for all checks")
    options = parser.parse_args()
    began = time.monotonic()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    own, measured = _TOOLBOX, options.python
    if options.wheels is not None:
        own, measured = make_environments(options.python, options.wheels, out / "environments")
    checks = Checks(options.device, own, measured, out, began + options.seconds)
    checks.seconds["environments"] = time.monotonic() - began
    for check, least in _CHECKS:
        name = (check.__doc__ or "").splitlines()[0]
        if checks.ends - time.monotonic() < least:
            checks.checked.append(Checked(name, _LATE, "no time was left", ""))
        else:
            try:
                check(checks)
            except (OSError, ValueError, LookupError, TypeError, subprocess.SubprocessError) as error:
                checks.note(name, f"{type(error).__name__}: {error}", "it ends", holds=False)
        write_results(checks)
    return int(any(row.state == _FAIL for row in checks.checked))


def write_results(checks: Checks) -> None:
    """Write the outcomes so far, so that they are kept if another program ends this one."""
    out = checks.out
    run: dict[str, Any] = next(iter(checks.runs.values()), {"machine": {}})
    machine = f"{run['machine'].get('gpus')} {run['machine'].get('cpu')}, torch {checks.bare.get('torch')}"
    content = {
        "machine": run["machine"],
        "bare": checks.bare,
        "seconds": checks.seconds,
        "checks": [asdict(row) for row in checks.checked],
        "products": {name: checks.readings(name, "product") for name in checks.runs if name.startswith("validate")},
    }
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(page(checks, machine), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
