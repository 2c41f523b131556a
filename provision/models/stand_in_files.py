"""Writes the files of a stand-in in the layout of its model's repository: configurations, tokenizers, random weights.

All weights repeat one pool of random numbers, made with a fixed seed. Their range is PyTorch's default: uniform between
-1 / sqrt(fan-in) and 1 / sqrt(fan-in). They are stored in half precision, also under file names without a variant; a
program loads them in the dtype that it requests.
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

BYTES = 2  # size of a number in half precision
_SEED = 0
# The number of random numbers in the pool. It is a prime, so that no row of a weight repeats another row. The 64 KiB of
# the pool stay in a core's second-level cache, so they are written three to nine times as fast as blocks of 4 MiB
# (measured on 2 shared cores, ext4).
_POOL = 32749
# Thresholds above 1, the largest cosine, so that the safety checker with random weights flags no image.
_UNREACHABLE_THRESHOLDS = {"concept_embeds_weights": 2.0, "special_care_embeds_weights": 2.0}
# {pipeline: the components that may be null in its model_index.json}.
_OPTIONAL = {
    "StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionInpaintPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionXLPipeline": ("feature_extractor", "image_encoder"),
}

Shapes = dict[str, list[Any]]  # {tensor: its shape}, as describe_architecture.py prints it


@dataclass(frozen=True)
class WrittenFile:
    """Describe one written file: its path in the repository, and the sha256 of its content in hex."""

    path: str
    sha256: str


def write(
    folder: Path,
    architecture: Architecture,
    description: Mapping[str, Any],
    *,
    variant: str | None,
    components: frozenset[str],
    progress: Callable[[int], None],
) -> list[WrittenFile]:
    """Write every file of a stand-in.

    Args:
        folder: the folder into which the files of the repository are written.
        architecture: the architecture.
        description: the description of the architecture, the output of describe_architecture.py.
        variant: the variant in the names of the files with weights; None for names without a variant.
        components: the names of the components with weights to write; the others are left out.
        progress: called with the number of bytes of weights written since the last call.

    Returns:
        The path and the sha256 of each file.
    """
    weights: dict[str, Shapes] = {}
    for name, component in description["components"].items():
        if name not in components:
            continue
        prefix = "" if architecture.is_flat else f"{name}/"
        library, _ = architecture.classes[name]
        _dump(folder / prefix / "config.json", _versioned(component["config"], library, description))
        stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
        weights[f"{prefix}{stem}{f'.{variant}' if variant else ''}.safetensors"] = component["tensors"]
    for name in architecture.tokenizers:
        _write_tokenizer(folder / name)
    for name, (class_name, settings) in architecture.processors.items():
        _dump(folder / name / "preprocessor_config.json", {"image_processor_type": class_name, **settings})
    if architecture.scheduler:
        path = "scheduler_config.json" if architecture.is_flat else "scheduler/scheduler_config.json"
        _dump(folder / path, _versioned(description["scheduler"], "diffusers", description))
    if architecture.pipeline:
        _dump(folder / "model_index.json", _index(architecture, description["diffusers"], components))
    small = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    written = [
        WrittenFile(path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in small
    ]
    return written + _write_weights(folder, weights, progress)


def _versioned(config: Mapping[str, Any], library: str, description: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, **({"_diffusers_version": description["diffusers"]} if library == "diffusers" else {})}


def _index(architecture: Architecture, version: str, components: frozenset[str]) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": architecture.pipeline, "_diffusers_version": version}
    index |= {name: [None, None] for name in _OPTIONAL.get(architecture.pipeline or "", ())}
    index |= {name: list(architecture.classes[name]) for name in sorted(components)}
    index |= {name: ["transformers", class_name] for name, class_name in architecture.tokenizers.items()}
    index |= {name: ["transformers", class_name] for name, (class_name, _) in architecture.processors.items()}
    if architecture.scheduler:
        index["scheduler"] = ["diffusers", architecture.scheduler[0]]
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    return dict(sorted(index.items()))


def _write_weights(folder: Path, files: Mapping[str, Shapes], progress: Callable[[int], None]) -> list[WrittenFile]:
    """Write files of weights one after another, and hash their content at the same time in another thread.

    Args:
        folder: the folder of the repository.
        files: {path in the repository: the shapes of its tensors}.
        progress: called with the number of bytes of each written block.
    """
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
            return [WrittenFile(path, digest.result()) for path, digest in hashes.items()]
        finally:
            stopped.set()


def _write_all(out: Any, block: memoryview) -> None:  # noqa: ANN401 (an unbuffered file)
    while block:
        block = block[
            out.write(block) :
        ]  # if the disk becomes full, only a part of the block is written before the error


def _hash(pool: _Pool, shapes: Shapes, stopped: threading.Event) -> str:
    digest = hashlib.sha256()
    for block in pool.content(shapes):
        if stopped.is_set():
            break
        digest.update(block)
    return digest.hexdigest()


class _Pool:
    """Holds the pool of random numbers, and a copy of it that is scaled for each fan-in.

    A model has few different fan-ins, so the copies need little memory.
    """

    def __init__(self) -> None:
        """Generate the random numbers."""
        import numpy as np

        self._uniform = np.random.default_rng(_SEED).uniform(-1, 1, _POOL)
        self._scaled: dict[int, memoryview] = {}

    def content(self, shapes: Shapes) -> Iterator[memoryview]:
        """Yield, in blocks, the content of a safetensors file with random tensors of these shapes."""
        yield memoryview(_header(shapes))
        for name, shape in shapes.items():
            yield from self._tensor(name, shape)

    def _tensor(self, name: str, shape: list[Any]) -> Iterator[memoryview]:
        import numpy as np

        if shape[:1] == ["I64"]:
            yield memoryview(np.arange(math.prod(shape[1:]), dtype="<i8").tobytes())
        elif len(shape) < 2:
            value = _UNREACHABLE_THRESHOLDS.get(name, float(name.endswith("weight")))
            yield memoryview(np.full(math.prod(shape), value, "<f2").tobytes())
        else:
            block = self._scaled_for(math.prod(shape[1:]))
            repetitions, rest = divmod(math.prod(shape), _POOL)
            for _ in range(repetitions):
                yield block
            yield block[: rest * BYTES]

    def _scaled_for(self, fan_in: int) -> memoryview:
        if fan_in not in self._scaled:
            self._scaled[fan_in] = memoryview((self._uniform / math.sqrt(fan_in)).astype("<f2").tobytes())
        return self._scaled[fan_in]


def _header(shapes: Shapes) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        is_integer = shape[:1] == ["I64"]
        sizes = shape[1:] if is_integer else shape
        begin, end = end, end + math.prod(sizes) * (8 if is_integer else BYTES)
        header[name] = {"dtype": "I64" if is_integer else "F16", "shape": sizes, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tokenizer(folder: Path) -> None:
    """Write the files of a small CLIP tokenizer.

    Its tokens are all bytes, all bytes at the end of a word, the results of four merges, and the begin and end tokens.
    Source of the letters that represent the bytes: the byte-level BPE that OpenAI published with GPT-2.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other_bytes = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(other_bytes))]
    merges = [("t", "h"), ("th", "e</w>"), ("a", "n"), ("i", "n")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    begin, end = "<|startoftext|>", "<|endoftext|>"
    _dump(folder / "vocab.json", {token: number for number, token in enumerate([*tokens, begin, end])})
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": end}
    _dump(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _dump(folder / "tokenizer_config.json", special | settings)


def _dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
