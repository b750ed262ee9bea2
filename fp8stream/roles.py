"""What a tensor is, and why it is quantized or kept: pure, from names, shapes, dtypes and config.

Only what is recognised is quantized: a matrix named as a projection, in a layer that the language
model repeats. Everything else keeps its bytes, with a reason. Known here: decoder-only transformers
with separate or fused projections, tied embeddings, per-expert matrices and their routers.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fp8stream.header import TensorSpec


class Role(str, Enum):
    """What a tensor is to the model."""

    LINEAR = "linear"
    EXPERT = "expert"
    ROUTER = "router"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    NORM = "norm"
    CONV = "conv"
    OTHER = "other"


@dataclass(frozen=True)
class Classified:
    """A tensor's role, whether the default policy quantizes it, and why.

    `linear_like` tells what an engine takes for a linear layer, and must be told of when it is
    kept; `quantizable` those of them that `--include` may ask for. `fused_set` names the
    projections that an engine stacks into one weight, `expert_set` all experts of one layer.
    """

    role: Role
    quantize: bool
    reason: str
    linear_like: bool
    quantizable: bool
    fused_set: str | None = None
    expert_set: str | None = None


SMALLEST_SIDE = 64
DEEPEST_NAME = 64
_LINEAR_LIKE = (Role.LINEAR, Role.EXPERT, Role.ROUTER, Role.LM_HEAD, Role.OTHER)
SOURCE_DTYPES = ("BF16", "F16", "F32")

# Names of the modules above the repeated layers of a language model: towers have others.
_LANGUAGE_MODEL = {"model", "transformer", "language_model", "backbone", "gpt_neox"}
_STACK = re.compile(
    r"^(?P<above>(?:[A-Za-z_]\w*\.)*?)(?:layers|h|blocks)\.(?P<number>[0-9]{1,9})\."
)
_EXPERT = re.compile(r"^(?P<set>.*\.experts)\.[0-9]+\.")

_PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"),
    *("fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
}
# Names that are a projection only below an attention module: elsewhere they are other things.
_ATTENTION_OUTPUTS = {"dense", "out_proj"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_EMBEDDINGS = re.compile(r"(^|_)(embed|embeddings?|embed_tokens|wte|wpe|tok_embeddings)(_|$)")
_HEADS = {"lm_head", "embed_out", "output", "unembed", "output_projection"}
_NORM = re.compile(r"(norm|(^|_)ln(_|\d|$)|layer_?norm)", re.IGNORECASE)

# vLLM's stacked weights (packed_modules_mapping): all members or none, and one tensor scale.
_FUSED_SETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def classify(tensors: Sequence[TensorSpec], config: Mapping[str, Any]) -> dict[str, Classified]:
    """The role of every tensor, by name. `config` is the checkpoint's config.json."""
    layers = _layer_count(config)
    modules = {tensor.module for tensor in tensors}
    return {tensor.name: _classify(tensor, modules, layers, config) for tensor in tensors}


def is_tied(tensors: Sequence[TensorSpec]) -> bool:
    """Whether the output head is the embedding: no file holds a head of its own."""
    leaves = {tensor.module.rpartition(".")[2] for tensor in tensors}
    return not leaves & _HEADS and any(_EMBEDDINGS.search(leaf) for leaf in leaves)


def fused_partners(classified: Mapping[str, Classified]) -> dict[str, tuple[str, ...]]:
    """For every member of a fused set, the names of the others."""
    sets: dict[str, list[str]] = defaultdict(list)
    for name, known in classified.items():
        if known.fused_set:
            sets[known.fused_set].append(name)
    return {
        name: tuple(other for other in members if other != name)
        for members in sets.values()
        for name in members
    }


def _layer_count(config: Mapping[str, Any]) -> int | None:
    """How many layers the language model has; a number past it belongs to a prediction head."""
    for part in (config.get("text_config"), config):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            count = part.get(key) if isinstance(part, Mapping) else None
            if type(count) is int:
                return count
    return None


def _classify(
    tensor: TensorSpec, modules: set[str], layers: int | None, config: Mapping[str, Any]
) -> Classified:
    role, reason = _role(tensor, layers)
    matrix = tensor.name.endswith(".weight") and len(tensor.shape) == 2
    linear_like = matrix and role in _LINEAR_LIKE
    quantizable = (
        linear_like
        and tensor.dtype in SOURCE_DTYPES
        and tensor.numel > 0
        and tensor.name.count(".") < DEEPEST_NAME
    )
    projection = role in (Role.LINEAR, Role.EXPERT) and not reason
    if projection:
        reason = _objection(tensor, config)
    recognised = projection and not reason
    if recognised:
        reason = f"{role.value} of a repeated layer"
    expert = _EXPERT.match(tensor.name)
    return Classified(
        role,
        recognised,
        reason,
        linear_like,
        quantizable,
        _fused_set(tensor, modules) if linear_like else None,
        expert["set"] if expert and role is Role.EXPERT else None,
    )


def _objection(tensor: TensorSpec, config: Mapping[str, Any]) -> str:
    """Why a projection is kept all the same; empty if it is not."""
    if tensor.name.count(".") >= DEEPEST_NAME:
        return "nested too deep to be a layer of a model"
    if config.get("is_encoder_decoder"):
        return "encoder-decoder models are not recognised"
    if tensor.dtype not in SOURCE_DTYPES:
        return f"{tensor.dtype} is not one of {', '.join(SOURCE_DTYPES)}"
    if min(tensor.shape) < SMALLEST_SIDE:
        return f"a side under {SMALLEST_SIDE}: too small to gain"
    return ""


def _role(tensor: TensorSpec, layers: int | None) -> tuple[Role, str]:
    """The role, and why the tensor is kept whatever its size; no reason for a projection."""
    path = tensor.name.split(".")
    leaf = path[-2] if len(path) > 1 and path[-1] in ("weight", "bias") else path[-1]
    stack = _STACK.match(tensor.name)
    if path[-1] == "bias":
        return Role.OTHER, "a bias"
    if len(tensor.shape) < 2:
        norm = bool(_NORM.search(leaf))
        return (Role.NORM, "a norm") if norm else (Role.OTHER, "not a matrix")
    if not stack and leaf in _HEADS:
        return Role.LM_HEAD, "the output head stays in 16 bit: engines expect it so"
    if _EMBEDDINGS.search(leaf):
        return Role.EMBEDDING, "an embedding: a lookup, not a multiplication"
    if leaf in _ROUTERS or "router" in path:
        return Role.ROUTER, "a router: small, and its errors pick the wrong experts"
    if len(tensor.shape) > 2:
        if "experts" in path:
            return Role.EXPERT, "fused experts: their layout cannot be told from shapes"
        return (Role.CONV, "a convolution") if "conv" in leaf else (Role.OTHER, "not a matrix")
    if path[-1] != "weight":
        return Role.OTHER, "not the weight of a linear layer"
    return _projection(tensor, leaf, stack, layers)


def _projection(
    tensor: TensorSpec, leaf: str, stack: re.Match[str] | None, layers: int | None
) -> tuple[Role, str]:
    path = tensor.name.split(".")
    if stack is None or not set(stack["above"].split(".")) <= _LANGUAGE_MODEL | {""}:
        return Role.OTHER, "outside the language model's repeated layers"
    below_attention = any("attn" in part or "attention" in part for part in path[:-2])
    if leaf not in _PROJECTIONS and not (leaf in _ATTENTION_OUTPUTS and below_attention):
        return Role.OTHER, "not recognised as a projection"
    role = Role.EXPERT if _EXPERT.match(tensor.name) else Role.LINEAR
    if layers is not None and int(stack["number"]) >= layers:
        return role, f"past the model's {layers} layers: a multi-token-prediction head"
    return role, ""


def _fused_set(tensor: TensorSpec, modules: set[str]) -> str | None:
    """A key that the members of the tensor's fused set share."""
    parent, _, leaf = tensor.module.rpartition(".")
    for members in _FUSED_SETS:
        present = [member for member in members if f"{parent}.{member}" in modules]
        if leaf in members and len(present) > 1:
            return f"{parent}.({'|'.join(members)})"
    return None
