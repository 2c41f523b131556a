"""Tests the files that people write (host.toml, models.toml, torch.toml), and the messages about errors in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from provision.config import host, models, toml
from provision.config import torch as torch_config
from provision.core.errors import Exit, SpecError
from tests.conftest import CHECKOUT


def test_shipped_manifest_and_torch_toml_are_valid() -> None:
    manifest = toml.load_tables(CHECKOUT / "envs/models.toml", models.ModelSpec)
    assert {"ddpm-cat-256", "stable-diffusion-v1-5", "stable-diffusion-v1-5@fp16"} <= set(manifest)
    unet = next(file for file in manifest["stable-diffusion-v1-5@fp16"].files if file.path.startswith("unet/diff"))
    assert (unet.size, unet.locked) == (1719125304, True)
    torch = toml.load(CHECKOUT / "envs/torch.toml", torch_config.TorchSpec)
    for variant in torch.variant:
        assert (CHECKOUT / "envs/diffusers" / f"{variant.name}.lock").exists()


def test_each_entry_of_a_shipped_lock_file_has_a_hash_and_no_url() -> None:
    for lock in CHECKOUT.glob("envs/*/*.lock"):
        text = lock.read_text()
        assert "://" not in text, lock
        entries = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
        assert len(entries) > 20
        assert all(line.endswith("\\") for line in entries), f"{lock}: an entry has no hash"


def test_missing_host_toml_gives_defaults_and_a_missing_file_named_by_a_flag_is_an_error(tmp_path: Path) -> None:
    assert host.load_host(None) == host.HostSpec()
    Path("host.toml").write_text('env = "other"\n')
    assert host.load_host(None).env == "other"
    with pytest.raises(SpecError, match="does not exist"):
        host.load_host(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("text", "location", "line"),
    [
        ("a = 1\nb = 2\n", ("b",), 2),
        ("[t]\na = 1\n[u]\na = 1\n", ("u", "a"), 4),
        ("a = 1\n[t]\nb = 1\n", ("t", "missing"), 2),
        ("x.y = 1\n", ("x", "y"), 1),
        ('"a b" = 1\nc = 2\n', ("c",), 2),
        ("[[v]]\na = 1\n[[v]]\na = 2\n", ("v", 1, "a"), 4),
        ("[[v]]\na = 1\n[[v]]\na = 2\n", ("v", 0, "a"), 2),
        ("[[v]]\na = 1\n[[v]]\nb = 2\n", ("v", 1, "a"), 3),
        ("files = [\n  {path = 1},\n]\n", ("files", 0, "path"), 1),
        ("", ("a",), 1),
    ],
)
def test_line_of_returns_the_line_of_a_key_or_of_the_table_that_lacks_the_key(
    text: str, location: tuple[int | str, ...], line: int
) -> None:
    assert toml.line_of(text, location) == line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"root = 3\n", "line 1, key root: Input should be a valid string"),
        (
            b"\nroots = 'x'\n",
            "line 2, key roots: unknown key. Known keys: root, env, interpreter, variant, ",
        ),
        (b"relocate = ['nonsense']\n", "key relocate.0"),
        (b"env = '../../etc'\n", "key env"),
        (b"root = \xff\n", "is not valid TOML"),
        (b"root = 'a'\nroot = 'b'\n", "is not valid TOML"),
    ],
)
def test_invalid_host_toml_is_rejected_with_its_file_and_its_line_and_key(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "host.toml"
    file.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        toml.load(file, host.HostSpec)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.exit is Exit.USAGE


def test_unknown_key_of_an_inner_table_lists_the_keys_of_that_table(tmp_path: Path) -> None:
    file = tmp_path / "torch.toml"
    file.write_text('python = ["3.11"]\n[[variant]]\nname = "cpu"\ntorch = "1"\ndrivers = "2"\n')
    with pytest.raises(
        SpecError,
        match=r"line 5, key variant\.0\.drivers: unknown key\. Known keys: name, torch, system, machine, ",
    ):
        toml.load(file, torch_config.TorchSpec)


def test_choose_rejects_an_unknown_name_and_lists_the_available_names() -> None:
    assert toml.choose("a", ["a", "b"], "model") == "a"
    with pytest.raises(SpecError, match="unknown model 'c'; available: a, b"):
        toml.choose("c", ["a", "b"], "model")


@pytest.mark.parametrize(
    "path",
    [
        "CON",
        "aux.json",
        "NUL.safetensors",
        "unet/com1.txt",
        "LPT9",
        "nul .txt",
        ".git/config",
        "x/.GIT/config",
        "~/x",
        "~",
        "-rf",
        "unet/-x.json",
        "a:b.json",
        "a*b.json",
        "a?.json",
        "<a>.json",
        'a"b.json',
        "a|b.json",
        "a\N{RIGHT-TO-LEFT OVERRIDE}fdp.json",
        "a\N{ZERO WIDTH SPACE}b.json",
    ],
)
def test_model_file_name_with_a_special_meaning_on_some_system_is_rejected(path: str) -> None:
    with pytest.raises(ValueError, match=r"is not a file name on every system|is not a plain relative path"):
        models.ModelFile(path=path)


@pytest.mark.parametrize(
    "path",
    ["console.json", "com10.txt", "nullable.json", "a-b.json", "a~b.json", "git/config", "unet/aux_model.safetensors"],
)
def test_model_file_name_similar_to_a_forbidden_one_is_accepted(path: str) -> None:
    assert models.ModelFile(path=path).path == path


def test_model_file_pinned_by_git_hash_alone_is_rejected_without_its_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a git_sha1 and no size; add the size"):
        models.ModelFile(path="a.json", git_sha1="1" * 40)
    assert models.ModelFile(path="a.json", git_sha1="1" * 40, size=0).locked
    assert models.ModelFile(path="a.json", git_sha1="1" * 40, sha256="2" * 64).locked
