"""Tests the text that is written into settings files of pip, conda and uv; settings and comments of the user stay."""

from __future__ import annotations

import configparser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from provision.config.toml import parse_toml
from provision.core.errors import SpecError
from provision.mirrors import config_text
from provision.mirrors.chosen_mirrors import MirrorSource
from provision.mirrors.tools import conda

INDEX = "https://mirror.example/simple"
CHANNELS = {"conda-forge": "https://m.example/cloud/conda-forge", "nvidia": "https://n.example/x/nvidia"}
VALUES = conda.settings(
    MirrorSource("m", "https://m.example/cloud", channels=CHANNELS, defaults="https://m.example/pkgs"),
    nodefaults=False,
)
ends = st.sampled_from(["\n", "\r\n"])
words = st.text("abcdefgh é中-", min_size=1, max_size=8).map(str.strip).filter(bool)


@st.composite
def ini(draw: st.DrawFn) -> bytes:
    """Draw a pip.conf with comments, unusual spaces, blank lines, several values, and LF or CRLF line ends."""
    end = draw(ends)
    lines: list[str] = []
    for section in draw(st.lists(st.sampled_from(["global", "install", "list", "freeze"]), unique=True)):
        lines += [*draw(st.lists(words.map(lambda word: f"# {word}"), max_size=1)), f"[{section}]"]
        for name in draw(st.lists(st.sampled_from(["timeout", "retries", "extra-index-url", "cert"]), unique=True)):
            gap = draw(st.sampled_from([" = ", "=", "  =  ", ": "]))
            values = draw(st.lists(words, min_size=1, max_size=2))
            lines.append(f"{name}{gap}{values[0]}")
            lines += [f"    {value}" for value in values[1:]]
            lines += [""] * draw(st.integers(0, 2))
    return (end.join(lines) + draw(st.sampled_from(["", end]))).encode()


@st.composite
def yaml(draw: st.DrawFn) -> bytes:
    """Draw a .condarc with comments, lists of any indentation, the user's own mapping, and LF or CRLF line ends."""
    end = draw(ends)
    lines = draw(st.lists(words.map(lambda word: f"# {word}"), max_size=2))
    indent = " " * draw(st.integers(0, 4))
    for name in draw(st.lists(st.sampled_from(["channels", "pkgs_dirs", "envs_dirs"]), unique=True)):
        lines += [f"{name}:", *(f"{indent}- w{number}" for number in range(draw(st.integers(1, 3))))]
    lines += draw(st.lists(st.sampled_from(["ssl_verify: true", "auto_activate: false  # mine"]), unique=True))
    if draw(st.booleans()):
        lines += ["custom_channels:", "  mine: https://corp.example  # keep", "  other:    'https://o.example'"]
    return (end.join(lines) + draw(st.sampled_from(["", end]))).encode()


@st.composite
def toml(draw: st.DrawFn) -> bytes:
    """Draw a uv.toml with comments, tables, the user's own indexes, and LF or CRLF line ends."""
    end = draw(ends)
    lines = draw(st.lists(words.map(lambda word: f"# {word}"), max_size=2))
    lines += draw(st.lists(st.sampled_from(["offline = false", "native-tls   =  true # x"]), unique=True))
    if draw(st.booleans()):
        lines += ["[pip]", "strict = true"]
    if draw(st.booleans()):
        lines += ["[[index]]", 'name = "corp"', 'url = "https://corp.example"']
    return (end.join(lines) + draw(st.sampled_from(["", end]))).encode()


def parse_ini(content: bytes) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser()
    parser.read_string(content.decode())
    return {section: dict(parser[section]) for section in parser.sections()}


class TestPip:
    @hypothesis_settings(max_examples=400, deadline=None)
    @given(ini())
    def test_index_is_added_to_pip_conf_and_removed_without_another_changed_byte(self, content: bytes) -> None:
        written = config_text.pip_config(content, INDEX)
        before = parse_ini(content)
        assert parse_ini(written) == {**before, "global": {**before.get("global", {}), "index-url": INDEX}}
        assert config_text.pip_config(written, INDEX) == written
        assert config_text.pip_config(written, None) == content

    def test_users_index_in_pip_conf_is_replaced_in_place(self) -> None:
        before = b"# mine\r\n[install]\r\nindex_url :\r\n   https://a\r\n   https://b\r\ntimeout=3\r\n"
        after = config_text.pip_config(before, INDEX)
        assert after == b"# mine\r\n[install]\r\nindex_url :" + INDEX.encode() + b"\r\ntimeout=3\r\n"

    @pytest.mark.parametrize(
        "content",
        [b"[global]\nx=1\n[global]\ny=2\n", b"no section\n", b"\xff\xfe"],
        ids=["duplicate section", "no section", "not UTF-8"],
    )
    def test_pip_conf_that_pip_cannot_read_is_rejected(self, content: bytes) -> None:
        with pytest.raises(SpecError, match="pip cannot read this file"):
            config_text.pip_config(content, INDEX)


class TestConda:
    @hypothesis_settings(max_examples=300, deadline=None)
    @given(yaml())
    def test_channels_are_set_in_condarc_and_every_key_and_comment_of_the_user_stays(self, content: bytes) -> None:
        def load(text: bytes) -> dict[str, Any]:
            return dict(YAML(typ="safe").load(text.decode()) or {})

        before, written = load(content), config_text.condarc(content, VALUES)
        after = load(written)
        custom = {**before.get("custom_channels", {}), **VALUES["custom_channels"]}
        assert after == {**before, **VALUES, "custom_channels": custom}
        assert list(after)[: len(before)] == list(before), "the user's order stays"
        assert config_text.condarc(written, VALUES) == written
        for comment in (line.partition(b"#")[2] for line in content.splitlines() if b"#" in line):
            assert comment.strip() in written
        if b"custom_channels" not in content:
            assert content in written
            assert config_text.condarc(written, {}) == content

    @pytest.mark.parametrize(
        "content", [b"- a\n", b"a: [\n", b"a: 1\na: 2\n"], ids=["a list", "not YAML", "duplicate key"]
    )
    def test_condarc_that_conda_cannot_read_is_rejected(self, content: bytes) -> None:
        with pytest.raises(SpecError, match=r"it is not (a mapping|valid YAML)"):
            config_text.condarc(content, VALUES)

    def test_condarc_settings_with_nodefaults_have_no_default_channels(self) -> None:
        values = conda.settings(MirrorSource("m", "https://m/c", defaults="https://m/p"), nodefaults=True)
        assert values["channels"] == ["conda-forge", "nodefaults"]
        assert "default_channels" not in values


class TestUv:
    @hypothesis_settings(max_examples=300, deadline=None)
    @given(toml())
    def test_index_is_added_to_uv_toml_and_removed_without_another_changed_byte(self, content: bytes) -> None:
        before, written = parse_toml(content.decode()), config_text.uv_config(content, INDEX)
        after = parse_toml(written.decode())
        assert after.pop("index") == [*before.pop("index", []), {"url": INDEX, "default": True}]
        assert after == before
        assert config_text.uv_config(written, INDEX) == written
        assert config_text.uv_config(written, None) == content

    @pytest.mark.parametrize(
        "content",
        [b'index-url = "https://a" # c\n', b'[[index]]\nurl = "https://a" # c\ndefault = true\n'],
        ids=["index-url", "index table"],
    )
    def test_users_default_index_in_uv_toml_is_replaced_in_place(self, content: bytes) -> None:
        assert config_text.uv_config(content, INDEX) == content.replace(b"https://a", INDEX.encode())

    def test_index_is_added_to_an_inline_array_of_indexes_in_uv_toml(self) -> None:
        settings = parse_toml(config_text.uv_config(b'index = [{url = "https://a"}]\n', INDEX).decode())
        assert settings["index"] == [{"url": "https://a"}, {"url": INDEX, "default": True}]

    def test_uv_toml_that_is_not_valid_toml_is_rejected(self) -> None:
        with pytest.raises(SpecError, match="not valid TOML"):
            config_text.uv_config(b"a = \n", INDEX)
