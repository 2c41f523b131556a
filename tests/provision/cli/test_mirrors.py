"""Tests `provision mirrors` and `setup` with mirrors on loopback, real uv, real rattler and the real hub client."""

from __future__ import annotations

import hashlib
import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.provision import run_command
from tests.provision.http_server import PORTAL, Fault, Server, index

if TYPE_CHECKING:
    from pathlib import Path

    from tests.provision.fake_hub import FakeHub


def provision(*argv: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return run_command.provision(*argv, env=environ)


@pytest.fixture
def isolated_envs(envs: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the envs/ folder of a host that has no mirror in its settings and cannot reach the official servers."""
    for name in ("PIP_FIND_LINKS", "PIP_NO_INDEX", "HF_ENDPOINT"):
        monkeypatch.delenv(name)
    return envs


def write_catalogue(envs: Path, **tools: dict[str, Any]) -> None:
    lines = []
    for tool, mirrors in tools.items():
        for name, url in mirrors.items():
            lines += [f"[{tool}.{name}]", f'url = "{url}"']
    (envs / "mirrors.toml").write_text("\n".join(lines) + "\n")


def pip_mirrors(envs: Path, **servers: Server) -> None:
    write_catalogue(envs, pip={name: f"{server.url}/simple" for name, server in servers.items()})


@pytest.fixture
def flags(tmp_path: Path, isolated_envs: Path) -> list[object]:
    (tmp_path / "host.toml").write_text("relocate = []\nmodels = []\n")
    return ["--root", tmp_path / "root", "--host", tmp_path / "host.toml", "--envs", isolated_envs]


def prefix(tmp_path: Path) -> Path:
    return tmp_path / "root/envs/diffusers"


def journal(tmp_path: Path) -> list[dict[str, Any]]:
    files = sorted((tmp_path / "root/.firstlight/journal").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


# {name of a mirror that cannot be used: its fault, and a part of the problem that the probe reports}.
UNUSABLE = {
    "portal": (Fault(body=PORTAL), "has no link to a file"),
    "forbidden": (Fault(status=403), "answers 403"),
    "absent": (Fault(status=404), "lacks"),
    "stalls": (Fault(stall=True), "stops sending data"),
    "disconnects": (Fault("/simple/", cut=5), "closes the connection"),
    "corrupts": (Fault("/files/", flip=True), "WRONG HASH"),
}


class TestProbe:
    def test_probe_selects_a_usable_mirror_and_reports_the_fault_of_each_unusable_one(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path
    ) -> None:
        content = index(sorted(wheels.glob("*.whl")))
        write_probe_files(isolated_envs, wheels)
        servers = {name: serve(content, fault) for name, (fault, _) in UNUSABLE.items()}
        pip_mirrors(
            isolated_envs,
            **servers,
            whole=serve(content),
            crawls=serve(content, Fault("/files/", bytes_a_second=100_000)),
        )
        done = provision("mirrors", "probe", "--tool", "pip", "--json", *flags)
        assert done.returncode == 0, done.stderr
        output = json.loads(done.stdout)
        rows = {row["name"]: row for row in output["tools"]["pip"]}
        assert output["chosen"]["pip"]["name"] == "whole"
        assert output["chosen"]["pip"]["then"] == ["crawls", "official"]
        for name, (_, problem) in UNUSABLE.items():
            assert problem in rows[name]["error"], name
            assert rows[name]["has_locked_files"] is False
        assert rows["official"]["reachable"] is False
        assert set(rows["whole"]) >= {"url", "megabytes_per_second", "final_host"}
        table = provision("mirrors", "probe", "--tool", "pip", "--no-color", *flags, COLUMNS="140").stdout
        assert "Campus Network Login" in table
        assert "pip: whole (" in table

    def test_mirror_with_a_plain_http_url_of_a_public_host_is_rejected(
        self, isolated_envs: Path, flags: list[object]
    ) -> None:
        write_catalogue(isolated_envs, pip={"bad": "http://mirror.example/simple"})
        done = provision("mirrors", "probe", *flags)
        assert done.returncode == 2
        assert "mirrors.toml, line 2, key pip.bad.url" in done.stderr
        assert "must be https" in done.stderr

    def test_users_catalogue_adds_mirrors_to_the_shipped_ones_and_disables_some(
        self, isolated_envs: Path, flags: list[object], tmp_path: Path
    ) -> None:
        write_catalogue(isolated_envs, pip={"one": "https://one.example"})
        (tmp_path / "mine.toml").write_text(
            '[hf.lan]\nurl = "http://192.168.1.9:8090"\n[pip.one]\nurl = "https://x.y"\nenabled = false\n'
        )
        output = json.loads(
            provision("mirrors", "list", "--json", *flags, "--catalogue", tmp_path / "mine.toml").stdout
        )
        assert [row["name"] for row in output["tools"]["hf"]] == ["lan"]
        assert output["tools"]["pip"] == []
        with (tmp_path / "host.toml").open("a") as host:
            host.write(f'catalogue = "{tmp_path}/mine.toml"\n')
        assert "192.168.1.9" in provision("mirrors", "list", *flags).stdout

    def test_every_shipped_mirror_has_an_https_url_and_a_documented_source(self) -> None:
        done = provision("mirrors", "list", "--json")
        assert done.returncode == 0, done.stderr
        output = json.loads(done.stdout)
        assert all(
            row["source"] and row["url"].startswith("https://") for rows in output["tools"].values() for row in rows
        )


def write_probe_files(envs: Path, wheels: Path) -> None:
    """Write the file of probe files, with an entry for each small wheel: its name, version, hash and size."""
    rows = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        rows.append(
            f'[[pip.cpu]]\nwhy = "largest"\nname = "{name}"\nversion = "{version}"\nfile = "{wheel.name}"\n'
            f'sha256 = "{digest}"\nsize = {wheel.stat().st_size}\n'
        )
    (envs / "diffusers/witnesses.toml").write_text("\n".join(rows))


class TestSetup:
    def test_first_setup_selects_a_mirror_and_installs_and_the_second_sends_no_request(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path, tmp_path: Path, home: Path
    ) -> None:
        mirror = serve(index(sorted(wheels.glob("*.whl"))))
        pip_mirrors(isolated_envs, near=mirror)
        done = provision("setup", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "pip near" in done.stdout
        assert "2 files from near" in done.stdout
        assert f"index-url = {mirror.url}/simple" in (prefix(tmp_path) / "pip.conf").read_text()
        assert mirror.url in (home / ".config/pip/pip.conf").read_text()
        assert mirror.url in (home / ".config/uv/uv.toml").read_text()
        assert not (home / ".condarc").exists(), "the home has no conda installation"
        assert not (tmp_path / "root/cache/arriving").exists()
        fetched = [line for line in journal(tmp_path) if line.get("act") == "fetched"]
        assert {(line["source"]) for line in fetched} == {"near"}
        requests, files = len(mirror.seen), sorted((tmp_path / "root/.firstlight/journal").iterdir())
        again = provision("setup", *flags)
        assert "nothing to change" in again.stdout, again.stdout
        assert (len(mirror.seen), sorted((tmp_path / "root/.firstlight/journal").iterdir())) == (requests, files)

    def test_setup_downloads_from_the_next_mirror_after_the_selected_one_stalls(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path, tmp_path: Path
    ) -> None:
        content = index(sorted(wheels.glob("*.whl")))
        failing = serve(content)
        pip_mirrors(isolated_envs, failing=failing, other=serve(content))
        assert provision("mirrors", "use", "failing", *flags).returncode == 0
        big = next(path for path in content if "torch" in path and path.startswith("/files"))
        failing.faults = [Fault(big, stall_at=len(content[big]) // 2)]
        done = provision("setup", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "from other (failing: it timed out" in done.stdout

    def test_setup_bans_and_names_a_mirror_that_sends_wrong_content(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path, tmp_path: Path
    ) -> None:
        content = index(sorted(wheels.glob("*.whl")))
        corrupt = serve(content)
        pip_mirrors(isolated_envs, corrupt=corrupt, intact=serve(content))
        assert provision("mirrors", "use", "corrupt", *flags).returncode == 0
        corrupt.faults = [Fault("/files/torch", flip=True)]
        done = provision("setup", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "corrupt is not used again in this run: torch-9.9+tiny-py3-none-any.whl: it sent content" in done.stdout
        assert any(line.get("act") == "mirror" for line in journal(tmp_path))

    def test_setup_keeps_the_users_pip_index_until_the_user_selects_a_mirror(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path, home: Path, index_server: Server
    ) -> None:
        mirror = serve(index(sorted(wheels.glob("*.whl"))))
        pip_mirrors(isolated_envs, near=mirror)
        (home / ".config/pip").mkdir(parents=True)
        own = f"[global]\nindex-url = {index_server.url}/simple\n"
        (home / ".config/pip/pip.conf").write_text(own)
        done = provision("setup", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"this machine's own setting stays: pip's index-url = {index_server.url}" in done.stdout
        assert not mirror.seen
        assert (home / ".config/pip/pip.conf").read_text() == own
        named = provision("mirrors", "use", "near", *flags)
        assert named.returncode == 0, named.stdout + named.stderr
        assert mirror.url in (home / ".config/pip/pip.conf").read_text(), (
            "a mirror that the user names replaces the setting"
        )
        assert provision("mirrors", "restore", *flags[:4]).returncode == 0
        assert (home / ".config/pip/pip.conf").read_text() == own

    def test_conda_package_that_the_selected_mirror_lacks_is_installed_from_the_next_mirror(
        self,
        serve: Any,
        isolated_envs: Path,
        conda_envs: Path,
        channel_folder: Path,
        flags: list[object],
        wheels: Path,
        tmp_path: Path,
    ) -> None:
        served = {
            f"/cloud/{path.relative_to(channel_folder)}": path.read_bytes()
            for path in channel_folder.rglob("*")
            if path.is_file()
        }
        failing, whole, pip = serve(served), serve(served), serve(index(sorted(wheels.glob("*.whl"))))
        urls = {"failing": f"{failing.url}/cloud", "whole": f"{whole.url}/cloud"}
        write_catalogue(isolated_envs, conda=urls, pip={"near": f"{pip.url}/simple"})
        assert provision("mirrors", "use", "failing", *flags).returncode == 0
        failing.faults = [Fault("hello", status=404)]
        done = provision("setup", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "from conda" in done.stdout
        assert "hello-1.0-0.tar.bz2 from whole (failing: it answers 404" in done.stdout
        condarc = (prefix(tmp_path) / ".condarc").read_text()
        assert f"channel_alias: {failing.url}/cloud" in condarc
        sources = {
            line["source"] for line in journal(tmp_path) if line.get("act") == "fetched" and "tar.bz2" in line["file"]
        }
        assert sources == {"failing", "whole"}

    def test_setup_pulls_a_model_file_from_the_next_hub_after_wrong_content(
        self,
        serve: Any,
        isolated_envs: Path,
        flags: list[object],
        wheels: Path,
        hub: FakeHub,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delenv("HF_ENDPOINT")
        (isolated_envs / "models.toml").write_text(hub.manifest())
        (tmp_path / "host.toml").write_text('relocate = []\nmodels = ["model"]\n')
        corrupt = serve({f"/{hub.repo}/resolve/{hub.revision}/{path}": content for path, content in hub.files.items()})
        tree = f"/api/models/{hub.repo}/tree/{hub.revision}"
        corrupt.content[tree] = json.dumps(hub.entries()).encode()
        pip = serve(index(sorted(wheels.glob("*.whl"))))
        write_catalogue(
            isolated_envs, hf={"corrupt": corrupt.url, "intact": hub.url}, pip={"near": f"{pip.url}/simple"}
        )
        assert provision("mirrors", "use", "corrupt", *flags).returncode == 0
        corrupt.faults = [Fault("safetensors", flip=True)]
        done = provision("setup", *flags, HF_TOKEN="hf_" + "s" * 20)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "corrupt is not used again in this run: model.safetensors" in done.stdout
        assert "model.safetensors from intact" in done.stdout
        assert "hf_sss" not in str(corrupt.seen) + str(hub.seen) + done.stdout + done.stderr

    def test_environment_built_after_a_hub_mirror_was_selected_has_the_mirror_in_hf_endpoint(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path, tmp_path: Path
    ) -> None:
        pip = serve(index(sorted(wheels.glob("*.whl"))))
        write_catalogue(isolated_envs, hf={"near": pip.url}, pip={"near": f"{pip.url}/simple"})
        assert provision("mirrors", "use", "near", *flags).returncode == 0
        assert provision("env", "create", "diffusers", *flags).returncode == 0
        argv = [str(prefix(tmp_path) / "bin/python"), "-c", "import os; print(os.environ.get('HF_ENDPOINT'))"]
        assert subprocess.run(argv, env={}, capture_output=True, text=True, check=True).stdout == f"{pip.url}\n"

    def test_environment_from_a_mirror_is_repaired_after_the_mirror_has_closed(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path, tmp_path: Path
    ) -> None:
        mirror = serve(index(sorted(wheels.glob("*.whl"))))
        pip_mirrors(isolated_envs, near=mirror)
        assert provision("setup", *flags).returncode == 0
        mirror.close()
        harmed = next(prefix(tmp_path).glob("lib/*/site-packages/torch/big.txt"))
        harmed.unlink()
        done = provision("repair", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert harmed.exists()

    def test_setup_and_mirrors_use_with_offline_contact_no_mirror(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path
    ) -> None:
        mirror = serve(index(sorted(wheels.glob("*.whl"))))
        pip_mirrors(isolated_envs, near=mirror)
        assert "this run is offline" in provision("setup", "--offline", *flags).stdout
        assert provision("mirrors", "use", "near", "--offline", *flags).returncode == 0
        assert not mirror.seen


class TestUse:
    def test_undo_of_mirrors_use_removes_the_settings_that_it_wrote(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path, home: Path
    ) -> None:
        pip_mirrors(isolated_envs, near=serve(index(sorted(wheels.glob("*.whl")))))
        before = sorted(str(path) for path in home.rglob("*"))
        assert provision("mirrors", "use", "auto", *flags).returncode == 0
        assert (home / ".config/pip/pip.conf").exists()
        done = provision("undo", *flags[:4])
        assert done.returncode == 0, done.stdout + done.stderr
        assert sorted(str(path) for path in home.rglob("*")) == before
        assert "UV_DEFAULT_INDEX" not in provision("shellenv", *flags[:4]).stdout

    def test_mirrors_use_rejects_an_unusable_mirror_and_writes_no_settings(
        self, serve: Any, isolated_envs: Path, flags: list[object], home: Path
    ) -> None:
        pip_mirrors(isolated_envs, dead=serve({}, Fault(body=PORTAL)))
        done = provision("mirrors", "use", "dead", *flags)
        assert done.returncode == 1
        assert "dead cannot be used for pip" in done.stdout + done.stderr
        assert "mirrors probe" in done.stdout + done.stderr
        assert not (home / ".config").exists()

    def test_mirrors_use_official_removes_the_settings_of_the_earlier_mirror(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path, home: Path
    ) -> None:
        pip_mirrors(isolated_envs, near=serve(index(sorted(wheels.glob("*.whl")))))
        assert provision("mirrors", "use", "near", *flags).returncode == 0
        assert provision("mirrors", "use", "official", *flags).returncode == 0
        assert not (home / ".config/pip/pip.conf").exists()
        assert provision("shellenv", *flags[:4]).stdout == ""

    def test_status_after_mirrors_restore_reports_that_no_mirror_is_used(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path, home: Path
    ) -> None:
        mirror = serve(index(sorted(wheels.glob("*.whl"))))
        pip_mirrors(isolated_envs, near=mirror)
        assert provision("mirrors", "use", "auto", *flags).returncode == 0
        done = provision("mirrors", "restore", *flags[:4])
        assert done.returncode == 0, done.stdout + done.stderr
        assert not (home / ".config").exists()
        status = provision("status", *flags).stdout
        assert "no mirrors since `mirrors restore`" in status

    def test_mirrors_use_reports_a_variable_of_the_shell_that_overrides_the_mirror(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path
    ) -> None:
        pip_mirrors(isolated_envs, near=serve(index(sorted(wheels.glob("*.whl")))))
        done = provision("mirrors", "use", "near", *flags, UV_DEFAULT_INDEX="https://mine.example")
        assert "UV_DEFAULT_INDEX is set in this shell and has priority over the mirror" in done.stdout, done.stderr

    def test_host_toml_selects_a_mirror_for_each_tool_and_an_unknown_mirror_is_rejected(
        self, serve: Any, isolated_envs: Path, flags: list[object], wheels: Path, tmp_path: Path
    ) -> None:
        near = serve(index(sorted(wheels.glob("*.whl"))))
        write_catalogue(isolated_envs, pip={"near": f"{near.url}/simple"}, hf={"lan": "http://127.0.0.1:9"})
        with (tmp_path / "host.toml").open("a") as host:
            host.write('mirror = {pip = "near", hf = "keep"}\n')
        done = provision("plan", *flags)
        assert "pip, conda, torch: not chosen yet" in done.stdout, done.stdout + done.stderr
        (tmp_path / "host.toml").write_text('models = []\nmirror = {pip = "nobody"}\n')
        done = provision("plan", *flags)
        assert (
            done.returncode,
            "unknown mirror of pip " in done.stderr,
        ) == (2, True)
        (tmp_path / "host.toml").write_text("mirror = 3\n")
        assert "host.toml, line 1, key mirror: " in provision("plan", *flags).stderr

    @pytest.mark.parametrize(
        ("argv", "problem"),
        [(["nobody"], "unknown mirror 'nobody'"), (["near", "--tool", "conda"], "unknown mirror of conda")],
    )
    def test_mirrors_use_rejects_an_unknown_mirror_or_a_mirror_of_another_tool(
        self, serve: Any, isolated_envs: Path, flags: list[object], argv: list[str], problem: str
    ) -> None:
        pip_mirrors(isolated_envs, near=serve({}))
        done = provision("mirrors", "use", *argv, *flags)
        assert (done.returncode, problem in done.stderr) == (2, True), done.stderr


@pytest.fixture
def index_server(serve: Any, wheels: Path) -> Server:
    served: Server = serve(index(sorted(wheels.glob("*.whl"))))
    return served
