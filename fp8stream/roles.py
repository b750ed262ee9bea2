"""What a tensor is, and why it is quantized or kept: pure, from names, shapes, dtypes and config.

Structure first: in a repeated layer of the language model a matrix is a linear layer, unless its
shape or its neighbours say otherwise. As many rows as there are experts is a router; a bias as long
as the columns is a transposed `Conv1D`. Names decide only what structure cannot, and there is no
list of models, except for what engines stack in a few.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from fp8stream.structure import (
    EMBEDDING,
    NORM,
    PREDICTION,
    TOWER,
    Config,
    Family,
    Named,
    Structure,
    group,
)


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
    """What the tensors of one family are, whether the default policy quantizes them, and why.

    `linear_like` tells what an engine takes for a linear layer, and must be told of when it is
    kept; `quantizable` those of them that `--include` may ask for. `fused` are the names of the
    projections that an engine stacks into one weight, this one among them; `stacked` tells experts
    that are one tensor [experts, ., .]. `asked` says that a pattern of the user's names it, or
    what it is kept with.
    """

    role: Role
    quantize: bool
    reason: str
    linear_like: bool = False
    quantizable: bool = False
    fused: tuple[str, ...] = ()
    stacked: bool = False
    asked: bool = False

    def but(self, quantize: bool, reason: str, asked: bool = False) -> "Classified":
        """The same, decided otherwise."""
        return replace(self, quantize=quantize, reason=reason, asked=asked)


SMALLEST_SIDE = 64
STACKED_ROWS = "experts stacked into one matrix: no engine loads them in FP8"
SOURCE_DTYPES = ("BF16", "F16", "F32")

_UNEMBED = re.compile(r"unembed|embed_out|(^|_)(lm_)?head(_|$)|^output$|^decoder$")
_STEP = re.compile(r"(^|_)dt(_|$)")
_ROUTER = re.compile(r"router|(^|_)(gate|wg)$|^gating|score$|classifier$")
# A module of such a name is all router, whatever layers it has.
_GATING = re.compile(r"router|^gate$")
_EXPERTS = re.compile(r"(\w*_)?experts?(_list)?")

# What engines stack into one weight, as vLLM's model classes do (packed_modules_mapping): members
# are quantized all or none, with one scale under `tensor`. Some stack more, by model type.
_FUSED: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (frozenset({"bailing_v3"}), ("q_proj", "k_proj", "v_proj", "b_proj")),
    (frozenset({"olmo_hybrid"}), ("q_proj", "k_proj", "v_proj", "g_proj")),
    (frozenset({"kimi_linear"}), ("q_proj", "k_proj", "v_proj", "g_proj", "f_a_proj", "b_proj")),
    (frozenset({"kimi_k3"}), ("q_a_proj", "kv_a_proj_with_mqa", "g_proj")),
    (frozenset({"telechat2"}), ("query", "key_value")),
    (frozenset(), ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj")),
    (frozenset(), ("query", "key", "value")),
    (frozenset(), ("wq", "wk", "wv")),
    (frozenset(), ("wq_du", "wk_dv", "wv_dv", "wr_du")),
    (frozenset(), ("gate_proj", "up_proj")),
    (frozenset(), ("w1", "w3")),
    (frozenset(), ("c_fc_0", "c_fc_1")),
    (frozenset(), ("fc1", "fc3")),
    (frozenset(), ("q_a_proj", "kv_a_proj_with_mqa")),
    (frozenset(), ("wq_a", "wkv")),
    (frozenset(), ("wkv", "wgate")),
    (frozenset(), ("in_proj_qkv", "in_proj_z")),
    (frozenset(), ("in_proj_b", "in_proj_a")),
)


def classify(tensors: Iterable[Named], config: Config) -> dict[Family, Classified]:
    """What every tensor is, in families, in the order of their first member.

    `config` is the checkpoint's config.json. A family is cut where it goes past the language
    model's layers.
    """
    families = group(tensors)
    structure = Structure(families, config)
    classified: dict[Family, Classified] = {}
    for family in families:
        known = _classify(family, structure)
        within, past = structure.cut(family)
        classified |= dict.fromkeys(within, known)
        classified |= dict.fromkeys(past, _past(known))
    return classified


def _past(known: Classified) -> Classified:
    if not known.quantize:
        return known
    reason = "past the language model's layers: it predicts further tokens"
    return known.but(False, reason)


def _classify(family: Family, structure: Structure) -> Classified:
    role, reason = _role(family, structure)
    stacked = role is Role.EXPERT and (len(family.shape) == 3 or family.parameter != "weight")
    stacked = stacked and not family.is_deep
    fits = family.dtype in SOURCE_DTYPES and min(family.shape, default=0) > 0
    linear_like = stacked or (family.is_matrix and family not in structure.embeddings)
    linear_like = linear_like and not family.is_deep  # nor does an engine have such a module
    transposed = structure.is_transposed(family)
    if not reason:
        reason = _objection(family)
    return Classified(
        role,
        not reason,
        reason or _recognised(family, role),
        linear_like,
        linear_like and fits and not transposed,
        _fused(family, structure) if linear_like else (),
        stacked,
    )


def _recognised(family: Family, role: Role) -> str:
    if family.stack is None:
        return "linear between the vocabulary and the layers"
    return f"{role.value} of a repeated layer"


def _objection(family: Family) -> str:
    """Why a projection is kept all the same; empty if it is not."""
    if family.is_deep:
        return "nested too deep to be a layer of a model"
    if family.dtype not in SOURCE_DTYPES:
        return f"{family.dtype} is not one of {', '.join(SOURCE_DTYPES)}"
    if min(family.shape[-2:]) < SMALLEST_SIDE or not family.shape[0]:
        return f"a side under {SMALLEST_SIDE}: too small to gain"
    return ""


def _role(family: Family, structure: Structure) -> tuple[Role, str]:
    """The role, and why the tensor is kept whatever its size; no reason for a projection."""
    if family.parameter == "bias" or family.parameter.endswith("_bias"):
        return Role.OTHER, "a bias"
    if NORM.search(family.leaf) or (len(family.shape) == 2 and _in_norm(family)):
        plain = len(family.shape) < 2 or NORM.search(family.leaf)
        return (Role.NORM, "a norm") if plain else (Role.OTHER, "part of a norm")
    if len(family.shape) < 2:
        return Role.OTHER, "not a matrix"
    if family.stack is None:
        return _outside(family, structure)
    if family.stack not in structure.language:
        return _beside_language_model(family)
    return _in_layer(family, structure)


def _in_norm(family: Family) -> bool:
    return any(map(NORM.search, family.path[-2:]))


def _outside(family: Family, structure: Structure) -> tuple[Role, str]:
    """A tensor with two sides or more that does not repeat over layers."""
    if _is_head(family, structure):
        return Role.LM_HEAD, "the output head stays in 16 bit: engines expect it so"
    if structure.joins_vocabulary(family):
        return Role.LINEAR, ""
    if family in structure.embeddings or EMBEDDING.search(family.leaf):
        return Role.EMBEDDING, "an embedding: a lookup, not a multiplication"
    if any(map(TOWER.search, family.path)):
        return _beside_language_model(family)
    if len(family.shape) > 2:
        return _many_sided(family)
    return Role.OTHER, "outside the language model's repeated layers"


def _is_head(family: Family, structure: Structure) -> bool:
    named = bool(_UNEMBED.search(family.leaf)) and family.is_matrix
    return family in structure.heads or (named and family not in structure.embeddings)


def _beside_language_model(family: Family) -> tuple[Role, str]:
    reason = "a tower or projector beside the language model"
    if any(map(PREDICTION.search, family.path)):
        reason = "predicts further tokens, beside the language model"
    if _is_expert(family) or _is_stacked(family):
        return Role.EXPERT, reason
    if len(family.shape) > 2:
        return _many_sided(family)
    if EMBEDDING.search(family.leaf):
        return Role.EMBEDDING, "an embedding: a lookup, not a multiplication"
    return Role.OTHER, reason


def _many_sided(family: Family) -> tuple[Role, str]:
    if "conv" in family.leaf.lower() or (len(family.shape) > 3 and family.parameter == "weight"):
        return Role.CONV, "a convolution"
    return Role.OTHER, "not a matrix"


def _in_layer(family: Family, structure: Structure) -> tuple[Role, str]:
    """A tensor with two sides or more in a repeated layer of the language model."""
    if len(family.shape) > 2:
        counted = family.shape[0] in structure.config.experts and min(family.shape) > 1
        stacked = _is_stacked(family) or (len(family.shape) == 3 and counted)
        return (Role.EXPERT, "") if stacked else _many_sided(family)
    if EMBEDDING.search(family.leaf):
        return Role.EMBEDDING, "an embedding: a lookup, not a multiplication"
    if _is_router(family, structure):
        return Role.ROUTER, "a router or gate: small, and its errors go far"
    if family.parameter != "weight":
        if expert_list(family.path) is not None:
            return Role.EXPERT, STACKED_ROWS
        return Role.OTHER, "not the weight of a linear layer"
    if structure.is_transposed(family):
        return Role.LINEAR, "a Conv1D: its weight is transposed, [in, out]"
    if _STEP.search(family.leaf) and {"A_log", "D"} <= structure.beside(family):
        return Role.OTHER, "makes the time step of a state space"
    if "indexer" in family.path and family.leaf == "weights_proj":
        return Role.OTHER, "weighs the heads of an indexer: engines keep it in 16 bit"
    return Role.EXPERT if _is_expert(family) else Role.LINEAR, ""


def _is_expert(family: Family) -> bool:
    """Whether this is a matrix of one expert in a list of them."""
    at = expert_list(family.path)
    return at is not None and at + 1 < len(family.path) and _is_number(family.path[at + 1])


def _is_stacked(family: Family) -> bool:
    """Whether this holds a matrix for each expert of a layer."""
    conv = "conv" in family.leaf.lower()
    parts = (*family.path, family.parameter)
    return len(family.shape) == 3 and not conv and expert_list(parts) is not None


def expert_list(path: Sequence[str]) -> int | None:
    """Which part of a name holds the experts of a layer, if one does; numbers may be `*`."""
    layer = next((at for at, part in enumerate(path) if _is_number(part)), len(path))
    within = range(layer + 1, len(path))
    called = [at for at in within if _EXPERTS.fullmatch(path[at])]
    called += [at for at in within if path[at] == "moe"]
    return called[0] if called else None


def _is_number(part: str) -> bool:
    """Whether `part` tells one expert or layer from another, as `*`, `3` and `expert_3` do."""
    return part == "*" or part.removeprefix("expert_").isdecimal()


def _is_router(family: Family, structure: Structure) -> bool:
    """As many rows as there are experts, beside them; or a name that says so, and few rows."""
    if _is_expert(family):
        return False
    if any(map(_GATING.search, family.path[:-1])):
        return True
    named = bool(_ROUTER.search(family.leaf))
    if family.shape[0] in structure.config.experts:
        return named or structure.stands_beside(family, _EXPERTS)
    return named and 4 * family.shape[0] < family.shape[1]


def _fused(family: Family, structure: Structure) -> tuple[str, ...]:
    """The projections beside this one that an engine stacks with it."""
    leaf = family.path[-1] if family.path else ""
    beside = structure.beside(family)
    for types, members in _FUSED:
        if leaf in members and (not types or structure.config.is_one_of(types)):
            present = tuple(member for member in members if member in beside)
            if len(present) > 1:
                return present
    return ()


def fused_set(name: str, known: Classified) -> str | None:
    """A key that the members of a fused set share; `name` is that of one's weight."""
    if not known.fused:
        return None
    parent = name.rpartition(".")[0].rpartition(".")[0]
    return f"{parent}.({'|'.join(known.fused)})"


def expert_set(name: str, known: Classified) -> str | None:
    """A key that all experts of one layer share."""
    return expert_module(name) if known.role is Role.EXPERT and known.linear_like else None


def expert_module(name: str) -> str:
    """The module that holds the experts of a layer, as engines call it; `name` is a tensor's.

    Some stack their experts without a module of that name; engines give them one.
    """
    path = name.split(".")
    at = expert_list(path)
    if at is not None and (path[at] != "moe" or any(map(_is_number, path[at + 1 : at + 2]))):
        return ".".join(path[: at + 1])
    holder = path[:-2] if path[-1] == "weight" else path[:-1]
    return ".".join([*holder, "experts"])


def sets(
    families: Mapping[Family, Classified],
    key_of: Callable[[str, Classified], str | None],
    values: Callable[[Family], set[bool]],
) -> Iterator[list[str]]:
    """The names of the weights that have a key in common: of sets that `values` tells apart.

    Sets of like modules in which `values` finds one value alone are left out, unseen.
    """
    alike: dict[str, list[Family]] = defaultdict(list)
    for family, known in families.items():
        template = key_of(family.template, known)
        if template is not None:
            alike[template].append(family)
    for members in alike.values():
        if len(set[bool]().union(*map(values, members))) > 1:
            found: dict[str, list[str]] = defaultdict(list)
            for family in members:
                for tensor in family.members:
                    found[str(key_of(tensor.name, families[family]))].append(tensor.name)
            yield from found.values()


def is_tied(families: Mapping[Family, Classified], config: Config) -> bool:
    """Whether the model has an output head that no file holds: most often the embedding."""
    roles = {known.role for known in families.values()}
    headless = Role.LM_HEAD not in roles and Role.EMBEDDING in roles
    return headless and not config.is_headless
