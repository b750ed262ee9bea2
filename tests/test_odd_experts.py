"""Experts as no model should have them: kept with a reason or refused, never lost or misread."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fp8stream.checkpoint import Checkpoint
from fp8stream.declaration import Modules
from fp8stream.errors import CheckpointError, SchemeError
from fp8stream.experts import ExpertForm, ExpertLayout, ExpertOptions
from fp8stream.header import Shard, TensorSpec
from fp8stream.plan import Plan, Resources, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from tests import readers

Shapes = Mapping[str, tuple[int, ...]]
AT = "model.layers.0.mlp.experts."
BASE: Shapes = {
    "model.embed_tokens.weight": (1000, 256),
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
}
FUSED: Shapes = {**BASE, f"{AT}gate_up_proj": (2, 256, 256), f"{AT}down_proj": (2, 256, 128)}
LISTED: Shapes = {
    **BASE,
    **{f"{AT}{e}.{leaf}_proj.weight": (256, 256) for e in range(2) for leaf in ("up", "down")},
}
CHANNEL, BLOCK = Scheme(), Scheme(Granularity.BLOCK, OutputFormat.FP8)


def plan(
    shapes: Shapes,
    scheme: Scheme = CHANNEL,
    options: ExpertOptions | None = None,
    ignore: tuple[str, ...] = (),
    **config: Any,
) -> Plan:
    specs, offset = [], 8
    for name, shape in shapes.items():
        spec = TensorSpec(name, "BF16", shape, "model.safetensors", offset, 0)
        spec = TensorSpec(name, "BF16", shape, "model.safetensors", offset, 2 * spec.numel)
        specs.append(spec)
        offset += spec.nbytes
    said = {"model_type": "mistral4", "hidden_size": 256, "moe_intermediate_size": 128, **config}
    shard = Shard("model.safetensors", offset, 0, tuple(specs))
    checkpoint = Checkpoint(Path("m"), Path("m"), {"vocab_size": 1000, **said}, (shard,))
    resources = Resources(1 << 30, 1, 10**9)
    return plan_quantization(
        checkpoint, scheme, Patterns(ignore), resources, options or ExpertOptions()
    )


def action(planned: Plan, name: str) -> str:
    return next(tensor.action for tensor in planned.tensors if tensor.spec.name == name)


def written(planned: Plan) -> set[str]:
    return {tensor.name for file in planned.files for tensor in file.tensors}


def test_a_layer_within_the_module_of_experts_is_declared_as_it_is() -> None:
    dense = f"{AT}dense"
    planned = plan({**LISTED, f"{dense}.weight": (256, 256)}, ignore=(dense,))
    assert action(planned, f"{dense}.weight") == "keep"
    config = planned.config["quantization_config"]
    names = {dense: None, f"{AT}0.up_proj": "channel"}
    assert readers.compressed_tensors(config, names) == names


def test_experts_of_one_module_that_are_treated_differently_cannot_be_declared() -> None:
    modules = Modules()
    modules.add_experts("layers.0.experts", Granularity.CHANNEL)
    with pytest.raises(SchemeError, match=r"layers\.0\.experts"):
        modules.add_experts("layers.0.experts", None)


def test_gate_and_up_that_do_not_part_evenly_are_refused() -> None:
    odd = {f"{AT}gate_up_proj": (2, 129, 256), f"{AT}down_proj": (2, 256, 64)}
    with pytest.raises(CheckpointError, match=r"gate_up_proj.*129.*even"):
        plan({**BASE, **odd}, moe_intermediate_size=64)


def test_no_experts_at_all_are_kept_and_written() -> None:
    none = {f"{AT}gate_up_proj": (0, 256, 256), f"{AT}down_proj": (0, 256, 128)}
    planned = plan({**FUSED, **none})
    assert action(planned, f"{AT}gate_up_proj") == "keep"
    assert none.keys() <= written(planned)


def test_two_outputs_of_one_name_are_refused() -> None:
    with pytest.raises(SchemeError, match="there is one already"):
        plan({**FUSED, f"{AT}gate_proj": (2, 128, 256)})


@pytest.mark.parametrize("scheme", [CHANNEL, BLOCK], ids=["channel", "fp8-block"])
def test_a_parameter_called_moe_is_no_list(scheme: Scheme) -> None:
    shapes = {**BASE, "model.layers.0.moe": (2, 256, 256)}
    assert action(plan(shapes, scheme), "model.layers.0.moe") == "keep"


def test_keep_keeps_experts_of_both_kinds() -> None:
    other = {name.replace("layers.0", "layers.1"): shape for name, shape in FUSED.items()}
    planned = plan({**LISTED, **other}, options=ExpertOptions(ExpertForm.KEEP))
    kinds = {name: action(planned, name) for name in (*LISTED, *other) if ".experts." in name}
    assert set(kinds.values()) == {"keep"}


def test_a_layout_that_the_fused_form_has_not_is_split() -> None:
    shapes = {**FUSED, f"{AT}gate_up_proj": (2, 256, 256), f"{AT}down_proj": (2, 128, 256)}
    stated = ExpertOptions(layout=ExpertLayout.IN_OUT)
    planned = plan(shapes, BLOCK, stated, model_type="unheard_of")
    assert f"{AT}1.up_proj.weight_scale_inv" in written(planned)
    fused = ExpertOptions(ExpertForm.FUSED, ExpertLayout.IN_OUT)
    planned = plan(shapes, BLOCK, fused, model_type="unheard_of")
    assert any("no engine is known" in warning for warning in planned.warnings)


@pytest.mark.parametrize("bias", ["gate_up_proj_bias", "down_proj.bias"])
def test_experts_with_biases_are_not_written_whatever_those_are_called(bias: str) -> None:
    split = ExpertOptions(ExpertForm.PER_EXPERT)
    with pytest.raises(SchemeError, match="biases"):
        plan({**FUSED, f"{AT}{bias}": (2, 256)}, options=split)


def test_a_tensor_of_matrices_under_an_unknown_name_is_kept() -> None:
    planned = plan({**FUSED, "model.layers.0.mix": (2, 256, 256)}, num_local_experts=2)
    assert action(planned, "model.layers.0.mix") == "keep"
    assert "model.layers.0.mix" in written(planned)


def test_a_fused_tensor_asks_for_the_room_of_two() -> None:
    shapes = {**FUSED, f"{AT}gate_up_proj": (512, 256, 256), f"{AT}down_proj": (512, 256, 128)}
    (file,) = plan(shapes, BLOCK).files
    assert file.data_begin <= 3 * 4096


def test_a_name_that_reads_as_an_expression_is_refused_in_fp8_at_once() -> None:
    shapes = {**BASE, "model.layers.0.(a+)+$.weight": (16, 256)}
    with pytest.raises(SchemeError, match="expression"):
        plan(shapes, BLOCK)
