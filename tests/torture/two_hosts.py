"""Runs a history of two hosts on one volume, and after each operation compares the disks with the model."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

from provision.config.models import cache_folder
from tests.provision import hub_server
from tests.torture.command_answer import Answer
from tests.torture.shared_volume import HOSTS, MODELS
from tests.torture.two_hosts_history import CACHES, MISSING, PRIVATE, Operation
from tests.torture.whose_bytes import Model, Violation, changed_at_all, changed_for_other, violations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.torture.command_answer import Figures
    from tests.torture.shared_volume import Host, Reading, SharedVolume, Survey
    from tests.torture.two_hosts_history import History

_GOOD, _CHANGES, _BLOCKED = 0, 3, 4
# The starts of step names that a dry run need not announce: they follow from other steps. "relink.sh" lists the links,
# and "folder " removes a folder that another step leaves empty.
_FOLLOWING = ("relink.sh", "folder ")
_BY_USER = {"write", "delete", "link", "wipe", "unmount", "mount", "hold", "release", "fill", "free"}
_DRY = ("relocate", "repair", "undo")


class Round:
    """Runs one history, and stops at the first violation."""

    def __init__(self, history: History, volume: SharedVolume, figures: Figures) -> None:
        self.history = history
        self.volume = volume
        self.figures = figures
        self.model = Model()

    def run(self) -> Violation | None:
        """Return the first violation of the history, or None."""
        self.volume.clear(self.history.layout, self.history.definitions)
        self.figures.rounds += 1
        for operation in self.history.operations:
            for violation in self._done(operation):
                return Violation(violation.rule, f"after `{operation}`: {violation.detail}")
        return next(self._ended(), None)

    def _done(self, operation: Operation) -> Iterator[Violation]:
        host = self.volume.hosts[operation.host]
        if operation.beside is not None:
            yield from self._together(operation, operation.beside)
        elif operation.act in _BY_USER:
            self._by_user(operation, host)
        elif operation.act == "rename":
            self._rename(host)
        elif operation.act == "script":
            yield from self._script(host)
        else:
            yield from self._command(operation, host)
        yield from violations(self.model, self.volume, self.volume.read())

    def _by_user(self, operation: Operation, host: Host) -> None:
        user, about = self.model.users[host.name], operation.about
        match operation.act:
            case "write":
                path = str(about[0])
                text = self.model.new_text(host.name, path)
                answer = host.ask("write", path=path, text=text)
                if answer["done"]:
                    self.model.forget(answer["earlier"])
                    user.files[text] = path
            case "delete":
                answer = host.ask("delete", path=str(about[0]))
                if answer["done"]:
                    self.model.forget(answer["earlier"])
            case "link":
                path, disk, name, file = map(str, about)
                target = host.own / "nvme" / name if disk == "nvme" else host.volume / name.format(host.name)
                text = self.model.new_text(host.name, f"{path}/{file}")
                answer = host.ask("link", path=path, target=str(target), seed={file: text})
                if answer["done"]:
                    self.model.forget(answer.get("earlier"))
                    user.links[path] = str(target)
                    user.files[text] = f"{path}/{file}"
            case "wipe":
                seen = host.survey()
                host.ask("wipe")
                self.model.wiped(host.name, seen, self.volume.read())
            case "hold":
                host.ask("hold", path=str(about[0]))
            case act:
                host.ask(act)
                host.mounted = act == "mount" or (act != "unmount" and host.mounted)

    def _rename(self, host: Host) -> None:
        """Give the host another name, unless it has not adopted the records of an earlier name yet."""
        user = self.model.users[host.name]
        if not user.stranger:
            user.names.append(f"host{host.name}-{len(user.names) + 1}")
            user.stranger = True
            host.ask("rename", name=user.names[-1])

    def _script(self, host: Host) -> Iterator[Violation]:
        before = self.volume.read()
        if host.mounted and ".firstlight/relink.sh" in before.trees["disk"]:
            host.ask("script", root=str(host.volume))
            yield from changed_for_other(_other(host.name), before, self.volume.read())

    def _command(self, operation: Operation, host: Host) -> Iterator[Violation]:
        argv = self._argv(operation, host)
        before, seen = self.volume.read(), host.survey()
        if not argv or not self._may_run(host, seen):
            return
        dry = None
        if operation.kill is None and argv[0] in _DRY:
            dry = self._run(host, [*argv, "--dry-run"])
            lines = changed_at_all(before, self.volume.read())
            if lines:
                yield Violation("dry run changed", f"{dry}\n{lines}")
        answer = self._run(host, argv, operation.kill)
        after = self.volume.read()
        self._note_owners(operation, host, answer, after)
        yield from changed_for_other(_other(host.name), before, after)
        if not host.mounted:
            below = f"{host.name}/below"
            if before.trees[below] != after.trees[below]:
                yield Violation("absent volume written", f"{answer}\n{after.trees[below]}")
        if answer.killed:
            self.model.users[host.name].is_unsettled()
            return
        yield from self._judged(operation, host, answer, before, after)
        if dry is not None and "no space left" not in answer.text:  # a dry run of repair does not count free space
            yield from _compared(dry, answer)
        if answer.code == _GOOD:
            yield from self._succeeded(host, answer, seen)

    def _note_owners(self, operation: Operation, host: Host, answer: Answer, after: Reading) -> None:
        """Update the model with what a command has given to another owner, or found to have none."""
        if operation.act == "undo other --yes" and answer.code == _GOOD:
            self.model.gave_away(_other(host.name), after)
        if operation.act == "adopt" and answer.code in {_GOOD, 2}:  # 2: the earlier name has no links on record
            self.model.users[host.name].stranger = False

    def _succeeded(self, host: Host, answer: Answer, seen: Survey) -> Iterator[Violation]:
        """Update the model after a command with exit code 0, and yield what contradicts that exit code."""
        if answer.words[0] in {"setup", "repair"}:
            yield from self._settled(host, answer, seen)
        elif answer.words[0] == "undo":
            self.model.users[host.name].linked = False
        elif answer.words[:2] == ["models", "pull"]:
            yield from self._found(host, answer)

    def _may_run(self, host: Host, seen: Survey) -> bool:
        """Return whether to run a command: the volume is mounted, or a link in the home leads to it.

        Without both, `provision` would use the empty mount point as a new root.
        """
        if host.mounted:
            return True
        return any(target.startswith(f"{host.volume}/") for target in seen.links.values())

    def _argv(self, operation: Operation, host: Host) -> list[str]:
        """Return the arguments of `provision` for an operation; [] if it needs a run of a host that has none."""
        definition = ["--host", str(host.definition), "--json"]
        place = [*definition, "--envs", str(host.base / "envs")]
        match operation.act, operation.about:
            case "relocate", (what,):
                path = str(host.home / str(what)) if what in {*PRIVATE, MISSING} else str(what)
                words = ["relocate", path, *place]
            case "undo", _:
                words = ["undo", *definition]
            case ("undo own" | "undo other" | "undo other --yes") as act, (number,):
                runs = self._runs(host.name if act == "undo own" else _other(host.name))
                yes = ["--yes"] if act.endswith("--yes") else []
                words = ["undo", runs[int(number) % len(runs)], *yes, *definition] if runs else []
            case ("pull" | "remove") as act, (number,):
                yes = ["--yes"] if act == "remove" else []
                words = ["models", act, list(MODELS)[int(number) % len(MODELS)], *yes, *place]
            case "adopt", (number,):
                names = self.model.users[host.name].names[-2:-1]
                act = "setup" if int(number) % 2 else "repair"
                words = [act, *place, "--adopt", f"{names[0]}:{host.home}"] if names else []
            case "gc", _:
                words = ["gc", "--yes", *definition]
            case act, _:
                words = [act, *place]
        return words

    def _runs(self, owner: str) -> list[str]:
        """Return the names of the runs of a host that are not undone, oldest first."""
        rows = {}
        for file in sorted((self.volume.disk / ".firstlight/journal").glob("*.jsonl")):
            lines = []
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
            rows[file.stem] = lines
        undone = {row.get("run") for lines in rows.values() for row in lines if row.get("act") == "undone"}
        return [
            name
            for name, lines in rows.items()
            if lines and lines[0].get("host") in self.model.users[owner].names and lines[0].get("command") != "undo"
            if name not in undone
        ]

    def _run(self, host: Host, argv: list[str], kill: int | None = None) -> Answer:
        answer = Answer.of(argv, host.ask("run", argv=argv, kill=kill, folder=str(host.base)))
        self._count(argv, answer)
        return answer

    def _count(self, argv: list[str], answer: Answer) -> None:
        self.figures.commands += 1
        self.figures.killed += answer.killed
        self.figures.exits[f"{argv[0]} {answer.code}"] += 1

    def _judged(
        self, operation: Operation, host: Host, answer: Answer, before: Reading, after: Reading
    ) -> Iterator[Violation]:
        if answer.code not in {_GOOD, 2, _CHANGES, _BLOCKED} or "Traceback" in answer.text:
            yield Violation("failed", str(answer))
        lines = changed_at_all(before, after)
        if answer.code in {2, _BLOCKED} and not answer.changed and lines:
            yield Violation("refused and changed", f"{answer}\n{lines}")
        if answer.words[0] == "undo" and answer.code == _BLOCKED and lines:
            yield Violation("refused and changed", f"{answer}\n{lines}")
        if operation.act == "gc":
            kept = {path.split("/")[2] for path in after.trees["disk"] if path.startswith(".firstlight/backup/")}
            gone = {
                path.split("/")[2] for path in before.trees["disk"] if path.startswith(".firstlight/backup/")
            } - kept
            if {self._host_of(run) for run in gone} - set(self.model.users[host.name].names):
                yield Violation("backups of another host deleted", str(answer))
        if operation.act == "undo other" and (answer.code == _GOOD or lines):
            yield Violation("undo without --yes", f"{answer}\n{lines}")
        if operation.about == (MISSING,) and (answer.code == _GOOD or lines):
            yield Violation("missing folder relocated", f"{answer}\n{lines}")
        if answer.words[0] == "undo" and operation.act != "undo other --yes" and answer.code == _GOOD:
            taken = set(self._undone(after)) - set(self._undone(before))
            if taken and not {self._host_of(name) for name in taken} & set(self.model.users[host.name].names):
                yield Violation("undo of another host", f"{answer}\nundone: {taken}")

    def _undone(self, reading: Reading) -> list[str]:
        names = []
        for file in (self.volume.disk / ".firstlight/journal").glob("*.jsonl"):
            if f".firstlight/journal/{file.name}" not in reading.trees["disk"]:
                continue
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    names += [row["run"]] if row.get("act") == "undone" else []
        return names

    def _host_of(self, run: str) -> str | None:
        with (self.volume.disk / ".firstlight/journal" / f"{run}.jsonl").open() as file:
            host: str | None = json.loads(file.readline()).get("host")
        return host

    def _settled(self, host: Host, answer: Answer, seen: Survey) -> Iterator[Violation]:
        """Update the model after a successful setup or repair; yield steps with work left, and links not restored."""
        user = self.model.users[host.name]
        words = " ".join(answer.words[1:]).partition(" --adopt ")[0]
        user.settled |= not user.stranger  # the links of the earlier name come back only if they are adopted
        user.linked = user.linked or answer.words[0] == "setup"
        status = self._run(host, ["status", *words.split()])
        drifted = {
            name: row["detail"]
            for name, row in status.outcomes.items()
            if row["after"] != "ok" and (name in answer.outcomes or answer.words[0] == "setup")
        }
        if drifted:
            yield Violation("exit 0 is not true", f"{answer}\nstatus: {drifted}")
        now = host.survey()
        for path, target in [] if user.stranger else list(user.due.items()):
            is_taken = any(
                path == link or path.startswith(f"{link}/") or link.startswith(f"{path}/") for link in seen.links
            )
            is_taken |= any(file.startswith(f"{path}/") for file in seen.files)
            if not is_taken and now.links.get(path) != target:
                yield Violation("link not brought back", f"~/{path} -> {target} on host {host.name}\n{answer}")
            del user.due[path]
            if now.links.get(path) == target:
                user.links[path] = target
        if answer.words[0] == "setup":
            tops = {CACHES[name] for name in self.history.relocated[host.name] if name in CACHES}
            user.adopted = {
                path: target
                for path, target in user.links.items()
                if target.startswith(f"{host.volume}/") and any(path in {top, f"{top}/hub"} for top in tops)
            }

    def _found(self, host: Host, answer: Answer) -> Iterator[Violation]:
        """Yield a violation if files of a pulled model are not in ~/.cache/huggingface, where huggingface_hub looks."""
        repo, files = MODELS[answer.words[2]]
        folder = f".cache/huggingface/hub/{cache_folder(repo)}/snapshots/{hub_server.REVISION}"
        seen = host.survey().files
        missing = [path for path in files if f"{folder}/{path}" not in seen]
        is_linked = "huggingface" in self.history.relocated[host.name] and self.model.users[host.name].linked
        if missing and is_linked and host.mounted:
            yield Violation("pulled and not found", f"{missing} below ~/{folder} on host {host.name}\n{answer}")

    def _together(self, first: Operation, second: Operation) -> Iterator[Violation]:
        pairs = []
        for operation in (first, second):
            host = self.volume.hosts[operation.host]
            argv = self._argv(operation, host)
            if argv and self._may_run(host, host.survey()):
                pairs.append((operation, host, [*argv, "--wait", "60"] if argv[0] in {"setup", "repair"} else argv))
        for _, host, argv in pairs:
            host.send("run", argv=argv, kill=None, folder=str(host.base))
        self.figures.together += len(pairs) == 2
        for operation, host, argv in pairs:
            answer = Answer.of(argv, host.answer())
            self._count(argv, answer)
            if answer.code not in {_GOOD, 2, _CHANGES, _BLOCKED} or "Traceback" in answer.text:
                yield Violation("failed", str(answer))
            self._note_owners(operation, host, answer, self.volume.read())
            if answer.code == _GOOD and argv[0] in {"setup", "repair"}:
                self.model.users[host.name].settled |= not self.model.users[host.name].stranger

    def _ended(self) -> Iterator[Violation]:
        """Mount the volume on both hosts and run repair, setup, setup and status on each; yield the violations.

        Setup must succeed, and the setup of one host must not undo that of the other.
        """
        for host in self.volume.hosts.values():
            host.ask("release")
            host.ask("mount")
            host.ask("free")
            host.mounted = True
        answers = {}
        strangers = [Operation(name, "adopt", (0,)) for name in HOSTS if self.model.users[name].stranger]
        acts = [Operation(name, act) for act in ("repair", "setup", "setup", "status") for name in HOSTS]
        for operation in [*strangers, *acts]:
            name, act, host = operation.host, operation.act, self.volume.hosts[operation.host]
            before, seen = self.volume.read(), host.survey()
            argv = self._argv(operation, host)
            answer = self._run(host, argv)
            self._note_owners(operation, host, answer, self.volume.read())
            where = f"at the end, `{operation}`"
            checks = [
                *self._judged(operation, host, answer, before, self.volume.read()),
                *changed_for_other(_other(name), before, self.volume.read()),
            ]
            if answer.code == _GOOD and act != "status":
                checks += self._settled(host, answer, seen)
            checks += violations(self.model, self.volume, self.volume.read())
            for violation in checks:
                yield Violation(violation.rule, f"{where}: {violation.detail}")
            answers[name, act] = answer
        for name in HOSTS:
            if answers[name, "setup"].code == _GOOD and answers[name, "status"].code != _GOOD:
                yield Violation("drift in turns", f"host {name}: {answers[name, 'status']}")
            for row in answers[name, "setup"].outcomes.values():
                if row["error"]:
                    self.figures.blocked_at_end[
                        f"{row['step']}: {str(row['error']).replace(str(self.volume.base), '')[:150]}"
                    ] += 1


def _other(name: str) -> str:
    return next(host for host in HOSTS if host != name)


def _compared(dry: Answer, answer: Answer) -> Iterator[Violation]:
    """Yield a violation if a run has changed other steps than its dry run announced, or has another exit code."""
    announced = {name for name, row in dry.outcomes.items() if row["after"] == "drifted"}
    others = {name for name in answer.changed - announced if not name.startswith(_FOLLOWING)}
    expected = _GOOD if dry.code == _CHANGES else dry.code
    # An earlier step of the run may complete a step that the dry run announces.
    unfinished = {name for name in announced if answer.outcomes[name]["after"] != "ok"}
    if answer.code != expected or (dry.code == _CHANGES and (others or unfinished)):
        yield Violation("dry run differs", f"{dry}\n{answer}")
