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


@pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])
def test_compressed_tensors_accepts_the_config(
    run: Runner, source: Path, tmp_path: Path, scheme: str
) -> None:
    assert run("quantize", source, tmp_path / "out", "--scheme", scheme).code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    (group, *_) = parsed.config_groups.values()
    assert group.weights.strategy == scheme
