"""Which weights other code than their own layer's reads, in source of every shape."""

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any

import pytest
import torch
from torch import nn

from fp8stream.reads import read_by_parents


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def around(*given: Any) -> Any:
        return function(*given)

    return around


class Loose(nn.Module):
    """A module whose children are anything, to who checks types."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class Base(Loose):
    """`self.docs.weight` in a docstring is no read."""

    slow = False

    def __init__(self) -> None:
        super().__init__()
        for name in (
            *("direct", "cast", "named", "decorated", "lazily", "inner", "inherited", "hidden"),
            *("shape", "fresh", "docs", "trained", "off", "on", "fallen", "called"),
        ):
            self.add_module(name, nn.Linear(2, 2))
        self.size, self.exact = 1, False
        self.fresh.weight.data.zero_()

    def _init_weights(self) -> None:
        self.fresh.weight.data.zero_()

    def forward(self, x: Any) -> Any:
        return x @ self.hidden.weight

    def other(self, x: Any) -> Any:
        # self.docs.weight: a comment is none either.
        return x.to(self.inherited.weight.dtype)


class Reader(Base):
    def forward(self, x: Any) -> Any:
        x = x @ self.direct.weight.t().to(x.dtype)
        x = x.to(self.cast.weight.dtype)
        x = x @ getattr(self, "named").weight  # noqa: B009
        rows = [one @ self.inner.weight for one in x]
        if self.training and rows:
            x = x @ self.trained.weight
        if self.size > 1 and self.exact:
            x = x @ self.off.weight
            x = x + 1
        else:
            x = x @ self.on.weight
        if not self.exact or x is None:
            return x.to(self.fallen.weight.device).view(self.shape.weight.shape)
        return self.called(x)

    @decorated
    def more(self, x: Any) -> Any:
        return x @ self.decorated.weight

    @cached_property
    def dtype(self) -> Any:
        return self.lazily.weight.dtype


def test_what_methods_read_is_found_with_where() -> None:
    found = read_by_parents(nn.Sequential(Reader()))
    assert sorted(found) == [
        f"0.{name}.weight"
        for name in ("cast", "decorated", "direct", "inherited", "inner", "lazily", "named", "on")
    ]
    assert found["0.direct.weight"] == "Reader.forward reads it"
    assert found["0.inherited.weight"] == "Base.other reads it"


class Calling(Base):
    def forward(self, x: Any) -> Any:
        return super().forward(x)


def test_what_a_method_calls_of_its_base_counts() -> None:
    assert "hidden.weight" in read_by_parents(Calling())
    assert "hidden.weight" in read_by_parents(Base())
    assert "hidden.weight" not in read_by_parents(Reader())


class Far(Loose):
    """Reads from further away."""

    layers: Any
    tower: Any

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in "ab")
        self.tower = nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 2)})
        self.up = nn.Linear(2, 2)

    def forward(self, x: Any, at: int) -> Any:
        x = x @ self.layers[at][1].weight
        return x.to(self.tower.up.weight.dtype)


def test_paths_are_followed_from_any_module_around() -> None:
    found = {*read_by_parents(Far())}
    # Of `tower.up` it cannot be told apart what has the same name in the module itself.
    assert found == {"layers.0.1.weight", "layers.1.1.weight", "tower.up.weight", "up.weight"}


class Renamed(Loose):
    """Reads under names of its own."""

    def __init__(this) -> None:
        super().__init__()
        this.up, this.free = nn.Linear(2, 2), nn.Linear(2, 2)
        for name in ("looped", "sliced", "counted", "listed", "left"):
            this.add_module(name, nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in "ab"))

    def forward(this, x: Any, w: Any) -> Any:
        layer = this.up
        x = x @ layer.weight
        x = x @ w.free.weight[:0]
        for block in this.looped:
            inner = block[0]
            x = x @ inner.weight
        for block in this.sliced[:1]:
            x = x @ block[0].weight
        for _, block in enumerate(this.counted):
            x = x @ block[0].weight
        for other in this.left:
            x = other[0](x)
        return [x @ block[0].weight for block in this.listed]


def test_other_names_of_layers_are_followed() -> None:
    found = {*read_by_parents(Renamed())}
    several = {
        f"{name}.{n}.0.weight" for name in ("looped", "sliced", "counted", "listed") for n in "01"
    }
    # Of whatever a layer of that name is read, it may be this one.
    assert found == {"up.weight", "free.weight"} | several


def test_what_has_no_source_is_not_looked_into() -> None:
    names: dict[str, Any] = {"nn": nn}
    exec(
        "class Made(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up = nn.Linear(2, 2)\n"
        "    def forward(self, x):\n"
        "        return x @ self.up.weight\n",
        names,
    )
    assert read_by_parents(names["Made"]()) == {}


def test_torchs_own_encoder_hands_out_its_weights() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    found = read_by_parents(net)
    assert {*found} == {
        f"layers.{n}.{name}.weight" for n in range(2) for name in ("linear1", "linear2")
    }


SIDES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
T5_SIDES = {"d_model": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "T5": ("T5Model", {**T5_SIDES, "d_ff": 64}, {"wo"}),
    "Llama": ("LlamaForCausalLM", SIDES, set()),
    "Mixtral": ("MixtralForCausalLM", {**SIDES, "intermediate_size": 64}, set()),
    "Bloom": ("BloomForCausalLM", {"n_layer": 1, "hidden_size": 32, "n_head": 2}, set()),
}
SLOW: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "WavLM": ("WavLMModel", SIDES, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    **{
        name: (f"{name}ForCausalLM", SIDES, set[str]())
        for name in ("Qwen2", "Qwen3", "Mistral", "Gemma2", "GptOss", "Cohere", "Olmo2")
    },
    "Phi3": ("Phi3ForCausalLM", {**SIDES, "pad_token_id": 0}, set()),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", {**SIDES, "moe_intermediate_size": 64}, set()),
    "DeepseekV3": ("DeepseekV3ForCausalLM", {**SIDES, "first_k_dense_replace": 1}, set()),
    "Llama4Text": ("Llama4ForCausalLM", {**SIDES, "intermediate_size": 64}, set()),
}
CASES = [
    *MODELS.items(),
    *SLOW.items(),
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_models_of_transformers(name: str, case: tuple[str, dict[str, Any], set[str]]) -> None:
    transformers = pytest.importorskip("transformers")
    kind, sides, expected = case
    config = getattr(transformers, f"{name}Config")(**sides)
    with torch.device("meta"):
        model = getattr(transformers, kind)._from_config(config)
    assert {found.split(".")[-2] for found in read_by_parents(model)} == expected
