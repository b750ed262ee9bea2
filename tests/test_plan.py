"""The plan: names, shapes and integers in, every decision out."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import BudgetError, SchemeError
from fp8stream.header import DTYPE_BITS, Shard, TensorSpec
from fp8stream.plan import Plan, Resources, TensorPlan, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.scheme import Granularity, OutputFormat, Scheme

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


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.vision_tower.layers.0.self_attn.q_proj.weight", (512, 512)),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", (512, 512)),
        ("model.multi_modal_projector.linear_1.weight", (512, 512)),
        ("model.layers.0.self_attn.q_proj.weight", (32, 512)),
        ("model.layers.2.self_attn.q_proj.weight", (512, 512)),
        ("mtp.layers.0.self_attn.q_proj.weight", (512, 512)),
        ("model.layers.0.mixer.in_proj.weight", (512, 512)),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 512, 512)),
        ("model.layers.0.conv.weight", (512, 1, 4)),
        ("h.0.attn.c_attn.weight", (512, 1536)),
        ("q_proj.weight", (512, 512)),
        ("weight", (512, 512)),
    ],
)
def test_what_is_not_recognised_is_kept_with_a_reason(name: str, shape: tuple[int, ...]) -> None:
    tensor = by_name(plan({name: shape}))[name]
    assert tensor.action == "keep"
    assert tensor.reason


@pytest.mark.parametrize("leaf", ["qkv_proj", "gate_up_proj", "query_key_value"])
def test_fused_projections_are_layers_like_others(leaf: str) -> None:
    name = f"model.layers.0.self_attn.{leaf}.weight"
    assert by_name(plan({name: (1536, 512)}))[name].action == "quantize"


@pytest.mark.parametrize("dtype", ["F64", "I8", "U8"])
def test_a_dtype_that_is_not_a_source_is_kept(dtype: str) -> None:
    name = AT + "self_attn.o_proj.weight"
    assert by_name(plan({name: (512, 512)}, dtype=dtype))[name].action == "keep"


def test_fused_sets_name_their_partners() -> None:
    found = by_name(plan(DENSE))
    q, k, v = (f"{AT}self_attn.{leaf}_proj.weight" for leaf in "qkv")
    assert found[q].fused_with == (k, v)
    assert found[AT + "mlp.gate_proj.weight"].fused_with == (AT + "mlp.up_proj.weight",)
    assert found[AT + "mlp.down_proj.weight"].fused_with == ()


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
    weight, scale = by_name(plan(DENSE, scheme))[AT + "mlp.gate_proj.weight"].outputs
    assert (weight.dtype, weight.shape) == ("F8_E4M3", (1408, 512))
    assert (scale.name, scale.dtype) == (f"{AT}mlp.gate_proj.{suffix}", "F32")
    assert scale.shape == shape


def test_a_channel_scheme_has_no_fp8_format() -> None:
    with pytest.raises(SchemeError, match="no channel scales"):
        Scheme(Granularity.CHANNEL, OutputFormat.FP8)


def declared(config: dict[str, Any], module: str) -> bool:
    """Whether an engine that reads `config` would expect `module`, a linear layer, in FP8."""
    ignore = config.get("ignore", config.get("modules_to_not_convert"))
    assert isinstance(ignore, list)
    experts = module.partition(".experts.")[0] + ".experts"
    return not any(
        re.match(entry[3:], module) if entry.startswith("re:") else entry in (module, experts)
        for entry in ignore
    )


@pytest.mark.parametrize("format_", list(OutputFormat))
@pytest.mark.parametrize("shapes", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("ignore", [(), (AT + "self_attn.q_proj",), ("re:.*experts",)])
def test_the_config_declares_exactly_what_is_quantized(
    format_: OutputFormat, shapes: Shapes, ignore: tuple[str, ...]
) -> None:
    patterns = Patterns(ignore if shapes is MOE else ignore[:0])
    scheme = Scheme(Granularity.BLOCK, format_)
    planned = plan_quantization(checkpoint(shapes), scheme, patterns, RESOURCES)
    for tensor in planned.tensors:
        if len(tensor.spec.shape) == 2 and "embed" not in tensor.spec.name:
            expected = tensor.action == "quantize"
            found = declared(planned.config["quantization_config"], tensor.spec.module)
            assert found == expected, tensor.spec.name


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
    for leaf in "qkv":
        assert by_name(planned)[f"{AT}self_attn.{leaf}_proj.weight"].action == "keep"
        assert not declared(planned.config["quantization_config"], f"{AT}self_attn.{leaf}_proj")


@pytest.mark.parametrize("format_", list(OutputFormat))
def test_a_tied_head_is_ignored_although_no_file_holds_it(format_: OutputFormat) -> None:
    shapes = {name: shape for name, shape in DENSE.items() if name != "lm_head.weight"}
    scheme = Scheme(Granularity.BLOCK, format_)
    planned = plan_quantization(
        checkpoint(shapes), scheme, Patterns(ignore=("lm_head",)), RESOURCES
    )
    assert not declared(planned.config["quantization_config"], "lm_head")


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
    shared = [t for n, t in by_name(plan(DENSE)).items() if t.fused_with]
    assert twice - once == sum(tensor.spec.nbytes for tensor in shared)


def test_slabs_cover_every_row_once_in_whole_blocks() -> None:
    planned = plan(DENSE, Scheme(Granularity.BLOCK))
    for layer in planned.layers:
        for tensor in layer.quantized:
            rows = 0
            for slab in layer.slabs(300 * 512 * 2):
                if slab.tensor is tensor:
                    assert slab.first_row == rows
                    assert slab.first_row % 128 == 0
                    rows += slab.rows
            assert rows == tensor.spec.shape[0]


def test_a_budget_that_is_too_small_is_refused_with_the_least() -> None:
    with pytest.raises(BudgetError, match="at least"):
        plan_quantization(
            checkpoint(DENSE), Scheme(Granularity.BLOCK), Patterns(), Resources(1000, 1, 10**9)
        )


def test_a_scale_name_that_is_taken_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"q_proj\.weight_scale"):
        plan({**DENSE, AT + "self_attn.q_proj.weight_scale": (1,)})


def test_blocks_on_ragged_sides_are_warned_of() -> None:
    shapes = {AT + "self_attn.o_proj.weight": (576, 576)}
    assert any("multiple of 128" in w for w in plan(shapes, Scheme(Granularity.BLOCK)).warnings)
    assert not plan(shapes).warnings


def test_what_is_mostly_kept_is_warned_of() -> None:
    shapes = {**DENSE, "lm_head.weight": (100_000, 512)}
    assert any("% of the source's bytes are kept" in w for w in plan(shapes).warnings)
