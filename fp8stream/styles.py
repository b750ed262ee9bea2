"""Which parts of a model each rank of tensor parallelism has: a plan's words, and what they cut.

The words are those of transformers' plans, by names of modules and parameters in which `*` stands
for a number or a name, and `*.` at the beginning for any path. Sides must fall into equal parts,
and a block of 128, or an attention head, must lie in one rank: what the plan cuts is known before
anything of the model is touched. Pure.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from fp8stream.errors import SchemeError

BLOCK_NAME = "a block"
# Sizes beyond are not named to whoever looks for one that works.
_MOST_RANKS = 64


class Style(Enum):
    """What a rank has of a layer, and what it does for the others."""

    WHOLE = "all of it"
    COLUMN = "outputs, which stay with the rank"
    COLUMN_GATHERED = "outputs, which every rank gets"
    ROW = "inputs, of which the rank has its own"
    ROW_OF_WHOLE = "inputs, of which every rank has all"
    PACKED_COLUMN = "outputs of each of two matrices below each other"
    PACKED_ROW = "inputs of each of two matrices beside each other"
    ROWS_OF_TABLE = "rows of an embedding"
    COLUMNS_OF_TABLE = "columns of an embedding"
    EXPERTS = "some of the experts"
    WITHIN_EXPERTS = "some of each expert's intermediate size"
    SUM = "a part of a sum"


STYLES: Mapping[str, Style] = {
    "replicated": Style.WHOLE,
    "replicate": Style.WHOLE,
    "replicated_with_grad_allreduce": Style.WHOLE,
    "mla_kv_a_proj": Style.WHOLE,
    "local_params": Style.WHOLE,
    "ep_router": Style.WHOLE,
    "colwise": Style.COLUMN,
    "colwise_rep": Style.COLUMN_GATHERED,
    "colwise_gather_output": Style.COLUMN_GATHERED,
    "rowwise": Style.ROW,
    "rowwise_rep": Style.ROW_OF_WHOLE,
    "rowwise_split_input": Style.ROW_OF_WHOLE,
    "packed_colwise": Style.PACKED_COLUMN,
    "packed_rowwise": Style.PACKED_ROW,
    "embedding_rowwise": Style.ROWS_OF_TABLE,
    "embedding_colwise": Style.COLUMNS_OF_TABLE,
    "experts": Style.EXPERTS,
    "grouped_gemm": Style.EXPERTS,
    "ep_dispatch_experts": Style.EXPERTS,
    "moe_tp_experts": Style.WITHIN_EXPERTS,
    "all_reduce": Style.SUM,
}


def styles_of(plan: Mapping[str, str], names: Iterable[str]) -> dict[str, Style]:
    """The style of each of the model's `names` that the plan names: what comes last in it counts.

    Raises SchemeError for a style that is not understood.
    """
    for name, word in plan.items():
        if word not in STYLES:
            known = ", ".join(STYLES)
            raise SchemeError(f"tp_plan: {name}: {word!r} is no style; expected one of {known}")
    rules = [(_pattern(name), STYLES[word]) for name, word in plan.items()]
    found: dict[str, Style] = {}
    for name in names:
        for pattern, style in rules:
            if pattern.fullmatch(name):
                found[name] = style
    return found


def unused(plan: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """The plan's names that are none of the model's."""
    return [name for name in plan if not any(_pattern(name).fullmatch(each) for each in names)]


def _pattern(name: str) -> re.Pattern[str]:
    path = r"(.+\.)?" if name.startswith("*.") else ""
    return re.compile(path + r"[^.]+".join(map(re.escape, name.removeprefix("*.").split("*"))))


@dataclass(frozen=True)
class Side:
    """A side of a layer that ranks cut: `length` of `what`, of which `unit` lie in one rank.

    A layer that is `alone` gives the others the same whether it is cut or not.
    """

    layer: str
    what: str
    length: int
    unit: int = 1
    unit_name: str = ""
    alone: bool = False

    def falls_into(self, ranks: int) -> bool:
        """Whether `ranks` ranks have as much each, and cut no unit."""
        return ranks == 1 or self.length % (self.unit * ranks) == 0

    def refusal(self, ranks: int) -> str:
        """What is wrong with cutting it for `ranks` ranks."""
        what = f"{self.layer}: {ranks} ranks cut its {self.length} {self.what} into parts of "
        of = f", no multiple of {self.unit} ({self.unit_name})" if self.unit > 1 else ""
        return f"{what}{self.length / ranks:g}{of}"


def check_sides(sides: Sequence[Side], ranks: int) -> None:
    """Raises SchemeError, with the sizes that would do, where `ranks` ranks cut what they must not.

    The layer that is named is the first.
    """
    bad = [side for side in sides if not side.falls_into(ranks)]
    if not bad:
        return
    more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
    works = [n for n in range(1, _MOST_RANKS + 1) if all(side.falls_into(n) for side in sides)]
    hints = [f"tp_size may be {', '.join(map(str, works))}"]
    if any(side.unit_name == BLOCK_NAME for side in bad):
        hints.append("take another scheme")
    if all(side.alone for side in bad):
        hints.append(f'leave it whole with tp_plan {{..., "{bad[0].layer}": "replicated"}}')
    raise SchemeError(f"{bad[0].refusal(ranks)}{more}: {', or '.join(hints)}")
