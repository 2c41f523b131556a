"""Runs random operations of two hosts that share a volume; compares the disks with a model of every byte's owner."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.provision import hub_server
from tests.provision.http_server import Server
from tests.torture import shared_volume, two_hosts_history
from tests.torture.command_answer import Figures
from tests.torture.shared_volume import MODELS, SAME, SharedVolume
from tests.torture.two_hosts import Round
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
    """Return a volume that two hosts share, with a model hub on loopback; each round begins with an empty volume."""
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


def assert_no_violation(shared: SharedVolume, seeds: range) -> Figures:
    """Run one round for each seed, and return the figures.

    If a round violates a rule, fail with the first violation, and with the shortest history that shows it.
    """
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
        pytest.fail(f"{len(failed)} of {len(seeds)} rounds violate a rule: {failed}\n{history}\n{violation}")
    return figures


def test_every_byte_stays_with_its_owner_in_30_rounds_of_random_operations_of_two_hosts(shared: SharedVolume) -> None:
    figures = assert_no_violation(shared, _SLICE)
    assert figures.exits["setup 0"] > len(_SLICE)
    assert figures.exits["undo 0"]
    assert figures.killed
    assert figures.together


@pytest.mark.long
def test_every_byte_stays_with_its_owner_in_1000_rounds_of_random_operations_of_two_hosts(shared: SharedVolume) -> None:
    print(assert_no_violation(shared, _ALL))


def move_to_the_other_home(shared: SharedVolume) -> None:
    shutil.move(shared.base / "A/home/work", shared.base / "B/home/work")


def move_below_the_other_link(shared: SharedVolume) -> None:
    shutil.copytree(shared.base / "A/home/work", shared.disk / "of-B")
    (shared.base / "B/home/work").symlink_to(shared.disk / "of-B")


def delete_the_file(shared: SharedVolume) -> None:
    (shared.base / "A/home/work/a.txt").unlink()


def move_to_the_volume_without_a_link(shared: SharedVolume) -> None:
    shutil.move(shared.base / "A/home/work", shared.disk / "work")


def redirect_the_link(shared: SharedVolume) -> None:
    link = shared.base / "A/home/.cache/pip"
    link.unlink()
    link.symlink_to(shared.disk / "pip")


def write_a_blob_with_a_wrong_name(shared: SharedVolume) -> None:
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
        (redirect_the_link, {"foreign link changed", "not at its path"}),
        (write_a_blob_with_a_wrong_name, {"wrong blob"}),
    ],
)
def test_comparison_with_the_model_finds_each_kind_of_damage(
    shared: SharedVolume, damage: Callable[[SharedVolume], None], rules: set[str]
) -> None:
    laying = (Operation("A", "write", ("work/a.txt",)), Operation("A", "link", two_hosts_history.HAND_MADE[0]))
    round_ = Round(History(0, SAME, _PLAIN, {"A": (), "B": ()}, laying), shared, Figures())
    assert round_.run() is None
    damage(shared)
    assert {violation.rule for violation in violations(round_.model, shared, shared.read())} == rules


def test_equal_seeds_draw_equal_histories_and_other_seeds_draw_others() -> None:
    assert two_hosts_history.drawn(7) == two_hosts_history.drawn(7)
    assert str(two_hosts_history.drawn(7)) != str(two_hosts_history.drawn(8))


def test_shortened_history_holds_only_the_operations_that_cause_the_failure() -> None:
    history = two_hosts_history.drawn(3)
    needed = {history.operations[1], history.operations[-1]}
    short = two_hosts_history.shortened(history, lambda fewer: needed <= set(fewer.operations))
    assert set(short.operations) == needed


def test_each_host_sees_its_own_home_and_only_its_own_mounts(shared: SharedVolume) -> None:
    shared.clear(SAME, _PLAIN)
    for name, host in shared.hosts.items():
        host.ask("write", path="note", text=f"{name}:note:v1\n")
    assert {name: host.survey().files["note"][1] for name, host in shared.hosts.items()} == {
        "A": "A:note:v1\n",
        "B": "B:note:v1\n",
    }
    assert not list((shared.base / "home").iterdir()), "the mounts exist only in the namespaces of the hosts"
