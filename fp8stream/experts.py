"""Experts that lie in one tensor: how they lie there, and in which form an engine loads them.

Whether `[experts, a, b]` is transposed, and whether gate and up are halves or alternate, cannot be
seen in shapes, and a wrong guess gives a model that loads and babbles. So both are facts about a
model type, kept in one table; config and shapes must agree with them. A model type that is not in
the table keeps its experts in 16 bit. Pure.

The facts were read from, and mostly run through, the loaders of vLLM 0.32 and transformers 5.23.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from fp8stream.errors import CheckpointError, SchemeError
from fp8stream.header import TensorSpec
from fp8stream.roles import STACKED_ROWS, Classified, Role, expert_module
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from fp8stream.structure import Config, Family


class ExpertLayout(str, Enum):
    """How a tensor `[experts, a, b]` holds its matrices, in the words of `--expert-layout`.

    `out-in` is [out, in] as in a linear layer, `in-out` the transposed; gate and up are halves of
    the output side, gate first, or alternate along it.
    """

    OUT_IN = "out-in"
    IN_OUT = "in-out"
    OUT_IN_INTERLEAVED = "out-in-interleaved"
    IN_OUT_INTERLEAVED = "in-out-interleaved"

    @property
    def transposed(self) -> bool:
        return self in (ExpertLayout.IN_OUT, ExpertLayout.IN_OUT_INTERLEAVED)

    @property
    def interleaved(self) -> bool:
        return self in (ExpertLayout.OUT_IN_INTERLEAVED, ExpertLayout.IN_OUT_INTERLEAVED)


class ExpertForm(str, Enum):
    """How experts are written, in the words of `--experts`."""

    AUTO = "auto"
    PER_EXPERT = "per-expert"
    FUSED = "fused"
    KEEP = "keep"


@dataclass(frozen=True)
class ExpertOptions:
    """What was asked for: the form to write, and the source's layout where it is stated."""

    form: ExpertForm = ExpertForm.AUTO
    layout: ExpertLayout | None = None


AS_KNOWN = ExpertOptions()


@dataclass(frozen=True)
class Arrangement:
    """What becomes of the experts in one tensor.

    `projections` are the matrices that lie in it for each expert, by the names that they get where
    they are split. Where they stay fused, `weight_name` and `scale_name` make the names from the
    module `{set}` that holds the experts, the weight's `{name}` with or without (`{module}`) a
    final `.weight`, and the format's `{suffix}`, or its `{short}` form without `weight_`.
    `caveat` says who does not read them.
    """

    form: ExpertForm
    layout: ExpertLayout
    projections: tuple[str, ...]
    weight_name: str = "{name}"
    scale_name: str = "{name}_{short}"
    caveat: str = ""


# What a tensor of experts is called, and what lies in it.
_PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "input_linear": ("gate_proj", "up_proj"),
    "w13_weight": ("gate_proj", "up_proj"),
    "fc1": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
    "output_linear": ("down_proj",),
    "w2_weight": ("down_proj",),
    "fc2": ("down_proj",),
}
_RENAMED = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}


@dataclass(frozen=True)
class Facts:
    """What engines do with the fused experts of some model types.

    `forms` are those to write under compressed-tensors, `fp8` with block and `fp8` with tensor
    scales; `transformers` tells in which of them that library reads them, `vllm` the forms that it
    reads whatever the default is. `why` is the reason to keep them. `layout` None: config.json
    tells.
    """

    layout: ExpertLayout | None
    forms: tuple[ExpertForm, ExpertForm, ExpertForm]
    why: str = ""
    scale_name: str = "{name}_{short}"
    transformers: tuple[bool, bool, bool] = (False, False, False)
    vllm: frozenset[ExpertForm] = frozenset()
    refused: frozenset[tuple[OutputFormat, Granularity]] = frozenset()

    def form(self, scheme: Scheme) -> ExpertForm:
        """The form to write under `scheme`."""
        return self.forms[_column(scheme)]

    def caveat(self, scheme: Scheme, form: ExpertForm) -> str:
        """Who does not read the experts in `form`; empty if vLLM and transformers do."""
        default = form is self.form(scheme)
        if default and self.transformers[_column(scheme)]:
            return ""
        if default or form in self.vllm:
            return VLLM_ALONE
        return _UNREAD


def _column(scheme: Scheme) -> int:
    """Where the facts for `scheme` stand."""
    if scheme.format is OutputFormat.COMPRESSED_TENSORS:
        return 0
    return 1 if scheme.granularity is Granularity.BLOCK else 2


_OUT_IN, _IN_OUT = ExpertLayout.OUT_IN, ExpertLayout.IN_OUT
_SPLIT, _FUSED, _KEEP = ExpertForm.PER_EXPERT, ExpertForm.FUSED, ExpertForm.KEEP
_NO_ENGINE = "no engine loads these experts in FP8"
_STATE = "state it with --expert-layout"
VLLM_ALONE = "transformers does not read such experts, vLLM does"
_UNREAD = "no engine is known to load such experts in this form"
_SPLIT_THEM = "use --experts per-expert"
_KEEP_THEM = "keep them in 16 bit with --experts keep"

_BLOCK_ALONE = (False, True, False)
_EITHER = frozenset({_SPLIT, _FUSED})

_FACTS: tuple[tuple[frozenset[str], Facts], ...] = (
    # vLLM and SGLang; run.
    (
        frozenset({"llama4", "llama4_text"}),
        Facts(_IN_OUT, (_SPLIT, _SPLIT, _SPLIT), transformers=(True, False, False)),
    ),
    # Transposed on the hub, not so where transformers saved it. vLLM and SGLang; run.
    (
        frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"}),
        Facts(None, (_SPLIT, _SPLIT, _SPLIT), vllm=_EITHER),
    ),
    # vLLM's generic loader: run for the first two, read for the others.
    (
        frozenset({"mistral4", "minimax_m3_vl_text", "gemma4", "gemma4_text"})
        | {"qwen3_5_moe", "qwen3_5_moe_text", "hy_v4"},
        Facts(_OUT_IN, (_SPLIT, _FUSED, _SPLIT), transformers=_BLOCK_ALONE, vllm=_EITHER),
    ),
    # vLLM wants gate_proj, SGLang w1, transformers only the fused block form; run.
    (
        frozenset({"granitemoe", "granitemoeshared"}),
        Facts(
            _OUT_IN,
            (_KEEP, _FUSED, _KEEP),
            "engines disagree on the names of these experts",
            transformers=_BLOCK_ALONE,
            vllm=_EITHER,
        ),
    ),
    (
        frozenset({"granitemoehybrid"}),
        Facts(
            _OUT_IN,
            (_KEEP, _KEEP, _KEEP),
            "engines disagree on the names of these experts",
            vllm=frozenset({_SPLIT}),
        ),
    ),
    # gate, up and down are tensors of their own. vLLM; run.
    (
        frozenset({"step3p5", "step3p7"}),
        Facts(
            _OUT_IN,
            (_FUSED, _FUSED, _FUSED),
            scale_name="{module}.{suffix}",
            transformers=_BLOCK_ALONE,
            vllm=_EITHER,
        ),
    ),
    # vLLM takes them in one way only, and transformers in none; run.
    (
        frozenset({"aria", "aria_text"}),
        Facts(
            _IN_OUT,
            (_KEEP, _FUSED, _KEEP),
            "16 bit is the one form of these experts that every engine loads",
            scale_name="{module}_{short}",
            refused=frozenset({(OutputFormat.FP8, Granularity.TENSOR)}),
        ),
    ),
    # vLLM's own expert loader; run. Its shared experts are never quantized.
    (
        frozenset({"inkling_mm_model"}),
        Facts(ExpertLayout.OUT_IN_INTERLEAVED, (_FUSED, _FUSED, _KEEP), _NO_ENGINE),
    ),
    (
        frozenset({"gpt_oss"}),
        Facts(ExpertLayout.IN_OUT_INTERLEAVED, (_KEEP, _KEEP, _KEEP), _NO_ENGINE),
    ),
    (
        frozenset({"inkling2"}),
        Facts(ExpertLayout.OUT_IN_INTERLEAVED, (_KEEP, _KEEP, _KEEP), _NO_ENGINE),
    ),
    (frozenset({"jetmoe", "dbrx"}), Facts(_OUT_IN, (_KEEP, _KEEP, _KEEP), _NO_ENGINE)),
)
_UNKNOWN = Facts(None, (_KEEP, _KEEP, _KEEP))
# Where only the layout is unknown, and it is stated: what vLLM's generic loader takes.
_GENERIC = Facts(_OUT_IN, (_SPLIT, _FUSED, _SPLIT), vllm=_EITHER)


def arrange(
    classified: Mapping[Family, Classified],
    config: Config,
    scheme: Scheme,
    options: ExpertOptions,
) -> tuple[dict[Family, Classified], dict[Family, Arrangement]]:
    """Decides on every tensor of experts: `classified` with that decision, and the arrangements.

    Raises CheckpointError where config.json or the shapes contradict the layout, and SchemeError
    for a form that cannot be written.
    """
    decided = {family: known for family, known in classified.items() if not known.stacked}
    arrangements: dict[Family, Arrangement] = {}
    biased = {
        f.template.removesuffix("bias")[:-1] for f in classified if f.parameter[-4:] == "bias"
    }
    for members in _sets(classified):
        choice = _Choice(tuple(members), _facts(config, options), scheme, options)
        objection = next((known.reason for known in members.values() if not known.quantize), "")
        reason = choice.reason_to_keep(objection, any(_stem(f) in biased for f in members))
        for family, known in members.items():
            told = known.but(not reason, reason or choice.words)
            decided[family] = replace(told, quantizable=not reason)
        if not reason:
            arrangements |= choice.arrangements(config)
    if options.form is _KEEP:
        decided = _without_experts(decided)
    elif options.form is _FUSED and not any(known.stacked for known in decided.values()):
        raise SchemeError("--experts fused: the source has no experts that lie in one tensor")
    return decided, arrangements


def _sets(classified: Mapping[Family, Classified]) -> list[dict[Family, Classified]]:
    """The tensors that hold a layer's experts together: like layers once.

    Layers may differ in the shapes or dtypes of some, so families are cut accordingly.
    """
    layers: dict[str, list[int]] = defaultdict(list)
    stacked = [family for family, known in classified.items() if known.stacked]
    for family in stacked:
        for tensor in family.members:
            layers[expert_module(tensor.name)].append(id(family))
    together: dict[tuple[int, ...], int] = {}
    kinds = {
        module: together.setdefault(tuple(held), len(together)) for module, held in layers.items()
    }
    found: dict[int, dict[Family, Classified]] = defaultdict(dict)
    for family in stacked:
        alike: dict[int, list[TensorSpec]] = defaultdict(list)
        for tensor in family.members:
            alike[kinds[expert_module(tensor.name)]].append(tensor)
        for kind, members in alike.items():
            found[kind][family.of(members)] = classified[family]
    return list(found.values())


def _without_experts(decided: Mapping[Family, Classified]) -> dict[Family, Classified]:
    """All experts in 16 bit, those that are matrices of their own too."""
    return {
        family: known.but(False, "--experts keep")
        if known.role is Role.EXPERT and known.quantize
        else known
        for family, known in decided.items()
    }


def _stem(family: Family) -> str:
    """What the name of the family's bias begins with: `a.fc1` of `a.fc1.weight`."""
    return re.sub(r"[._]weight$", "", family.template)


def check_fused(name: str, layout: ExpertLayout, granularity: Granularity) -> None:
    """Raises SchemeError where scales cannot follow a tensor that stays as it lies."""
    if layout.transposed and granularity is not Granularity.BLOCK:
        raise SchemeError(
            f"tensor {name!r}: {granularity.value} scales for experts that lie transposed in one "
            f"tensor are not written; {_SPLIT_THEM}"
        )


def _facts(config: Config, options: ExpertOptions) -> Facts:
    for types, facts in _FACTS:
        if config.is_one_of(types):
            return facts
    return _GENERIC if options.layout else _UNKNOWN


@dataclass(frozen=True)
class _Choice:
    """What to do with the experts of one kind of layer."""

    members: Sequence[Family]
    facts: Facts
    scheme: Scheme
    options: ExpertOptions

    @property
    def form(self) -> ExpertForm:
        if self.options.form is not ExpertForm.AUTO:
            return self.options.form
        known = self.facts.form(self.scheme)
        # Engines read one tensor in one layout alone.
        return _SPLIT if known is _FUSED and self._is_stated_otherwise else known

    @property
    def _is_stated_otherwise(self) -> bool:
        """Whether the layout that was stated is not the one that engines know."""
        return self.options.layout not in (None, self.facts.layout)

    @property
    def where(self) -> str:
        return self.members[0].template

    @property
    def words(self) -> str:
        return "experts, split" if self.form is _SPLIT else "experts, left in one tensor"

    def reason_to_keep(self, objection: str, biased: bool) -> str:
        """Why the experts stay in 16 bit; empty if they are quantized.

        `objection` is the reason that one of them has already. Raises SchemeError for what was
        asked for and cannot be.
        """
        form = self.options.form
        if form is _KEEP:
            return "--experts keep"
        if objection == STACKED_ROWS and form is not ExpertForm.AUTO:
            raise SchemeError(f"{self.where}: --experts {form.value}: {objection}; {_KEEP_THEM}")
        if objection:
            return objection
        if "shared" in self.where:
            return "shared experts in one tensor: engines keep them in 16 bit"
        if form is ExpertForm.AUTO and self._nameless:
            return f"{self._nameless} does not tell what it holds"
        if form is ExpertForm.AUTO and self.facts is _UNKNOWN:
            return f"experts of a model type whose layout is not known: {_STATE}"
        if form is ExpertForm.AUTO and self._is_refused:
            under = f"--format {self.scheme.format.value} --scheme {self.scheme.granularity.value}"
            raise SchemeError(f"{self.where}: {_NO_ENGINE} under {under}; {_KEEP_THEM}")
        if self.form is not _KEEP:
            self._check_form(biased)
        return self.facts.why if self.form is _KEEP else ""

    @property
    def _nameless(self) -> str:
        """A tensor whose name is not one of those that tell what lies in it; empty if none is."""
        return next((f.leaf for f in self.members if f.leaf not in _PROJECTIONS), "")

    @property
    def _is_refused(self) -> bool:
        return (self.scheme.format, self.scheme.granularity) in self.facts.refused

    def _check_form(self, biased: bool) -> None:
        """Refuses what cannot be written, or would not be read."""
        where = f"{self.where}: --experts {self.form.value}"
        if biased:
            raise SchemeError(f"{where}: they have biases, and {_NO_ENGINE} then; {_KEEP_THEM}")
        if self._nameless:
            nameless = f"{self._nameless} does not tell what it holds"
            raise SchemeError(f"{where}: {nameless}; {_KEEP_THEM}")
        if self.options.layout is None and self.facts is _UNKNOWN:
            raise SchemeError(f"{where}: their layout is not known: {_STATE}")
        tensor = self.scheme.expert_granularity is Granularity.TENSOR
        if self.form is _FUSED and tensor and self.facts.forms[2] is not _FUSED:
            raise SchemeError(f"{where}: engines read no tensor scales there; {_SPLIT_THEM}")

    def arrangements(self, config: Config) -> dict[Family, Arrangement]:
        """How each of the tensors is written. Raises CheckpointError and SchemeError."""
        layout = self.options.layout or self.facts.layout or self._layout_from(config)
        self._check_shapes(layout, config)
        return {family: self._arrangement(family, layout) for family in self.members}

    def _arrangement(self, family: Family, layout: ExpertLayout) -> Arrangement:
        projections = _PROJECTIONS[family.leaf]
        renamed = self.form is _FUSED and family.leaf in _RENAMED
        name = f"{{set}}.{_RENAMED[family.leaf]}" if renamed else "{name}"
        caveat = self.facts.caveat(self.scheme, self.form)
        if self.form is _FUSED and self._is_stated_otherwise:
            caveat = _UNREAD
        return Arrangement(self.form, layout, projections, name, self.facts.scale_name, caveat)

    def _layout_from(self, config: Config) -> ExpertLayout:
        """Which of two layouts, by config.json: where both fit, the one that engines assume."""
        for layout in (ExpertLayout.IN_OUT, ExpertLayout.OUT_IN):
            if not self._contradictions(layout, config):
                return layout
        raise CheckpointError(self._contradictions(ExpertLayout.IN_OUT, config)[0])

    def _check_shapes(self, layout: ExpertLayout, config: Config) -> None:
        told = None if self.options.layout else config
        problems = self._contradictions(layout, told)
        if problems:
            raise CheckpointError(problems[0])

    def _contradictions(self, layout: ExpertLayout, config: Config | None) -> list[str]:
        """Where shapes contradict the layout, each other, or what `config` says of sizes."""
        sizes = _Sizes.of(config)
        found = [
            message for family in self.members if (message := sizes.contradiction(family, layout))
        ]
        inner = {_sides(family, layout) for family in self.members}
        if len(inner) > 1 and not found:
            shapes = " and ".join(f"{f.template} {list(f.shape)}" for f in self.members)
            found.append(
                f"{shapes}: the shapes do not go together, read as {layout.value}: state another "
                "--expert-layout"
            )
        return found


def _sides(family: Family, layout: ExpertLayout) -> tuple[int, int]:
    """The hidden and the intermediate size that the family's shape has under `layout`."""
    _, first, second = family.shape
    out, columns = (second, first) if layout.transposed else (first, second)
    projections = _PROJECTIONS[family.leaf]
    if projections == ("down_proj",):
        return out, columns
    return columns, out // len(projections)


@dataclass(frozen=True)
class _Sizes:
    """What config.json says of the sizes of experts; empty where it says nothing."""

    experts: frozenset[int]
    hidden: frozenset[int]
    intermediate: frozenset[int]

    @staticmethod
    def of(config: Config | None) -> "_Sizes":
        if config is None:
            return _Sizes(frozenset(), frozenset(), frozenset())
        return _Sizes(
            config.experts,
            config.widths,
            config.numbers_like(r".*intermediate_size|ffn_dim|ffn_hidden_size"),
        )

    def contradiction(self, family: Family, layout: ExpertLayout) -> str:
        """What is wrong with the family's shape under `layout`; empty if nothing is."""
        out = family.shape[2 if layout.transposed else 1]
        if out % len(_PROJECTIONS[family.leaf]):
            return (
                f"{family.members[0].file}: tensor {family.members[0].name!r}: shape "
                f"{list(family.shape)}: gate and up share the output side, read as "
                f"{layout.value} {out}: expected an even number; {_STATE}"
            )
        hidden, intermediate = _sides(family, layout)
        for found, expected, what in (
            (family.shape[0], self.experts, "experts"),
            (hidden, self.hidden, "hidden size"),
            (intermediate, self.intermediate, "intermediate size"),
        ):
            if expected and found not in expected:
                numbers = " or ".join(map(str, sorted(expected)))
                return (
                    f"{family.members[0].file}: tensor {family.members[0].name!r}: shape "
                    f"{list(family.shape)} contradicts config.json: read as {layout.value} its "
                    f"{what} is {found}, expected {numbers}; {_STATE}, or keep the experts in 16 "
                    "bit with --experts keep"
                )
        return ""
