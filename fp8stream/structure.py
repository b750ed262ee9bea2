"""What the names and shapes of a whole checkpoint tell, before any single tensor is looked at.

The token embedding is the matrix with a row for every token of the vocabulary; the language model
is what repeats over layers nearest to it; whatever else repeats is a tower. Pure.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from fp8stream.header import TensorSpec
from fp8stream.names import template_and_key

# Beside the language model: its stacks and its configs have such words in their names.
TOWER = re.compile(
    r"(^|_)(vision|visual|vit|image|img|audio|speech|sound|video|acoustic|qformer|perceiver"
    r"|resampler|projector|connector|talker|code2wav|token2wav|vocoder|codec|vqmodel|vqvae)(_|$)",
    re.IGNORECASE,
)
PREDICTION = re.compile(r"(^|_)(mtp|nextn|eagle|medusa)(_|$)")
EMBEDDING = re.compile(
    r"(?<!un)embed(?!_out)|(^|_)(wte|wpe)(_|$)|relative_attention_bias", re.IGNORECASE
)
POSITION = re.compile(r"(^|_)(pos|positions?|positional|wpe|token_type|segment)(_|$)")
NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)


# A name of more parts is not that of a layer, and what is noted of its modules would be the square
# of its length.
DEEPEST_NAME = 64

_TIES = "tie_word_embeddings"


class Config:
    """What config.json says of the language model: the numbers under a key, wherever they stand.

    Configs of several models in one nest theirs; those of towers are not looked into.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._parts = list(_language_parts(config))
        types = [part.get("model_type") for part in self._parts]
        self._found: dict[str, frozenset[int]] = {}
        self.model_types = tuple(name for name in types if isinstance(name, str))

        self.widths = self.numbers("hidden_size", "n_embd", "d_model", "dim")
        # How many layers a language model may have: a part without a vocabulary is another model's.
        spoken = [part for part in self._parts if "vocab_size" in part] or self._parts
        self.depths = _numbers(spoken, re.compile(r"(num_|n_)?((de|en)coder_|hidden_)?layers?"))
        self.experts = self.numbers_like(r"(moe_)?(num|n)_?(local|routed)?_?experts")

    @property
    def ties_head(self) -> bool | None:
        """Whether the output head is the embedding; None where the config does not say."""
        said = [part[_TIES] for part in self._parts if _TIES in part]
        return next((value for value in said if isinstance(value, bool)), None)

    @property
    def is_headless(self) -> bool:
        """Whether the architecture is a bare model, `LlamaModel`, which gives hidden states."""
        names = self._parts[0].get("architectures")
        named = names[:1] if isinstance(names, list) else []
        return any(isinstance(name, str) and name.endswith("Model") for name in named)

    def is_one_of(self, types: frozenset[str]) -> bool:
        """Whether the model, or one in it, is of one of these types."""
        return not types.isdisjoint(self.model_types)

    def numbers(self, *keys: str) -> frozenset[int]:
        """Every positive whole number under one of `keys`."""
        return self.numbers_like("|".join(keys))

    def numbers_like(self, pattern: str) -> frozenset[int]:
        """Every positive whole number under a key that `pattern` matches whole."""
        if pattern not in self._found:  # asked for each layer, and a config may be long
            self._found[pattern] = _numbers(self._parts, re.compile(pattern))
        return self._found[pattern]


def _numbers(parts: Sequence[Mapping[str, Any]], keys: "re.Pattern[str]") -> frozenset[int]:
    """Every positive whole number of `parts` under a key that `keys` matches whole."""
    found = (value for part in parts for key, value in part.items() if keys.fullmatch(str(key)))
    return frozenset(value for value in found if type(value) is int and value > 0)


def _language_parts(config: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """`config` and the configs nested in it, without those of towers."""
    yield config
    for key, part in config.items():
        if isinstance(part, Mapping) and depth < 4 and not TOWER.search(str(key)):
            yield from _language_parts(part, depth + 1)


@dataclass(frozen=True, eq=False)
class Family:
    """Tensors whose names differ in numbers alone, all of one shape and dtype.

    `template` has `*` for the numbers.
    """

    template: str
    shape: tuple[int, ...]
    dtype: str
    members: list[TensorSpec]

    def of(self, members: list[TensorSpec]) -> "Family":
        """A family of the same kind."""
        return replace(self, members=members)

    @cached_property
    def numbers(self) -> list[int]:
        """The first number of every member's name, in order; empty where names have none."""
        begin = self.template.find("*")
        if begin < 0:
            return []
        return [int(tensor.name[begin : tensor.name.index(".", begin)]) for tensor in self.members]

    @cached_property
    def module(self) -> str:
        return self.template.rpartition(".")[0]

    @cached_property
    def path(self) -> tuple[str, ...]:
        """The parts of the module's name."""
        return tuple(self.module.split(".")) if self.module else ()

    @cached_property
    def is_deep(self) -> bool:
        """Whether the name has more parts than that of a layer."""
        return self.template.count(".") >= DEEPEST_NAME

    @cached_property
    def parameter(self) -> str:
        """`weight`, `bias`, or whatever the tensor is called in its module."""
        return self.template.rpartition(".")[2]

    @cached_property
    def leaf(self) -> str:
        """The name that tells most: the module's for a weight or bias, else the tensor's own."""
        named = self.parameter in ("weight", "bias") and self.path
        words = [part for part in self.path if part != "*"] if named else [self.parameter]
        return words[-1] if words else self.parameter

    @property
    def is_matrix(self) -> bool:
        return self.parameter == "weight" and len(self.shape) == 2

    @property
    def stack(self) -> str | None:
        """The list of layers that this belongs to: what stands before the first number."""
        before, star, _ = self.template.partition(".*")
        return before if star else None


class Named(NamedTuple):
    """A tensor, its name without numbers, and the place of its name in natural order."""

    key: str
    name: str
    template: str
    tensor: TensorSpec


def in_order(tensors: Iterable[TensorSpec]) -> list[Named]:
    """`tensors` in the natural order of their names."""
    named = []
    for tensor in tensors:
        template, key = template_and_key(tensor.name)
        named.append(Named(key, tensor.name, template, tensor))
    named.sort()
    return named


def group(tensors: Iterable[Named]) -> list[Family]:
    """The families of `tensors`, in the order of their first member."""
    families: dict[tuple[str, tuple[int, ...], str], Family] = {}
    for _, _, template, tensor in tensors:
        key = template, tensor.shape, tensor.dtype
        family = families.get(key)
        if family is None:
            family = families[key] = Family(*key, [])
        family.members.append(tensor)
    return list(families.values())


class Structure:
    """Which stacks of layers belong to the language model, and what stands beside what."""

    def __init__(self, families: Sequence[Family], config: Config) -> None:
        self.config = config
        self._shapes: dict[str, dict[str, set[tuple[int, ...]]]] = defaultdict(dict)
        self._stacks: dict[str, list[Family]] = defaultdict(list)
        for family in families:
            self._shapes[family.module].setdefault(family.parameter, set()).add(family.shape)
            if family.stack is not None:
                self._stacks[family.stack].append(family)
        self._children: dict[str, dict[str, None]] = defaultdict(dict)
        self._seen_beside: dict[tuple[str, re.Pattern[str]], bool] = {}
        self._norm_widths: dict[str, set[tuple[int, ...]]] = {}
        for family in families:
            if not family.is_deep:
                self._note_children(family.template)
        outside = [f for f in families if f.stack is None and len(f.shape) == 2]
        sizes = config.numbers_like(r"(?!type_).*vocab_size.*")
        self.embeddings = dict.fromkeys(_token_embeddings(outside, sizes))
        heads = (f for f in outside if f.shape[0] in sizes and not EMBEDDING.search(f.leaf))
        self.heads = dict.fromkeys(heads)
        self.widths = config.widths | {f.shape[1] for f in self.embeddings}
        holders = {self._holder(anchor) for anchor in (*self.embeddings, *self.heads)}
        self.language = set[str]().union(*map(self._nearest, holders - {None}))
        self.language = self.language or self._nearest("")
        self._is_of_text_alone = self._stacks.keys() <= self.language
        self._depths = {stack: self._depth(stack) for stack in self.language}
        self._transposed = {s for s in self._stacks if self._is_transposed(s)}

    def _note_children(self, name: str) -> None:
        """Notes what every module above `name` holds."""
        while name:
            parent, _, leaf = name.rpartition(".")
            if leaf in self._children[parent]:
                return
            self._children[parent][leaf] = None
            name = parent

    def _holder(self, anchor: Family) -> str | None:
        """The least module that holds a matrix of the vocabulary and the language model's layers.

        The head of any model may lie at the top.
        """
        above = "" if anchor.is_deep else anchor.module.rpartition(".")[0]
        while above and above not in self._nearest_stacks:
            above = above.rpartition(".")[0]
        return None if not above and (anchor in self.heads or anchor.is_deep) else above

    def _nearest(self, above: str | None) -> set[str]:
        """The stacks least deep below the module `above` that may be the language model's."""
        return self._nearest_stacks.get(above or "", set())

    @cached_property
    def _nearest_stacks(self) -> Mapping[str, set[str]]:
        """For every module, the stacks least deep below it that may be the language model's."""
        found: dict[str, set[str]] = {}
        least: dict[str, int] = {}
        for stack in self._stacks:
            depth = stack.count(".")
            if depth >= DEEPEST_NAME or not self._may_belong(stack):
                continue
            for above in _modules_above(stack):
                if depth < least.setdefault(above, depth):
                    least[above] = depth
                    found[above] = set()
                if depth == least[above]:
                    found.setdefault(above, set()).add(stack)
        return found

    def _may_belong(self, stack: str) -> bool:
        path = stack.split(".")
        if any(map(TOWER.search, path)):
            return False
        if any(map(PREDICTION.search, path)):
            return False
        matrices = [family for family in self._stacks[stack] if len(family.shape) > 1]
        return any(not self.widths or self.widths & set(f.shape) for f in matrices)

    def _depth(self, stack: str) -> int | None:
        """How many layers the stack has by the config, where those past them are of another kind.

        They predict further tokens: they hold tensors that no layer before them has.
        """
        declared = self.config.depths
        first = [min(family.numbers) for family in self._stacks[stack]]
        size = 1 + max(max(family.numbers) for family in self._stacks[stack])
        count = max((count for count in declared if count <= size), default=size)
        return count if any(number >= count for number in first) else None

    def _is_transposed(self, stack: str) -> bool:
        """Whether biases are as long as columns, never as rows: the weights are [in, out]."""
        votes = set()
        for family in self._stacks[stack]:
            rows, columns = family.shape if family.is_matrix else (0, 0)
            biases = self.neighbours(family.module).get("bias", set())
            if rows != columns:
                votes |= {side == columns for side in (rows, columns) if (side,) in biases}
        return votes == {True}

    def neighbours(self, module: str) -> Mapping[str, set[tuple[int, ...]]]:
        """The shapes of the tensors that `module` itself holds, by their names in it."""
        return self._shapes.get(module, {})

    def beside(self, family: Family) -> KeysView[str]:
        """The names of the modules and tensors that stand beside the family's module."""
        return self._children.get(family.module.rpartition(".")[0], {}).keys()

    def stands_beside(self, family: Family, name: "re.Pattern[str]") -> bool:
        """Whether something of such a name stands beside the family's module."""
        key = family.module.rpartition(".")[0], name
        if key not in self._seen_beside:
            self._seen_beside[key] = any(map(name.fullmatch, self.beside(family)))
        return self._seen_beside[key]

    def is_transposed(self, family: Family) -> bool:
        return family.stack in self._transposed

    def cut(self, family: Family) -> tuple[list[Family], list[Family]]:
        """The family's members within the language model's layers, and those past them."""
        depth = self._depths.get(family.stack or "")
        if depth is None or not family.numbers or max(family.numbers) < depth:
            return [family], []
        numbered = list(zip(family.members, family.numbers, strict=True))
        past = [tensor for tensor, number in numbered if number >= depth]
        within = [tensor for tensor, number in numbered if number < depth]
        return [family.of(within)] if within else [], [family.of(past)]

    def joins_vocabulary(self, family: Family) -> bool:
        """A linear layer between the vocabulary and the layers of a model of text alone.

        It changes the width, or a norm comes after it, as in the heads of masked language models.
        """
        if not family.is_matrix or family in self.heads or not self._is_of_text_alone:
            return False
        if POSITION.search(family.leaf):
            return False
        inner = self.config.widths
        outer = self._outer_widths
        if inner.isdisjoint(outer):
            return {*family.shape} <= inner | outer and family.shape[0] != family.shape[1]
        fits = family.shape[1] in inner and family.shape[0] in outer
        return fits and not EMBEDDING.search(family.leaf) and self._is_normed(family)

    @cached_property
    def _outer_widths(self) -> set[int]:
        return {f.shape[1] for f in (*self.embeddings, *self.heads)}

    def _is_normed(self, family: Family) -> bool:
        """Whether a norm as wide as the family's rows stands in the same module."""
        parent = family.module.rpartition(".")[0]
        if parent not in self._norm_widths:
            norms = [m for m in self._modules_in(parent) if NORM.search(m.rpartition(".")[2])]
            widths = (self.neighbours(module).get("weight", set()) for module in norms)
            self._norm_widths[parent] = set[tuple[int, ...]]().union(*widths)
        return (family.shape[0],) in self._norm_widths[parent]

    def _modules_in(self, parent: str) -> Iterator[str]:
        for child in self._children.get(parent, ()):
            yield f"{parent}.{child}" if parent else child


def _modules_above(name: str) -> Iterator[str]:
    """`name`, every module that holds it, and the model, whose name is empty."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _token_embeddings(outside: Sequence[Family], sizes: frozenset[int]) -> list[Family]:
    """The matrices with a row for every token; by name and size where config has no match."""
    named = [f for f in outside if EMBEDDING.search(f.leaf) and not POSITION.search(f.leaf)]
    exact = [f for f in named if f.shape[0] in sizes]
    if exact:
        return exact
    named = [f for f in named if not any(map(TOWER.search, f.path))]
    largest = max((f.shape[0] for f in named), default=0)
    return [f for f in named if f.shape[0] == largest]
