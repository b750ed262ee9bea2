"""What we write loads in the real transformers and the real compressed-tensors, asked nothing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from tests.conftest import Run

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore")]
Runner = Callable[..., Run]

# What transformers' own code cannot read or run, whoever wrote it, is not in this list: see README.
READABLE = [
    ("channel", "compressed-tensors"),
    ("tensor", "compressed-tensors"),
    ("block", "compressed-tensors"),
    ("block", "fp8"),
]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module", params=list(MODELS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of each kind, made and saved by transformers itself in several shards."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        request.param.removesuffix("-tied"),
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        **MODELS[request.param],
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    directory = tmp_path_factory.mktemp("models") / str(request.param)
    model.save_pretrained(directory, max_shard_size="500KB")
    return directory


def logits(directory: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    logging.disable(logging.WARNING)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    with torch.no_grad():
        tokens = torch.arange(5, 37)[None]
        return model(tokens).logits.float(), info


@pytest.mark.parametrize(("scheme", "format_"), READABLE)
def test_it_loads_without_a_missing_or_unexpected_key_and_runs(
    run: Runner, source: Path, tmp_path: Path, scheme: str, format_: str
) -> None:
    if "moe" in source.name and (scheme, format_) == ("block", "compressed-tensors"):
        pytest.skip("transformers' dequantizer of block scales on experts fails by itself")
    output = tmp_path / "out"
    done = run("quantize", source, output, "--scheme", scheme, "--format", format_)
    assert done.code == 0, done
    found, info = logits(output)
    assert not any(info.values()), info
    expected, _ = logits(source)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean() > 0.98


def test_blocks_that_cannot_run_fall_back_and_the_model_generates(
    run: Runner, tmp_path: Path
) -> None:
    """Activations are grouped by 128: with 192 of them whole block scales die in the forward."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama", **{**SMALL, "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    done = run("quantize", tmp_path / "source", tmp_path / "out", "--scheme", "block")
    assert done.code == 0
    assert "channel scales instead of blocks" in done.err
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = written["config_groups"].values()
    assert [group["weights"]["strategy"] for group in groups] == ["block", "channel"]
    found, info = logits(tmp_path / "out")
    assert not any(info.values()), info
    expected, _ = logits(tmp_path / "source")
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean() > 0.98
    refused = run(
        "quantize", tmp_path / "source", tmp_path / "x", "--scheme", "block", "--format", "fp8"
    )
    assert refused.code == 1
    assert "no multiple of 128" in refused.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])
def test_compressed_tensors_accepts_the_config(
    run: Runner, source: Path, tmp_path: Path, scheme: str
) -> None:
    assert run("quantize", source, tmp_path / "out", "--scheme", scheme).code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    (group, *_) = parsed.config_groups.values()
    assert group.weights.strategy == scheme


MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "topk_method": "noaux_tc",
    },
    "llama4": {
        "intermediate_size": 128,
        "intermediate_size_mlp": 384,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 128,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
}


def mixture(model_type: str) -> Any:
    """A small mixture of experts in which every row of every weight has a size of its own."""
    torch.manual_seed(1)
    numbers = {**SMALL, **MIXTURES[model_type]}
    if model_type == "llama4":
        config = transformers.Llama4Config(text_config=numbers, vision_config=VISION)
        model = transformers.Llama4ForConditionalGeneration(config)
    else:
        config = transformers.AutoConfig.for_model(model_type, **numbers)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_().mul_(torch.rand(*parameter.shape[:-1], 1) + 0.1)
    return model.to(torch.bfloat16)


def dequantized(model: Any) -> dict[str, torch.Tensor]:
    """Every weight of a loaded model, compressed ones multiplied out, Llama-4's experts joined."""
    state = model.state_dict()
    weights = {
        name: value.float() * state.get(f"{name}_scale", torch.ones(1)).float()
        for name, value in state.items()
        if not name.endswith("_scale")
    }
    sets = {name.partition(".experts.0.")[0] for name in weights if ".experts.0." in name}
    for experts in (f"{name}.experts" for name in sets):
        count = sum(name.startswith(experts) for name in weights) // 3
        each = [
            [weights.pop(f"{experts}.{e}.{leaf}_proj.weight").T for leaf in ("gate", "up", "down")]
            for e in range(count)
        ]
        weights[f"{experts}.gate_up_proj"] = torch.stack([torch.cat(w[:2], 1) for w in each])
        weights[f"{experts}.down_proj"] = torch.stack([w[2] for w in each])
    return weights


@pytest.mark.parametrize("model_type", list(MIXTURES))
def test_experts_load_and_every_weight_is_at_its_place(
    run: Runner, tmp_path: Path, model_type: str
) -> None:
    source = mixture(model_type)
    source.save_pretrained(tmp_path / "source")
    assert run("quantize", tmp_path / "source", tmp_path / "out").code == 0
    logging.disable(logging.WARNING)
    loaded, info = type(source).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    found, expected = dequantized(loaded), source.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        error = (found[name] - weight.float()).norm() / weight.float().norm().clamp(min=1e-9)
        assert error < 0.04, name
