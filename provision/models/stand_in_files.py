"""Writes the files of a stand-in as the repository of its model has them: configurations, tokenizers, random weights.

Every number is of one seeded pool, in PyTorch's default range (uniform, one over the root of the fan-in), and in half
precision under the plain file names: a program that loads them gets the precision that it asks for.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from provision.models.architectures import Architecture

BYTES = 2  # of a number in half precision
_SEED = 0
# A prime, so that no row of a weight repeats another; its bytes stay in a core's second cache while they are written
# again and again: blocks of 64 KiB are written three to nine times as fast as blocks of 4 MiB (2 shared cores, ext4).
_POOL = 32749
# Above every cosine: the checker's random weights flag no image.
_NEVER = {"concept_embeds_weights": 2.0, "special_care_embeds_weights": 2.0}
# The parts that a pipeline takes and may lack.
_OPTIONAL = {
    "StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionInpaintPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionXLPipeline": ("feature_extractor", "image_encoder"),
}

Shapes = dict[str, list[Any]]


@dataclass(frozen=True)
class WrittenFile:
    """One file: its place in the repository, and the sha256 of its content."""

    path: str
    sha256: str


def write(
    folder: Path,
    architecture: Architecture,
    description: Mapping[str, Any],
    *,
    variant: str | None,
    parts: frozenset[str],
    progress: Callable[[int], None],
) -> list[WrittenFile]:
    """Write every file of a stand-in.

    Args:
        folder: where the repository's files go.
        architecture: what is written.
        description: what the worker tells of it.
        variant: of the weights' file names.
        parts: the components with weights that are written; the others are left out.
        progress: told the bytes of weights that were written.

    Returns:
        The files with their hashes.
    """
    weights: dict[str, Shapes] = {}
    for name, told in description["components"].items():
        if name not in parts:
            continue
        place = "" if architecture.is_flat else f"{name}/"
        library, _ = architecture.classes[name]
        _dump(folder / place / "config.json", _versioned(told["config"], library, description))
        stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
        weights[f"{place}{stem}{f'.{variant}' if variant else ''}.safetensors"] = told["tensors"]
    for name in architecture.tokenizers:
        _write_tokenizer(folder / name)
    for name, (kind, settings) in architecture.processors.items():
        _dump(folder / name / "preprocessor_config.json", {"image_processor_type": kind, **settings})
    if architecture.scheduler:
        place = "scheduler_config.json" if architecture.is_flat else "scheduler/scheduler_config.json"
        _dump(folder / place, _versioned(description["scheduler"], "diffusers", description))
    if architecture.pipeline:
        _dump(folder / "model_index.json", _index(architecture, description["diffusers"], parts))
    small = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    written = [
        WrittenFile(path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in small
    ]
    return written + _write_weights(folder, weights, progress)


def _versioned(config: Mapping[str, Any], library: str, description: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, **({"_diffusers_version": description["diffusers"]} if library == "diffusers" else {})}


def _index(architecture: Architecture, version: str, parts: frozenset[str]) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": architecture.pipeline, "_diffusers_version": version}
    index |= {name: [None, None] for name in _OPTIONAL.get(architecture.pipeline or "", ())}
    index |= {name: list(architecture.classes[name]) for name in sorted(parts)}
    index |= {name: ["transformers", kind] for name, kind in architecture.tokenizers.items()}
    index |= {name: ["transformers", kind] for name, (kind, _) in architecture.processors.items()}
    if architecture.scheduler:
        index["scheduler"] = ["diffusers", architecture.scheduler[0]]
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    return dict(sorted(index.items()))


def _write_weights(folder: Path, files: Mapping[str, Shapes], progress: Callable[[int], None]) -> list[WrittenFile]:
    """Write the files one after another, and hash their content at the same time, on another core."""
    pool = _Pool()
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as hashing:
        try:
            hashes = {path: hashing.submit(_hash, pool, shapes, stopped) for path, shapes in files.items()}
            for path, shapes in files.items():
                with (folder / path).open("wb", buffering=0) as out:
                    for block in pool.content(shapes):
                        _write_all(out, block)
                        progress(len(block))
            return [WrittenFile(path, done.result()) for path, done in hashes.items()]
        finally:
            stopped.set()


def _write_all(out: Any, block: memoryview) -> None:  # noqa: ANN401 (an unbuffered file)
    while block:
        block = block[out.write(block) :]  # a disk that fills up takes a part, then says so


def _hash(pool: _Pool, shapes: Shapes, stopped: threading.Event) -> str:
    digest = hashlib.sha256()
    for block in pool.content(shapes):
        if stopped.is_set():
            break
        digest.update(block)
    return digest.hexdigest()


class _Pool:
    """Random numbers, scaled for every fan-in that was asked for: few differ."""

    def __init__(self) -> None:
        """Draw them."""
        import numpy as np

        self._drawn = np.random.default_rng(_SEED).uniform(-1, 1, _POOL)
        self._scaled: dict[int, memoryview] = {}

    def content(self, shapes: Shapes) -> Iterator[memoryview]:
        """A safetensors file of tensors of these shapes, in blocks."""
        yield memoryview(_header(shapes))
        for name, shape in shapes.items():
            yield from self._tensor(name, shape)

    def _tensor(self, name: str, shape: list[Any]) -> Iterator[memoryview]:
        import numpy as np

        if shape[:1] == ["I64"]:
            yield memoryview(np.arange(math.prod(shape[1:]), dtype="<i8").tobytes())
        elif len(shape) < 2:
            value = _NEVER.get(name, float(name.endswith("weight")))
            yield memoryview(np.full(math.prod(shape), value, "<f2").tobytes())
        else:
            whole = self._of(math.prod(shape[1:]))
            again, rest = divmod(math.prod(shape), _POOL)
            for _ in range(again):
                yield whole
            yield whole[: rest * BYTES]

    def _of(self, fan_in: int) -> memoryview:
        if fan_in not in self._scaled:
            self._scaled[fan_in] = memoryview((self._drawn / math.sqrt(fan_in)).astype("<f2").tobytes())
        return self._scaled[fan_in]


def _header(shapes: Shapes) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        is_whole = shape[:1] == ["I64"]
        sizes = shape[1:] if is_whole else shape
        begin, end = end, end + math.prod(sizes) * (8 if is_whole else BYTES)
        header[name] = {"dtype": "I64" if is_whole else "F16", "shape": sizes, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tokenizer(place: Path) -> None:
    """The smallest CLIP tokenizer: bytes, bytes that end a word, a few pairs, the begin and the end.

    Source of the bytes' letters: byte-level BPE as OpenAI published it with GPT-2.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(len(others))]
    pairs = [("t", "h"), ("th", "e</w>"), ("a", "n"), ("i", "n")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    begin, end = "<|startoftext|>", "<|endoftext|>"
    _dump(place / "vocab.json", {word: number for number, word in enumerate([*words, begin, end])})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (place / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": end}
    _dump(place / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _dump(place / "tokenizer_config.json", special | settings)


def _dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
