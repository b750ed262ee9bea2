"""What a tensor is, told from names, shapes and config alone, against the models' own code.

`architectures.jsonl.xz` lists the tensors of 408 architectures as they lie on disk, with the kind
of each read off the module that owns it in the model's code (`linear`, `embedding`, `router`, ...),
layers and experts cut short. The rules were made looking at 76 of them, and scored on the others.
"""

import json
import lzma
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fp8stream.header import TensorSpec
from fp8stream.roles import Classified, Role, classify
from fp8stream.structure import Config, in_order

ORACLE = Path(__file__).with_name("architectures.jsonl.xz")
# Not the weight of a linear layer: to quantize one of these would ruin the model.
NEVER = {"embedding", "lm_head", "norm", "conv", "router", "linear_conv1d", "other"}

Architecture = Mapping[str, Any]


@cache
def architectures() -> Mapping[str, Architecture]:
    with lzma.open(ORACLE, "rt") as lines:
        return {found["model_type"]: found for found in map(json.loads, lines)}


def roles(tensors: Iterable[tuple[str, Iterable[int]]], **config: Any) -> dict[str, Classified]:
    named = dict(tensors)
    specs = [TensorSpec(name, "BF16", tuple(shape), "f", 0, 0) for name, shape in named.items()]
    families = classify(in_order(specs), Config(config))
    return {spec.name: known for family, known in families.items() for spec in family.members}


def roles_of(architecture: Architecture) -> dict[str, Classified]:
    tensors = ((name, shape) for name, shape, _ in architecture["tensors"])
    return roles(tensors, **architecture["config"])


@pytest.mark.parametrize("model_type", list(architectures()))
def test_nothing_but_linear_layers_and_experts_is_quantized(model_type: str) -> None:
    architecture = architectures()[model_type]
    found = roles_of(architecture)
    wrong = [name for name, _, kind in architecture["tensors"] if kind in NEVER]
    assert not [name for name in wrong if found[name].quantize]
    assert all(known.reason for known in found.values())


def is_text_alone(architecture: Architecture) -> bool:
    """Whether there is but one model in the checkpoint, and it has a vocabulary."""
    config = architecture["config"]
    nested = [value for value in config.values() if isinstance(value, dict)]
    return "vocab_size" in config and not any("hidden_size" in value for value in nested)


def due(architecture: Architecture) -> Iterator[str]:
    """The matrices large enough to quantize, but for gates."""
    for name, shape, kind in architecture["tensors"]:
        gate = name.endswith((".gate.weight", "gate_inp.weight", "_gate.weight"))
        if kind in ("linear", "experts") and len(shape) == 2 and min(shape) >= 64 and not gate:
            yield name


def recall(architecture: Architecture) -> float:
    found, names = roles_of(architecture), list(due(architecture))
    return sum(found[name].quantize for name in names) / max(1, len(names))


# Below nine tenths of what the kinds allow, and why that is right.
KEPT: Mapping[str, str] = {
    **dict.fromkeys(("gpt2", "gpt-sw3", "openai-gpt", "imagegpt"), "all is Conv1D, transposed"),
    **dict.fromkeys(("whisper", "moonshine", "speech_to_text"), "the encoder hears, a tower"),
    "idefics": "its vision tower has no config of its own",
    "visual_bert": "it sees, by its name",
    "perceiver": "its token embedding stands beside no list of layers",
    "squeezebert": "all but the pooler is convolutions",
    "tipsv2_text_model": "q, k and v are one bare parameter, not the weight of a module",
    "markuplm": "a fifth of what is counted embeds paths",
}


def test_what_is_linear_is_quantized_in_models_of_text() -> None:
    found = {name: recall(a) for name, a in architectures().items() if is_text_alone(a)}
    assert {name for name, share in found.items() if share < 0.9} == KEPT.keys()
    rest = [share for name, share in found.items() if name not in KEPT]
    assert len(rest) > 150
    assert sum(rest) / len(rest) > 0.995


LAYER = [
    ("embed_tokens.weight", (1000, 256)),
    ("layers.0.self_attn.q_proj.weight", (256, 256)),
    ("layers.1.self_attn.q_proj.weight", (256, 256)),
    ("norm.weight", (256,)),
]


def test_the_language_model_is_what_repeats_beside_the_embedding() -> None:
    tensors = [
        *((f"anything.{name}", shape) for name, shape in LAYER),
        ("other.blocks.0.q_proj.weight", (256, 256)),
        ("other.blocks.1.q_proj.weight", (256, 256)),
    ]
    found = roles(tensors, hidden_size=256, vocab_size=1000)
    assert found["anything.layers.1.self_attn.q_proj.weight"].quantize
    assert not found["other.blocks.1.q_proj.weight"].quantize


def test_rows_as_many_as_experts_are_a_router_whatever_its_name() -> None:
    tensors = [
        *LAYER,
        ("layers.0.moe.chooser.weight", (72, 256)),
        *((f"layers.0.moe.experts.{e}.up.weight", (256, 256)) for e in range(72)),
    ]
    found = roles(tensors, vocab_size=1000, num_experts=72)
    assert found["layers.0.moe.chooser.weight"].role is Role.ROUTER
    assert found["layers.0.moe.experts.71.up.weight"].role is Role.EXPERT


def test_a_bias_as_long_as_the_columns_is_a_transposed_weight() -> None:
    tensors = [
        ("wte.weight", (1000, 256)),
        ("h.0.attn.c_attn.weight", (256, 768)),
        ("h.0.attn.c_attn.bias", (768,)),
        ("h.0.attn.c_proj.weight", (256, 256)),
        ("h.0.attn.c_proj.bias", (256,)),
    ]
    found = roles(tensors, n_embd=256, vocab_size=1000)
    assert "transposed" in found["h.0.attn.c_proj.weight"].reason
    assert not found["h.0.attn.c_proj.weight"].quantizable


def test_layers_past_the_last_are_prediction_heads_only_where_they_differ() -> None:
    more = ("layers.2.self_attn.q_proj.weight", (256, 256))
    sizes = {"hidden_size": 256, "vocab_size": 1000, "num_hidden_layers": 2}
    assert roles([*LAYER, more], **sizes)[more[0]].quantize
    found = roles([*LAYER, more, ("layers.2.eh_proj.weight", (256, 512))], **sizes)
    assert not found[more[0]].quantize
    assert not found["layers.2.eh_proj.weight"].quantize
    assert found["layers.1.self_attn.q_proj.weight"].quantize
