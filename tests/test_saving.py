"""A live model saved is the converter's output, and an output loaded is the live model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fp8stream import cli
from fp8stream.errors import SchemeError
from fp8stream.online import load_into
from fp8stream.saving import save
from fp8stream.skeleton import stored_tensors
from tests.oracle import same

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", TINY),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**TINY, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralConfig", {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
kinds = pytest.mark.parametrize("kind", CONFIGS)
schemes = pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])


def config(kind: str) -> Any:
    name, values = CONFIGS[kind]
    return getattr(transformers, name)(**values)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random checkpoint of each kind, as transformers saves it."""
    made: dict[str, Path] = {}
    for kind in CONFIGS:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config(kind), dtype=torch.bfloat16)
        made[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(made[kind])
    return made


def live(kind: str, source: Path, scheme: str) -> nn.Module:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config(kind), dtype=torch.bfloat16)
    load_into(model, source, scheme=scheme)
    assert isinstance(model, nn.Module)
    return model


def contents(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []


@kinds
@schemes
def test_what_is_saved_is_what_the_converter_writes_and_loads_as_it_was(
    tmp_path: Path, sources: dict[str, Path], kind: str, scheme: str
) -> None:
    source = sources[kind]
    model = live(kind, source, scheme)
    save(model, tmp_path / "saved")
    arguments = ["quantize", str(source), str(tmp_path / "converted"), "--scheme", scheme, "-q"]
    assert cli.main(arguments) == 0
    assert_same(contents(tmp_path / "saved"), contents(tmp_path / "converted"))
    again = live(kind, tmp_path / "converted", "channel")
    assert_same(stored_tensors(again), stored_tensors(model))


def test_what_is_not_fp8_is_not_saved_as_such(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="nothing of the model is FP8"):
        save(nn.Linear(4, 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()
