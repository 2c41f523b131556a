"""Tests that the Hugging Face folders equal huggingface_hub's own constants, for every mix of its variables."""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub

from provision.core.client_folders import client_folders

if TYPE_CHECKING:
    import pytest

CONSTANTS = Path(huggingface_hub.__file__).with_name("constants.py")
VALUES = {
    "HF_HUB_CACHE": [None, "", "./models", "$PLACE/hub", "/hub//", "~/${PLACE}x"],
    "HUGGINGFACE_HUB_CACHE": [None, "", "~/old", "/old/$NOT_SET"],
    "HF_HOME": [None, "", "~", "~/hf", "${PLACE}/hf", "rel/$PLACE", "~no-such-user/hf"],
    "XDG_CACHE_HOME": [None, "", "~/x", "/x"],
    "HF_XET_CACHE": [None, "~/$PLACE", "/xet"],
}


def loaded_constants() -> Any:
    """Execute huggingface_hub's constants.py anew with the current environment variables, and return the module."""
    spec = importlib.util.spec_from_file_location("constants_of_this_environment", CONSTANTS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hugging_face_folders_equal_the_constants_of_huggingface_hub_for_every_mix_of_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLACE", "/pl ace")
    for values in itertools.product(*VALUES.values()):
        for name, value in zip(VALUES, values, strict=True):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        constants = loaded_constants()
        folders = client_folders(os.environ, Path.home())
        expected = [
            Path(text).absolute() for text in (constants.HF_HOME, constants.HF_HUB_CACHE, constants.HF_XET_CACHE)
        ]
        assert [folders.home, folders.hub, folders.xet] == expected, dict(zip(VALUES, values, strict=True))
        assert folders.is_relative == (not Path(constants.HF_HUB_CACHE).is_absolute())


def test_variable_that_decides_the_hub_folder_is_named_and_is_none_for_the_default(home: Path) -> None:
    environ = {"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}
    assert client_folders(environ, home).variable == "HF_HUB_CACHE"
    assert client_folders({"HF_HOME": "/b"}, home).variable == "HF_HOME"
    assert client_folders({"XDG_CACHE_HOME": f"{home}/.cache"}, home).variable is None, "the folder is the default one"
