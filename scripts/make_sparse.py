"""Builds a checkpoint of a trillion parameters that takes no disk: its headers, and holes for data.

Whoever reads headers cannot tell it from a real one: the names, shapes and dtypes of deepseek_v3,
laid out as safetensors lays them out, in files that are truncated to their full size. No torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

BYTES = {"BF16": 2, "F32": 4}
CONFIG: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 768,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000,
    "max_position_embeddings": 163_840,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


class Tensor(NamedTuple):
    """One tensor of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BYTES[self.dtype]


def model(config: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor of the model, in the order of its layers."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield Tensor("model.embed_tokens.weight", (vocab, hidden))
    for number in range(config["num_hidden_layers"]):
        at = f"model.layers.{number}"
        yield Tensor(f"{at}.input_layernorm.weight", (hidden,))
        yield Tensor(f"{at}.post_attention_layernorm.weight", (hidden,))
        yield from attention(f"{at}.self_attn", config)
        if number < config["first_k_dense_replace"]:
            yield from mlp(f"{at}.mlp", hidden, config["intermediate_size"])
        else:
            yield from experts(f"{at}.mlp", config)
    yield Tensor("model.norm.weight", (hidden,))
    yield Tensor("lm_head.weight", (vocab, hidden))


def attention(at: str, config: Mapping[str, Any]) -> Iterator[Tensor]:
    """Multi-head latent attention."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    plain, rotary = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value = config["v_head_dim"]
    yield Tensor(f"{at}.q_a_proj.weight", (query, hidden))
    yield Tensor(f"{at}.q_a_layernorm.weight", (query,))
    yield Tensor(f"{at}.q_b_proj.weight", (heads * (plain + rotary), query))
    yield Tensor(f"{at}.kv_a_proj_with_mqa.weight", (latent + rotary, hidden))
    yield Tensor(f"{at}.kv_a_layernorm.weight", (latent,))
    yield Tensor(f"{at}.kv_b_proj.weight", (heads * (plain + value), latent))
    yield Tensor(f"{at}.o_proj.weight", (hidden, heads * value))


def experts(at: str, config: Mapping[str, Any]) -> Iterator[Tensor]:
    """A router, the experts that it chooses from, and those that always run."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    count = config["n_routed_experts"]
    yield Tensor(f"{at}.gate.weight", (count, hidden))
    yield Tensor(f"{at}.gate.e_score_correction_bias", (count,), "F32")
    yield from mlp(f"{at}.shared_experts", hidden, inner * config["n_shared_experts"])
    for number in range(count):
        yield from mlp(f"{at}.experts.{number}", hidden, inner)


def mlp(at: str, hidden: int, inner: int) -> Iterator[Tensor]:
    yield Tensor(f"{at}.gate_proj.weight", (inner, hidden))
    yield Tensor(f"{at}.up_proj.weight", (inner, hidden))
    yield Tensor(f"{at}.down_proj.weight", (hidden, inner))


def write_checkpoint(directory: Path, config: Mapping[str, Any], files: int) -> None:
    """Config, index, and `files` files of equally many tensors."""
    tensors = list(model(config))
    weight_map: dict[str, str] = {}
    for number in range(files):
        part = tensors[number * len(tensors) // files : (number + 1) * len(tensors) // files]
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        write_file(directory / name, part)
        weight_map |= {tensor.name: name for tensor in part}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    write_json(directory / "config.json", config)


def write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    """A safetensors file, as the reference writes it up to the first byte of data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: (-BYTES[tensor.dtype], tensor.name)):
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + position)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def build(out: Path, config: Mapping[str, Any], files: int) -> None:
    """Writes beside ``out`` and renames, so an ``out`` that exists is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        scratch.chmod(0o755)
        write_checkpoint(scratch, config, files)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="directory to write, which must not exist")
    parser.add_argument("--layers", type=int, default=60, help="the first of them is dense")
    parser.add_argument("--experts", type=int, default=1000, help="in each of the other layers")
    parser.add_argument("--files", type=int, default=160)
    options = parser.parse_args()
    out: Path = options.out.absolute()
    if out.exists():
        print(f"{out} exists", file=sys.stderr)
        return 1
    sizes = {"num_hidden_layers": options.layers, "n_routed_experts": options.experts}
    build(out, {**CONFIG, **sizes}, options.files)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
