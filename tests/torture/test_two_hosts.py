"""Tests two hosts on one volume at random, against a model that holds the owner of every byte."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.provision import hub_server
from tests.provision.http_server import Server
from tests.torture import shared_volume, two_hosts_history
from tests.torture.shared_volume import MODELS, SAME, SharedVolume
from tests.torture.two_hosts import Figures, Round
from tests.torture.two_hosts_history import History, Operation
from tests.torture.whose_bytes import violations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SLICE, _ALL = range(30), range(1000)
_PLAIN = {
    name: f'env = "{env}"\nmirror = "keep"\nmodels = []\nrelocate = []\n'
    for name, env in (("A", "alpha"), ("B", "beta"))
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedVolume]:
    """Return a volume that two hosts share, with a hub on loopback; each round empties it."""
    if not shared_volume.can_share():
        pytest.skip("no right to make a mount namespace, or unshare is missing")
    content: dict[str, bytes] = {}
    headers: dict[str, dict[str, str]] = {}
    for repo, files in MODELS.values():
        more_content, more_headers = hub_server.served(repo, files)
        content |= more_content
        headers |= more_headers
    hub = Server(content)
    hub.headers = headers
    memory = Path("/dev/shm")  # noqa: S108 (mkdtemp makes a folder with a unique name in it)
    base = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path_factory.mktemp("shared")))
    volume = SharedVolume(base, hub)
    volume.lay()
    yield volume
    volume.close()
    hub.close()
    shutil.rmtree(base)


def no_violation(shared: SharedVolume, seeds: range) -> Figures:
    """Run the rounds of the seeds, and assert that none breaks a promise; print the shortest history of the first."""
    figures = Figures()
    failed: dict[int, str] = {}
    for seed in seeds:
        violation = Round(two_hosts_history.drawn(seed), shared, figures).run()
        if violation is not None:
            failed[seed] = violation.rule
    if failed:
        seed, rule = next(iter(failed.items()))

        def fails(history: History) -> bool:
            again = Round(history, shared, Figures()).run()
            return again is not None and again.rule == rule

        history = two_hosts_history.shortened(two_hosts_history.drawn(seed), fails)
        violation = Round(history, shared, Figures()).run()
        pytest.fail(f"{len(failed)} of {len(seeds)} rounds break a promise: {failed}\n{history}\n{violation}")
    return figures


def test_two_hosts_at_random_keep_every_byte_with_its_owner(shared: SharedVolume) -> None:
    figures = no_violation(shared, _SLICE)
    assert figures.exits["setup 0"] > len(_SLICE)
    assert figures.exits["undo 0"]
    assert figures.killed
    assert figures.together


@pytest.mark.long
def test_two_hosts_in_a_thousand_rounds_keep_every_byte_with_its_owner(shared: SharedVolume) -> None:
    print(no_violation(shared, _ALL))


def move_to_the_other_home(shared: SharedVolume) -> None:
    shutil.move(shared.base / "A/home/work", shared.base / "B/home/work")


def move_below_the_other_link(shared: SharedVolume) -> None:
    shutil.copytree(shared.base / "A/home/work", shared.disk / "of-B")
    (shared.base / "B/home/work").symlink_to(shared.disk / "of-B")


def delete_the_file(shared: SharedVolume) -> None:
    (shared.base / "A/home/work/a.txt").unlink()


def move_to_the_volume_without_a_link(shared: SharedVolume) -> None:
    shutil.move(shared.base / "A/home/work", shared.disk / "work")


def bend_the_link(shared: SharedVolume) -> None:
    link = shared.base / "A/home/.cache/pip"
    link.unlink()
    link.symlink_to(shared.disk / "pip")


def name_a_blob_wrongly(shared: SharedVolume) -> None:
    blobs = shared.disk / "cache/hub/models--owner--small/blobs"
    blobs.mkdir(parents=True)
    (blobs / ("0" * 64)).write_text("other content")


@pytest.mark.parametrize(
    ("damage", "rules"),
    [
        (move_to_the_other_home, {"stolen", "mixed"}),
        (move_below_the_other_link, {"mixed"}),
        (delete_the_file, {"lost"}),
        (move_to_the_volume_without_a_link, {"not at its path"}),
        (bend_the_link, {"foreign link changed", "not at its path"}),
        (name_a_blob_wrongly, {"wrong blob"}),
    ],
)
def test_oracle_sees_each_kind_of_damage(
    shared: SharedVolume, damage: Callable[[SharedVolume], None], rules: set[str]
) -> None:
    laying = (Operation("A", "write", ("work/a.txt",)), Operation("A", "link", two_hosts_history.HAND_MADE[0]))
    round_ = Round(History(0, SAME, _PLAIN, {"A": (), "B": ()}, laying), shared, Figures())
    assert round_.run() is None
    damage(shared)
    assert {violation.rule for violation in violations(round_.model, shared, shared.read())} == rules


def test_history_of_a_seed_is_always_the_same() -> None:
    assert two_hosts_history.drawn(7) == two_hosts_history.drawn(7)
    assert str(two_hosts_history.drawn(7)) != str(two_hosts_history.drawn(8))


def test_shortened_history_holds_only_the_operations_that_are_needed() -> None:
    history = two_hosts_history.drawn(3)
    needed = {history.operations[1], history.operations[-1]}
    short = two_hosts_history.shortened(history, lambda fewer: needed <= set(fewer.operations))
    assert set(short.operations) == needed


def test_host_has_a_name_and_a_home_of_its_own(shared: SharedVolume) -> None:
    shared.clear(SAME, _PLAIN)
    for name, host in shared.hosts.items():
        host.ask("write", path="note", text=f"{name}:note:v1\n")
    assert {name: host.survey().files["note"][1] for name, host in shared.hosts.items()} == {
        "A": "A:note:v1\n",
        "B": "B:note:v1\n",
    }
    assert not list((shared.base / "home").iterdir()), "the mounts are in the namespaces of the hosts"
