"""Writes an architecture with seeded random weights, as a pipeline is saved; runs under the environment's interpreter.

Reads one request in JSON from stdin: {classes, configs, tokenizers, pipeline, scheduler, variant, dtype, seed, folder}.
The weights are written as they are made: no component is ever in memory as a whole.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

_POOL = 1 << 20
_BYTES = {"F16": "float16", "F32": "float32"}
_OPTIONAL = {
    "StableDiffusionPipeline": {"safety_checker", "feature_extractor", "image_encoder"},
    "StableDiffusionInpaintPipeline": {"safety_checker", "feature_extractor", "image_encoder"},
    "StableDiffusionXLPipeline": {"feature_extractor", "image_encoder"},
}


def main() -> int:
    """Do what stdin asks for."""
    asked = json.loads(sys.stdin.read())
    folder = Path(asked["folder"])
    index: dict[str, Any] = {"_class_name": asked["pipeline"], "_diffusers_version": _version()}
    for name, (library, kind) in asked["classes"].items():
        place = folder / name if asked["pipeline"] else folder
        _write_component(place, library, kind, asked["configs"][name], asked)
        index[name] = [library, kind]
    for name, kind in asked["tokenizers"].items():
        _write_tokenizer(folder / name)
        index[name] = ["transformers", kind]
    if asked["scheduler"]:
        import diffusers

        kind, settings = asked["scheduler"]
        getattr(diffusers, kind).from_config(settings).save_config(folder / "scheduler")
        index["scheduler"] = ["diffusers", kind]
    if asked["pipeline"]:
        index |= {part: [None, None] for part in sorted(_OPTIONAL.get(asked["pipeline"], ()))}
        if "safety_checker" in index:
            index["requires_safety_checker"] = False
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return 0


def _version() -> str:
    import diffusers

    return str(diffusers.__version__)


def _write_component(place: Path, library: str, kind: str, config: dict[str, Any], asked: dict[str, Any]) -> None:
    import diffusers
    import torch

    place.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        if library == "diffusers":
            component = getattr(diffusers, kind)(**config)
        else:
            import transformers

            made = getattr(transformers, kind)
            component = made(made.config_class(**config))
    variant = f".{asked['variant']}" if asked["variant"] else ""
    if library == "diffusers":
        component.save_config(place)
        file = place / f"diffusion_pytorch_model{variant}.safetensors"
    else:
        component.config.architectures = [kind]
        component.config.save_pretrained(place)
        file = place / f"model{variant}.safetensors"
    shapes = {
        name: (tuple(weight.shape), weight.is_floating_point()) for name, weight in component.state_dict().items()
    }
    _write_weights(file, shapes, asked["dtype"], asked["seed"])


def _write_weights(file: Path, shapes: dict[str, tuple[tuple[int, ...], bool]], dtype: str, seed: int) -> None:
    """Random weights in PyTorch's default range (uniform, one over the root of the fan-in), from one seeded pool."""
    import numpy as np

    kinds = {name: np.dtype(_BYTES[dtype] if floating else "int64") for name, (_, floating) in shapes.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, floating) in shapes.items():
        begin, end = end, end + math.prod(shape) * kinds[name].itemsize
        header[name] = {"dtype": dtype if floating else "I64", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    made: dict[int, bytes] = {}
    pool = np.random.default_rng(seed).uniform(-1, 1, _POOL).astype(np.float32)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, floating) in shapes.items():
            count = math.prod(shape)
            if not floating:
                out.write(np.arange(count, dtype="int64").tobytes())
            elif len(shape) < 2:
                out.write(np.full(count, float(name.endswith("weight")), kinds[name]).tobytes())
            else:
                fan_in = math.prod(shape[1:])
                if fan_in not in made:  # few differ
                    made[fan_in] = (pool / math.sqrt(fan_in)).astype(kinds[name]).tobytes()
                scaled = made[fan_in]
                for _ in range(count // _POOL):
                    out.write(scaled)
                out.write(scaled[: count % _POOL * kinds[name].itemsize])


def _write_tokenizer(place: Path) -> None:
    """The smallest CLIP tokenizer: bytes, bytes that end a word, a few pairs, the begin and the end.

    Source of the bytes' letters: byte-level BPE as OpenAI published it with GPT-2.
    """
    place.mkdir(parents=True, exist_ok=True)
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(len(others))]
    pairs = [("t", "h"), ("th", "e</w>"), ("a", "n"), ("i", "n")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    begin, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {word: number for number, word in enumerate([*words, begin, end])}
    _dump(place / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (place / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": end}
    _dump(place / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _dump(place / "tokenizer_config.json", special | settings)


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
