"""The plan: names, shapes and integers in, every decision out."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import BudgetError, SchemeError
from fp8stream.header import DTYPE_BITS, Shard, TensorSpec
from fp8stream.layout import index_bytes
from fp8stream.plan import Plan, Resources, TensorPlan, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from tests import readers

RESOURCES = Resources(1 << 30, 2, 5 * 10**9)
Shapes = Mapping[str, tuple[int, ...]]


def checkpoint(shapes: Shapes, dtype: str = "BF16", **config: Any) -> Checkpoint:
    """A checkpoint that exists as headers only."""
    specs, offset = [], 8
    for name, shape in shapes.items():
        size = DTYPE_BITS[dtype] // 8
        for side in shape:
            size *= side
        specs.append(TensorSpec(name, dtype, shape, "model.safetensors", offset, size))
        offset += size
    shard = Shard("model.safetensors", offset, 0, tuple(specs))
    config = {"num_hidden_layers": 2, "model_type": "llama", **config}
    return Checkpoint(Path("model"), Path("model"), config, (shard,))


def plan(shapes: Shapes, scheme: Scheme | None = None, **config: Any) -> Plan:
    return plan_quantization(
        checkpoint(shapes, **config), scheme or Scheme(), Patterns(), RESOURCES
    )


def by_name(planned: Plan) -> dict[str, TensorPlan]:
    return {tensor.spec.name: tensor for tensor in planned.tensors}


AT = "model.layers.0."
DENSE: Shapes = {
    "model.embed_tokens.weight": (1000, 512),
    AT + "self_attn.q_proj.weight": (512, 512),
    AT + "self_attn.q_proj.bias": (512,),
    AT + "self_attn.k_proj.weight": (128, 512),
    AT + "self_attn.v_proj.weight": (128, 512),
    AT + "self_attn.o_proj.weight": (512, 512),
    AT + "mlp.gate_proj.weight": (1408, 512),
    AT + "mlp.up_proj.weight": (1408, 512),
    AT + "mlp.down_proj.weight": (512, 1408),
    AT + "input_layernorm.weight": (512,),
    "model.norm.weight": (512,),
    "lm_head.weight": (1000, 512),
}
MOE: Shapes = {
    AT + "self_attn.q_proj.weight": (512, 512),
    AT + "mlp.gate.weight": (64, 512),
    AT + "mlp.shared_expert_gate.weight": (1, 512),
    AT + "mlp.shared_expert.up_proj.weight": (512, 512),
    **{
        f"{AT}mlp.experts.{e}.{leaf}.weight": shape
        for e in range(64)
        for leaf, shape in (
            ("gate_proj", (256, 512)),
            ("up_proj", (256, 512)),
            ("down_proj", (512, 256)),
        )
    },
}


def test_roles_and_actions_of_a_dense_model() -> None:
    found = {n: (t.role.value, t.action) for n, t in by_name(plan(DENSE)).items()}
    assert found["model.embed_tokens.weight"] == ("embedding", "keep")
    assert found["lm_head.weight"] == ("lm_head", "keep")
    assert found["model.norm.weight"] == ("norm", "keep")
    assert found[AT + "self_attn.q_proj.bias"] == ("other", "keep")
    quantized = {name for name, (role, action) in found.items() if action == "quantize"}
    assert quantized == {name for name in DENSE if "_proj.weight" in name}
    assert all(found[name][0] == "linear" for name in quantized)


def test_roles_and_actions_of_a_mixture_of_experts() -> None:
    found = {n: (t.role.value, t.action) for n, t in by_name(plan(MOE)).items()}
    assert found[AT + "mlp.gate.weight"] == ("router", "keep")
    assert found[AT + "mlp.shared_expert_gate.weight"] == ("router", "keep")
    assert found[AT + "mlp.shared_expert.up_proj.weight"] == ("linear", "quantize")
    assert found[AT + "mlp.experts.63.down_proj.weight"] == ("expert", "quantize")


# Layers past the model's are of another kind only where they hold what no layer before them has.
PREDICTION: Shapes = {"model.layers.2.eh_proj.weight": (512, 1024)}
UNRECOGNISED: Shapes = {
    "model.vision_tower.layers.0.self_attn.q_proj.weight": (512, 512),
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": (512, 512),
    "model.multi_modal_projector.linear_1.weight": (512, 512),
    "model.layers.0.self_attn.q_proj.weight": (32, 512),
    "model.layers.2.self_attn.q_proj.weight": (512, 512),
    "mtp.layers.0.self_attn.q_proj.weight": (512, 512),
    "model.layers.0.mlp.experts.gate_up_proj": (8, 512, 512),
    "model.layers.0.conv.weight": (512, 1, 4),
    "q_proj.weight": (512, 512),
    "weight": (512, 512),
}


@pytest.mark.parametrize("name", list(UNRECOGNISED))
@pytest.mark.parametrize("beside", ["nothing", "a language model"])
def test_what_is_not_recognised_is_kept_with_a_reason(name: str, beside: str) -> None:
    others = dict(DENSE) if beside == "a language model" else {}
    others |= PREDICTION if ".layers.2." in name else {}
    tensor = by_name(plan({**others, name: UNRECOGNISED[name]}))[name]
    assert tensor.action == "keep"
    assert tensor.reason
    assert not tensor.weights


def test_a_transposed_linear_layer_is_kept_with_a_reason() -> None:
    """GPT-2's Conv1D: its bias is as long as the columns."""
    shapes = {
        "wte.weight": (1000, 512),
        "h.0.attn.c_attn.weight": (512, 1536),
        "h.0.attn.c_attn.bias": (1536,),
        "h.0.attn.c_proj.weight": (512, 512),
        "h.0.attn.c_proj.bias": (512,),
    }
    found = by_name(plan(shapes, vocab_size=1000))
    for leaf in ("c_attn", "c_proj"):
        tensor = found[f"h.0.attn.{leaf}.weight"]
        assert tensor.action == "keep"
        assert "transposed" in tensor.reason


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.self_attn.gate_up_proj.weight",
        "model.layers.0.self_attn.query_key_value.weight",
        "model.layers.0.mixer.in_proj.weight",
        "model.layers.0.mixer.out_proj.weight",
        "encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
    ],
)
def test_a_matrix_of_a_repeated_layer_is_a_linear_layer_whatever_its_name(name: str) -> None:
    tensor = by_name(plan({name: (1536, 512)}))[name]
    assert (tensor.role.value, tensor.action) == ("linear", "quantize")
    (weight,) = tensor.weights
    assert (weight.name, weight.shape) == (name, (1536, 512))


@pytest.mark.parametrize("dtype", ["F64", "I8", "U8"])
def test_a_dtype_that_is_not_a_source_is_kept(dtype: str) -> None:
    name = AT + "self_attn.o_proj.weight"
    assert by_name(plan({name: (512, 512)}, dtype=dtype))[name].action == "keep"


def test_fused_sets_name_their_partners() -> None:
    found = plan(DENSE).fused_with
    q, k, v = (f"{AT}self_attn.{leaf}_proj.weight" for leaf in "qkv")
    gate, up = (f"{AT}mlp.{leaf}_proj.weight" for leaf in ("gate", "up"))
    assert found == {q: (k, v), k: (q, v), v: (k, q), gate: (up,), up: (gate,)}


def test_a_fused_set_is_quantized_all_or_none() -> None:
    shapes = {**DENSE, AT + "self_attn.k_proj.weight": (32, 512)}
    found = by_name(plan(shapes))
    for leaf in "qkv":
        assert found[f"{AT}self_attn.{leaf}_proj.weight"].action == "keep"
    assert "fused with" in found[AT + "self_attn.q_proj.weight"].reason
    assert found[AT + "self_attn.o_proj.weight"].action == "quantize"


@pytest.mark.parametrize(
    ("scheme", "suffix", "shape"),
    [
        (Scheme(Granularity.CHANNEL), "weight_scale", (1408, 1)),
        (Scheme(Granularity.BLOCK), "weight_scale", (11, 4)),
        (Scheme(Granularity.TENSOR), "weight_scale", (1,)),
        (Scheme(Granularity.BLOCK, OutputFormat.FP8), "weight_scale_inv", (11, 4)),
        (Scheme(Granularity.TENSOR, OutputFormat.FP8), "weight_scale", (1,)),
    ],
)
def test_outputs(scheme: Scheme, suffix: str, shape: tuple[int, ...]) -> None:
    weight, scale = by_name(plan(DENSE, scheme))[AT + "mlp.gate_proj.weight"].outputs()
    assert (weight.dtype, weight.shape) == ("F8_E4M3", (1408, 512))
    assert (scale.name, scale.dtype) == (f"{AT}mlp.gate_proj.{suffix}", "F32")
    assert scale.shape == shape


def test_a_channel_scheme_has_no_fp8_format() -> None:
    with pytest.raises(SchemeError, match="no channel scales"):
        Scheme(Granularity.CHANNEL, OutputFormat.FP8)


def declared(planned: Plan, modules: Iterable[str]) -> readers.Strategies:
    """How engines that read the plan's config would expect `modules`, linear layers all."""
    config, modules = planned.config["quantization_config"], list(modules)
    if planned.scheme.format is OutputFormat.FP8:
        scale = planned.scheme.granularity.value
        return {name: scale if _read_as_fp8(config, name) else None for name in modules}
    found = readers.compressed_tensors(config, modules)
    # Engines differ in which of two groups wins; none must need to know.
    assert found == readers.vllm(config, modules)
    return found


def _read_as_fp8(config: readers.Config, module: str) -> bool:
    """vLLM asks for the experts of a layer as one."""
    experts, inside, _ = module.partition(".experts.")
    found = readers.vllm_fp8(config, f"{experts}.experts" if inside else module)
    assert readers.transformers_fp8(config, module) == found
    return found


def granularities(planned: Plan) -> readers.Strategies:
    """The granularity of every module that engines take for a linear layer."""
    linear = (t for t in planned.tensors if len(t.spec.shape) == 2 and "embed" not in t.spec.name)
    return {t.spec.module: t.granularity.value if t.granularity else None for t in linear}


# Sides that blocks do not fit, of every kind.
RAGGED: Shapes = {
    **DENSE,
    AT + "mlp.gate_proj.weight": (1400, 512),
    AT + "mlp.up_proj.weight": (1400, 512),
    AT + "mlp.down_proj.weight": (512, 1400),
    AT + "mlp.fc.weight": (1400, 512),
}
TIED: Shapes = {name: shape for name, shape in RAGGED.items() if name != "lm_head.weight"}
MODELS: Mapping[str, Shapes] = {"dense": DENSE, "moe": MOE, "ragged": RAGGED, "tied": TIED}
ALL_SCHEMES = [
    Scheme(Granularity.CHANNEL),
    Scheme(Granularity.BLOCK),
    Scheme(Granularity.TENSOR),
    Scheme(Granularity.BLOCK, OutputFormat.FP8),
    Scheme(Granularity.TENSOR, OutputFormat.FP8),
]
schemes = pytest.mark.parametrize(
    "scheme", ALL_SCHEMES, ids=lambda s: f"{s.granularity.value}-{s.format.value}"
)


@schemes
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize(
    "ignore", [(), (AT + "self_attn.q_proj",), ("re:.*(experts|mlp.down)",)], ids=str
)
def test_the_config_declares_exactly_what_is_quantized(
    scheme: Scheme, model: str, ignore: tuple[str, ...]
) -> None:
    planned = plan_quantization(checkpoint(MODELS[model]), scheme, Patterns(ignore), RESOURCES)
    expected = granularities(planned)
    if model == "tied":
        expected["lm_head"] = None
    assert None in expected.values()
    assert set(expected.values()) - {None}
    assert declared(planned, expected) == expected


@pytest.mark.parametrize("format_", list(OutputFormat))
def test_a_fused_set_with_a_member_that_cannot_be_quantized_is_kept_and_ignored(
    format_: OutputFormat,
) -> None:
    whole = checkpoint(DENSE)
    odd = AT + "self_attn.k_proj.weight"
    specs = [replace(t, dtype="F64") if t.name == odd else t for t in whole.tensors]
    mixed = replace(whole, shards=(replace(whole.shards[0], tensors=tuple(specs)),))
    scheme = Scheme(Granularity.BLOCK, format_)
    planned = plan_quantization(mixed, scheme, Patterns(), RESOURCES)
    modules = [f"{AT}self_attn.{leaf}_proj" for leaf in "qkv"]
    for module in modules:
        assert by_name(planned)[f"{module}.weight"].action == "keep"
    assert declared(planned, modules) == dict.fromkeys(modules)


@pytest.mark.parametrize("format_", list(OutputFormat))
def test_a_tied_head_is_ignored_although_no_file_holds_it(format_: OutputFormat) -> None:
    shapes = {name: shape for name, shape in DENSE.items() if name != "lm_head.weight"}
    scheme = Scheme(Granularity.BLOCK, format_)
    planned = plan_quantization(
        checkpoint(shapes), scheme, Patterns(ignore=("lm_head",)), RESOURCES
    )
    assert declared(planned, ["lm_head"]) == {"lm_head": None}


def test_the_config_is_the_sources_with_one_key_more() -> None:
    planned = plan(DENSE, rope_theta=1e-05, architectures=["A"], quantization_config=None)
    assert planned.config["rope_theta"] == 1e-05
    assert planned.config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_tensor_scales_put_experts_in_a_channel_group() -> None:
    planned = plan(MOE, Scheme(Granularity.TENSOR))
    groups = planned.config["quantization_config"]["config_groups"]
    assert [g["weights"]["strategy"] for g in groups.values()] == ["tensor", "channel"]
    assert groups["group_0"]["targets"] == ["Linear"]
    (target,) = groups["group_1"]["targets"]
    for tensor in planned.tensors:
        hit = bool(re.match(target[3:], tensor.spec.module))
        assert hit == (tensor.granularity is Granularity.CHANNEL)


def test_a_quantized_checkpoint_is_left_as_it_is() -> None:
    declared_as = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    planned = plan(DENSE, quantization_config=declared_as)
    assert planned.layers_quantized == 0
    assert any("already quantized (fp8, blocks of 128x128)" in text for text in planned.warnings)


def test_counts_and_bytes() -> None:
    planned = plan(DENSE)
    assert planned.layers_quantized == 7
    assert planned.layers_kept == 2
    assert planned.bytes_read == sum(t.spec.nbytes for t in planned.tensors)
    assert planned.bytes_written == sum(file.size for file in planned.files)


def test_a_shared_scale_costs_a_second_pass() -> None:
    once = plan(DENSE, Scheme(Granularity.CHANNEL)).bytes_read
    twice = plan(DENSE, Scheme(Granularity.TENSOR)).bytes_read
    shared = plan(DENSE).fused_with
    assert twice - once == sum(
        t.spec.nbytes for n, t in by_name(plan(DENSE)).items() if n in shared
    )


@pytest.mark.parametrize("slab_bytes", [1, 300 * 512 * 2, 1 << 30])
def test_slabs_cover_every_row_once_in_whole_blocks(slab_bytes: int) -> None:
    planned = plan(DENSE, Scheme(Granularity.BLOCK))
    weights = [weight for layer in planned.layers for weight in layer.weights]
    assert [w.name for w in weights] == [t.spec.name for t in planned.tensors if t.weights]
    for layer in planned.layers:
        slabs = list(layer.slabs(slab_bytes))
        assert [slab.weight for slab in slabs] == sorted(
            [slab.weight for slab in slabs], key=layer.weights.index
        )
        for weight in layer.weights:
            rows = at = 0
            for slab in (slab for slab in slabs if slab.weight is weight):
                assert slab.first_row == rows
                assert slab.first_row % 128 == 0
                assert slab.nbytes <= max(slab_bytes, 128 * weight.row_bytes)
                assert slab.nbytes == slab.rows * weight.shape[1] * 2
                assert (slab.runs.first, slab.runs.count) == (at, 1)
                rows += slab.rows
                at += slab.runs.elements
            assert rows == weight.shape[0]
            assert at == weight.spec.numel


def test_a_budget_that_is_too_small_is_refused_with_the_least() -> None:
    with pytest.raises(BudgetError, match="at least"):
        plan_quantization(
            checkpoint(DENSE), Scheme(Granularity.BLOCK), Patterns(), Resources(1000, 1, 10**9)
        )


def test_a_scale_name_that_is_taken_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"q_proj\.weight_scale"):
        plan({**DENSE, AT + "self_attn.q_proj.weight_scale": (1,)})


QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
EXPERT = AT + "mlp.experts."


def refused(*leaves: str, part: str = "self_attn") -> set[str]:
    return {f"{AT}{part}.{leaf}" for leaf in leaves}


# Sides that are changed in DENSE or MOE; what falls back then under compressed-tensors, and under
# fp8 besides; and why.
FALL_BACKS = [
    pytest.param({"self_attn.o_proj": (512, 576)}, refused("o_proj"), set(), "576", id="inputs"),
    pytest.param({"self_attn.o_proj": (576, 512)}, set(), refused("o_proj"), "576", id="outputs"),
    pytest.param(
        {"mlp.gate_proj": (1400, 512), "mlp.up_proj": (1400, 512)},
        refused(*MLP, part="mlp"),
        set(),
        "1400",
        id="a fused set with all members",
    ),
    pytest.param({"self_attn.q_proj": (576, 512)}, refused(*QKV), set(), "576", id="its first"),
    pytest.param({"self_attn.k_proj": (192, 512)}, refused(*QKV), set(), "192", id="its second"),
    pytest.param({"self_attn.v_proj": (192, 512)}, set(), refused(*QKV), "192", id="its last"),
    pytest.param(
        {"mlp.experts.63.down_proj": (512, 200)},
        {f"{EXPERT}{e}.{leaf}" for e in range(64) for leaf in (*MLP, "down_proj")},
        set(),
        "200",
        id="an expert's inputs",
    ),
    pytest.param(
        {"mlp.experts.63.down_proj": (576, 256)},
        {f"{EXPERT}{e}.{leaf}" for e in range(64) for leaf in (*MLP, "down_proj")},
        set(),
        "576",
        id="an expert's outputs",
    ),
]


@pytest.mark.parametrize("format_", list(OutputFormat))
@pytest.mark.parametrize(("changed", "refused", "by_fp8", "side"), FALL_BACKS)
def test_what_engines_refuse_in_blocks_falls_back(
    changed: Shapes, refused: set[str], by_fp8: set[str], side: str, format_: OutputFormat
) -> None:
    """To channel scales in a group of their own, or to 16 bit; sets do so as a whole."""
    base = MOE if any("experts" in name for name in changed) else DENSE
    shapes = {**base, **{f"{AT}{name}.weight": shape for name, shape in changed.items()}}
    if base is DENSE:
        shapes[AT + "self_attn.q_proj.bias"] = shapes[AT + "self_attn.q_proj.weight"][:1]
    scheme = Scheme(Granularity.BLOCK, format_)
    planned, unchanged = plan(shapes, scheme), granularities(plan(base, scheme))
    fp8 = format_ is OutputFormat.FP8
    fallen = refused | by_fp8 if fp8 else refused
    assert fallen <= unchanged.keys()
    assert {unchanged[name] for name in fallen} <= {"block"}
    expected = {**unchanged, **dict.fromkeys(fallen, None if fp8 else "channel")}
    assert granularities(planned) == expected
    assert declared(planned, expected) == expected
    told = [warning for warning in planned.warnings if "instead of blocks" in warning]
    assert len(told) == bool(fallen)
    if fallen:
        assert side in told[0]
        assert any(name in told[0] for name in fallen)
        assert (f"and {len(fallen) - 1} more" in told[0]) == (len(fallen) > 1)
        assert told[0].startswith("16 bit" if fp8 else "channel scales")
    for name in fallen:
        assert side in by_name(planned)[f"{name}.weight"].reason
    others = [s for s in ALL_SCHEMES if s.granularity is not Granularity.BLOCK]
    for other in others:
        assert granularities(plan(shapes, other)) == granularities(plan(base, other))


def test_experts_of_another_layer_do_not_fall_back() -> None:
    second = {name.replace("layers.0.", "layers.1."): shape for name, shape in MOE.items()}
    shapes = {**MOE, **second, EXPERT + "3.down_proj.weight": (576, 256)}
    found = by_name(plan(shapes, Scheme(Granularity.BLOCK)))
    for name in MOE:
        if ".experts." in name:
            assert found[name].granularity is Granularity.CHANNEL
            other = found[name.replace("layers.0.", "layers.1.")]
            assert other.granularity is Granularity.BLOCK


def test_layers_that_fell_back_have_a_group_of_their_own() -> None:
    planned = plan(RAGGED, Scheme(Granularity.BLOCK))
    groups = planned.config["quantization_config"]["config_groups"]
    assert [g["weights"]["strategy"] for g in groups.values()] == ["block", "channel"]
    assert groups["group_0"]["weights"]["block_structure"] == [128, 128]
    assert "block_structure" not in groups["group_1"]["weights"]
    config = planned.config["quantization_config"]
    turned = readers.turned(config)
    names = granularities(planned)
    assert readers.compressed_tensors(turned, names) == readers.compressed_tensors(config, names)
    assert readers.vllm(turned, names) == readers.vllm(config, names)


def test_what_the_user_keeps_does_not_fall_back() -> None:
    shapes = {**DENSE, AT + "self_attn.o_proj.weight": (512, 576)}
    patterns = Patterns(ignore=(AT + "self_attn.o_proj",))
    scheme = Scheme(Granularity.BLOCK)
    planned = plan_quantization(checkpoint(shapes), scheme, patterns, RESOURCES)
    assert by_name(planned)[AT + "self_attn.o_proj.weight"].granularity is None
    assert not planned.warnings


# Experts in one tensor, which are split, or left in one tensor.
STACKED: Shapes = {
    "model.embed_tokens.weight": (1000, 512),
    AT + "self_attn.o_proj.weight": (512, 512),
    AT + "mlp.gate.weight": (8, 512),
    AT + "mlp.experts.gate_up_proj": (8, 768, 512),
    AT + "mlp.experts.down_proj": (8, 512, 384),
}
GRANITE: Shapes = {
    "model.embed_tokens.weight": (1000, 512),
    AT + "block_sparse_moe.router.layer.weight": (8, 512),
    AT + "block_sparse_moe.input_linear.weight": (8, 768, 512),
    AT + "block_sparse_moe.output_linear.weight": (8, 512, 384),
}


@schemes
@pytest.mark.parametrize(
    ("shapes", "model_type"),
    [(DENSE, "llama"), (MOE, "llama"), (STACKED, "mistral4"), (GRANITE, "granitemoe")],
)
def test_what_a_plan_counts_is_what_it_makes(
    scheme: Scheme, shapes: Shapes, model_type: str
) -> None:
    """Names, bytes and room are told without making the outputs; they must be the same."""
    small = replace(RESOURCES, max_shard_size=400_000)
    source = checkpoint(shapes, model_type=model_type)
    planned = plan_quantization(source, scheme, Patterns(), small)
    for tensor in planned.tensors:
        outputs = tensor.outputs()
        assert tensor.output_names == [output.name for output in outputs]
        assert tensor.output_bytes == sum(output.nbytes for output in outputs)
        made = {part for weight in tensor.weights for part in (weight.codes, weight.scales)}
        assert made == (set(outputs) if tensor.action == "quantize" else set())
    weights = [weight for tensor in planned.tensors for weight in tensor.weights]
    assert planned.layers_quantized == len(weights)
    # What shares a scale is done together, whatever lies between in the order of names.
    done = [weight for layer in planned.layers for weight in layer.weights]
    assert Counter(done) == Counter(weights)
    assert all(len(file.header) == file.data_begin for file in planned.files)
    written = [tensor.name for file in planned.files for tensor in file.tensors]
    assert sorted(written) == sorted(n for t in planned.tensors for n in t.output_names)
    assert len(set(written)) == len(written)


def test_the_disk_is_asked_for_all_that_is_written() -> None:
    small = replace(RESOURCES, max_shard_size=400_000)
    planned = plan_quantization(checkpoint(MOE), Scheme(), Patterns(), small)
    assert len(planned.files) > 1
    least = sum(file.size for file in planned.files) + len(index_bytes(planned.files))
    assert least <= planned.disk_bytes <= 2 * least


def test_what_is_mostly_kept_is_warned_of() -> None:
    shapes = {**DENSE, "lm_head.weight": (100_000, 512)}
    (warning,) = plan(shapes).warnings
    assert re.match(r"9\d % of bytes stay", warning)
