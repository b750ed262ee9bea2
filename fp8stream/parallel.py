"""Which tensor-parallel sizes a checkpoint in block scales can be served with.

An engine cuts a column-parallel layer by rows, a row-parallel one by columns, and refuses it where
a block of 128 would lie in two ranks. Experts are cut along their intermediate size. Pure.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fp8stream.engines import stacked_parts
from fp8stream.names import split_numbers
from fp8stream.plan import Plan
from fp8stream.scheme import BLOCK, Granularity
from fp8stream.structure import Config
from fp8stream.weights import WeightPlan

# Sizes that engines are run with.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# Layers that lead back to the residual stream, where both sides are as wide as it is.
_ROW_PARALLEL = re.compile(
    r"^(o_proj|out_proj|wo|w2|dense|down_proj|fc2|c_proj|fc_out|proj_down|attn_out|ff_out"
    r"|dense_4h_to_h|output)$"
)
# Every rank has these whole.
_REPLICATED = re.compile(r"_a_proj|_with_mqa|^wq_a$|^wkv$|^wk$|indexer")
_KEY_VALUE = re.compile(r"^(k_proj|v_proj|key|value|wk|wv)$")


@dataclass(frozen=True)
class Edge:
    """A side of like layers, `length` in all, that `ranks` ranks cut inside a block."""

    template: str
    side: str
    length: int
    ranks: int

    def __str__(self) -> str:
        part = self.length / self.ranks
        return (
            f"{self.template}: {self.ranks} ranks cut its {self.length} {self.side} into parts of "
            f"{part:g}, no multiple of {BLOCK}"
        )


def edges(plan: Plan, config: Config, ranks: int) -> list[Edge]:
    """The layers in block scales that `ranks` ranks would cut inside a block; like ones once."""
    found = (edge for weight in _in_blocks(plan) for edge in _edges(weight, config, ranks))
    return list(dict.fromkeys(found))


def safe_sizes(plan: Plan, config: Config) -> tuple[int, ...]:
    """The sizes of `SIZES` that cut no block, and divide the attention heads."""
    heads = config.numbers("num_attention_heads", "n_head")
    fitting = (n for n in SIZES if all(count % n == 0 for count in heads))
    return tuple(ranks for ranks in fitting if not edges(plan, config, ranks))


def _in_blocks(plan: Plan) -> Iterator[WeightPlan]:
    """A weight of each kind that has block scales; both of a tensor that holds gate and up."""
    for kind in plan.kinds:
        if kind.treatment.granularity is Granularity.BLOCK:
            yield from kind.treatment.weights(kind.first)[:2]


def _edges(weight: WeightPlan, config: Config, ranks: int) -> Iterator[Edge]:
    """Where `ranks` ranks cut a block of the weight, or of the projections that it holds."""
    template = split_numbers(weight.codes.name)[0].removesuffix(".weight")
    leaf = template.rpartition(".")[2]
    if ranks == 1 or _REPLICATED.search(template.rpartition("layers.")[2]):
        return
    rows, columns = weight.shape
    if _is_row_parallel(leaf, rows, columns, config.widths):
        cuts = [Edge(template, "inputs", columns, ranks)]
    else:
        query, *others = stacked_parts(leaf, rows, config)
        # A rank has one head of keys at least, be it the same as another's.
        shared = len(others) == 2 or _KEY_VALUE.search(leaf)
        fewer = min([ranks, *config.numbers("num_key_value_heads")]) if shared else ranks
        first = fewer if _KEY_VALUE.search(leaf) else ranks
        cuts = [Edge(template, "outputs", query, first)]
        cuts += [Edge(template, "outputs", part, fewer) for part in others]
    yield from (cut for cut in cuts if cut.length % (BLOCK * cut.ranks))


def _is_row_parallel(leaf: str, rows: int, columns: int, widths: Iterable[int]) -> bool:
    if (rows in widths) != (columns in widths):
        return rows in widths
    return bool(_ROW_PARALLEL.search(leaf))
