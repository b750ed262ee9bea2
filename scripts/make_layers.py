"""Builds a checkpoint of a wanted size, dense or of experts, that a quantizer can be timed on.

Names, shapes and config are those of llama and qwen3_moe, every side a multiple of 128; the values
are normal, of the spread that weights have. Only the model is not: its values repeat. No torch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from statistics import NormalDist
from struct import pack, unpack
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

Shape = Literal["dense", "moe"]
GB = 10**9
BF16 = 2
HEAD = 128
# A model so wide that fewer layers fit is no model: then the next narrower one is taken.
FEWEST_LAYERS = 4
WIDTHS = (2048, 1024, 512, 256)
EXPERTS = (128, 64, 32, 16, 8)
SPREAD = 0.02
# Enough that no cache of a core holds it; drawing it takes a fraction of a second.
BLOCK_ELEMENTS = 8 << 20


class Tensor(NamedTuple):
    """One bf16 tensor of the model."""

    name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return BF16 * prod(self.shape)


@dataclass(frozen=True)
class Recipe:
    """What is asked for: about `gigabytes` (10^9 bytes) in `shards` files."""

    shape: Shape = "dense"
    gigabytes: float = 1.9
    shards: int = 4

    @property
    def name(self) -> str:
        """For a directory: two recipes of one name build the same bytes."""
        return f"{self.shape}-{self.gigabytes:g}GB-{self.shards}"

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json: the widest model of which a few layers fit, with as many as do."""
        configs = [_config(self.shape, *size) for size in _sizes(self.shape)]
        return next(filter(None, map(self._deep, configs)), {**configs[-1], "num_hidden_layers": 1})

    def _deep(self, config: dict[str, Any]) -> dict[str, Any] | None:
        outside, layer = _nbytes(model({**config, "num_hidden_layers": 0})), _nbytes(_layer(config))
        count = round((self.gigabytes * GB - outside) / layer)
        return {**config, "num_hidden_layers": count} if count >= FEWEST_LAYERS else None

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(model(self.config))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, which is close to what was asked for, and not equal."""
        return _nbytes(self.tensors)

    @property
    def parts(self) -> list[list[Tensor]]:
        """The tensors of each file: in order, cut where the running size asks for it."""
        parts: list[list[Tensor]] = [[] for _ in range(self.shards)]
        total, done = self.nbytes, 0
        for tensor in self.tensors:
            parts[min(self.shards - 1, done * self.shards // total)].append(tensor)
            done += tensor.nbytes
        return [part for part in parts if part]


def _nbytes(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _sizes(shape: Shape) -> list[tuple[int, int]]:
    """Width and experts to try, the most wanted first."""
    experts = EXPERTS if shape == "moe" else (0,)
    return [(width, count) for width in WIDTHS for count in experts]


def _config(shape: Shape, hidden: int, experts: int) -> dict[str, Any]:
    heads = hidden // HEAD
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if shape == "moe" else "LlamaForCausalLM"],
        "model_type": "qwen3_moe" if shape == "moe" else "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": HEAD,
        "vocab_size": 16 * hidden,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if shape == "moe":
        config |= {
            "num_experts": experts,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": max(1, 3 * hidden // 8 // 128) * 128,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    return config


def model(config: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor of the model, in the order of its layers."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield Tensor("model.embed_tokens.weight", (vocab, hidden))
    for number in range(config["num_hidden_layers"]):
        yield from _layer(config, number)
    yield Tensor("model.norm.weight", (hidden,))
    yield Tensor("lm_head.weight", (vocab, hidden))


def _layer(config: Mapping[str, Any], number: int = 0) -> Iterator[Tensor]:
    at, hidden = f"model.layers.{number}", config["hidden_size"]
    yield from _attention(f"{at}.self_attn", config)
    if "num_experts" in config:
        yield Tensor(f"{at}.mlp.gate.weight", (config["num_experts"], hidden))
        for expert in range(config["num_experts"]):
            inner = config["moe_intermediate_size"]
            yield from _mlp(f"{at}.mlp.experts.{expert}", hidden, inner)
    else:
        yield from _mlp(f"{at}.mlp", hidden, config["intermediate_size"])
    yield Tensor(f"{at}.input_layernorm.weight", (hidden,))
    yield Tensor(f"{at}.post_attention_layernorm.weight", (hidden,))


def _attention(at: str, config: Mapping[str, Any]) -> Iterator[Tensor]:
    hidden, kv = config["hidden_size"], HEAD * config["num_key_value_heads"]
    yield Tensor(f"{at}.q_proj.weight", (hidden, hidden))
    yield Tensor(f"{at}.k_proj.weight", (kv, hidden))
    yield Tensor(f"{at}.v_proj.weight", (kv, hidden))
    yield Tensor(f"{at}.o_proj.weight", (hidden, hidden))
    if "num_experts" in config:
        yield Tensor(f"{at}.q_norm.weight", (HEAD,))
        yield Tensor(f"{at}.k_norm.weight", (HEAD,))


def _mlp(at: str, hidden: int, inner: int) -> Iterator[Tensor]:
    yield Tensor(f"{at}.gate_proj.weight", (inner, hidden))
    yield Tensor(f"{at}.up_proj.weight", (inner, hidden))
    yield Tensor(f"{at}.down_proj.weight", (hidden, inner))


@lru_cache(maxsize=1)
def _block(elements: int) -> bytes:
    """Normal values as bf16, always the same ones."""
    normal, steps = NormalDist(0, SPREAD), 1 << 16
    values = (normal.inv_cdf((step + 0.5) / steps) for step in range(steps))
    quantiles = array("H", (unpack("<I", pack("<f", value))[0] >> 16 for value in values))
    drawn = array("H", random.Random(0).randbytes(2 * elements))
    return array("H", map(quantiles.__getitem__, drawn)).tobytes()


def build(out: Path, recipe: Recipe) -> None:
    """Writes beside ``out`` and renames, so an ``out`` that exists is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        scratch.chmod(0o755)
        _write_checkpoint(scratch, recipe)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_checkpoint(directory: Path, recipe: Recipe) -> None:
    weight_map: dict[str, str] = {}
    parts = recipe.parts
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        with (directory / name).open("wb") as stream:
            _write_file(stream, part, min(BLOCK_ELEMENTS, recipe.nbytes // BF16))
        weight_map |= {tensor.name: name for tensor in part}
    index = {"metadata": {"total_size": recipe.nbytes}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", recipe.config)


def _write_file(stream: BinaryIO, tensors: Sequence[Tensor], elements: int) -> None:
    """A safetensors file, laid out as the reference does it, by name; `elements` values repeat."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in sorted(tensors):
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": "BF16",
            "shape": tensor.shape,
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    stream.write(len(header).to_bytes(8, "little") + header)
    block = memoryview(_block(elements))
    for start in range(0, position, len(block)):
        stream.write(block[: position - start])
    stream.flush()
    os.fsync(stream.fileno())


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="directory to write, which must not exist")
    parser.add_argument("--shape", choices=get_args(Shape), default=Recipe.shape)
    parser.add_argument("--gb", type=float, default=Recipe.gigabytes, help="size in 10^9 bytes")
    parser.add_argument("--shards", type=int, default=Recipe.shards)
    options = parser.parse_args()
    out: Path = options.out.absolute()
    if out.exists():
        print(f"{out} exists", file=sys.stderr)
        return 1
    build(out, Recipe(options.shape, options.gb, options.shards))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
