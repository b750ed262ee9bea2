"""The bytes of an output are a promise: these digests were taken before the streaming was tuned.

Whoever changes one changes every checkpoint that was ever converted, and must say so in the version
of the numerics.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from fp8stream.memory import MIB
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from tests.conftest import Tensors, write_checkpoint
from tests.test_stream import convert

DIGESTS = {
    Scheme(Granularity.CHANNEL): "6495cdc229f1e7e11f80c84555e274fc",
    Scheme(Granularity.BLOCK): "760872111a4d5aba7b95294769e7c54c",
    Scheme(Granularity.TENSOR): "e5730353f2da78d7b6ac9982e3e04bcd",
    Scheme(Granularity.BLOCK, OutputFormat.FP8): "a10cb8eef67eb3daec325234ba6e977d",
    Scheme(Granularity.TENSOR, OutputFormat.FP8): "0396cb5f77ddf8eed2359232f8724393",
}


def weight(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Integers scaled by powers of two: the same on every machine and in every torch."""
    place = torch.arange(rows * columns, dtype=torch.int64) + seed * 7919
    mixed = (place * 2654435761 >> 7) % 65521
    powers = torch.pow(2.0, ((mixed * 31 + place) % 11 - 14).double())
    return ((mixed % 511 - 255) * powers).to(dtype).view(rows, columns)


def checkpoint() -> Tensors:
    """Dense layers that blocks fit and that they do not, experts, every dtype, zeros, tiny rows."""
    tensors = {
        "model.embed_tokens.weight": weight(1000, 256, 1),
        "model.norm.weight": weight(1, 256, 2)[0],
        "lm_head.weight": weight(1000, 256, 3),
    }
    for layer, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        at = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (384, 256),
            "self_attn.k_proj": (128, 256),
            "self_attn.v_proj": (128, 256),
            "self_attn.o_proj": (256, 384),
            "mlp.gate_proj": (700, 256),
            "mlp.up_proj": (700, 256),
            "mlp.down_proj": (256, 700),
        }
        tensors[f"{at}.input_layernorm.weight"] = weight(1, 256, 5)[0]
        for number, (name, (rows, columns)) in enumerate(shapes.items()):
            tensors[f"{at}.{name}.weight"] = weight(rows, columns, 10 * layer + number, dtype)
        tensors[f"{at}.block_sparse_moe.gate.weight"] = weight(4, 256, 6)
        for expert in range(4):
            for leaf, shape in (("w1", (256, 256)), ("w2", (256, 256)), ("w3", (256, 256))):
                name = f"{at}.block_sparse_moe.experts.{expert}.{leaf}.weight"
                tensors[name] = weight(*shape, 100 + expert, dtype) * (expert + 1)
    tensors["model.layers.0.mlp.up_proj.weight"][5] = 0
    tensors["model.layers.0.self_attn.o_proj.weight"][:128] = 0
    tensors["model.layers.2.self_attn.q_proj.weight"][3] = 2.0**-140
    return tensors


def digest(output: Path) -> str:
    """Of every file's name, header without its metadata, and data."""
    found = hashlib.sha256()
    for file in sorted(output.glob("*.safetensors")):
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        del header["__metadata__"]
        found.update(f"{file.name} {json.dumps(header)}".encode())
        found.update(content[begin:])
    return found.hexdigest()[:32]


@pytest.mark.parametrize("budget", [2 * MIB, 32 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB])
@pytest.mark.parametrize("scheme", DIGESTS, ids=lambda s: f"{s.granularity.value}-{s.format.value}")
def test_the_bytes_are_those_of_every_version_before(
    tmp_path: Path, scheme: Scheme, budget: int
) -> None:
    source = write_checkpoint(tmp_path / "in", checkpoint(), shards=3)
    convert(source, tmp_path / "out", scheme, budget, max_shard_size=3 * 10**6)
    assert digest(tmp_path / "out") == DIGESTS[scheme]
