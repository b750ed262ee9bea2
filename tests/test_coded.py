"""FP8 checkpoints in a live model: the same numbers, in FP8 wherever their scales can be said."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8stream import online
from fp8stream.errors import CheckpointError, SchemeError
from fp8stream.fp8 import dequantize_weight, quantize_weight
from fp8stream.fused_experts import FP8Experts
from fp8stream.linear import FP8Linear
from fp8stream.mapping import Part, Rule
from fp8stream.scheme import Granularity
from fp8stream.stream import LayerDone
from tests.nets import HIDDEN, directory, random
from tests.oracle import same

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("spoiled")]
schemes = pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])


def net(**shapes: tuple[int, int]) -> nn.Module:
    """A model of one embedding and linear layers of these [out, in]."""
    with torch.device("meta"):
        layers = {
            name: nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
            for name, (rows, columns) in shapes.items()
        }
        embed = nn.Embedding(512, HIDDEN, dtype=torch.bfloat16)
        return nn.ModuleDict({"embed": embed, "layers": nn.ModuleList([nn.ModuleDict(layers)])})


def coded(
    weights: Mapping[str, Tensor], scheme: str, scale: str = "weight_scale"
) -> dict[str, Tensor]:
    """The weights of the layer's modules as another tool would have written them."""
    found: dict[str, Tensor] = {"embed.weight": random(512, HIDDEN)}
    for name, weight in weights.items():
        codes, scales = quantize_weight(weight, Granularity(scheme))
        found |= {f"layers.0.{name}.weight": codes, f"layers.0.{name}.{scale}": scales}
    return found


def numbers(source: Mapping[str, Tensor], name: str) -> Tensor:
    codes = source[f"layers.0.{name}.weight"]
    scales = next(v for k, v in source.items() if k.startswith(f"layers.0.{name}.weight_scale"))
    return dequantize_weight(codes, scales)


def layer(model: nn.Module, name: str) -> Any:
    return model.get_submodule(f"layers.0.{name}")


def rules(**parts: slice) -> dict[str, Rule]:
    """Tensors called so go to those rows of `all`."""
    return {
        f"layers.0.{name}.weight": Part("layers.0.all.weight", rows) for name, rows in parts.items()
    }


@pytest.mark.parametrize("given", ["files", "dict", "list"])
@schemes
@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv"])
def test_codes_and_scales_are_those_of_the_source(
    tmp_path: Path, scheme: str, given: str, scale: str
) -> None:
    model = net(p=(300, 200), q=(128, 256))
    told: list[LayerDone] = []
    tensors = coded({"p": random(300, 200), "q": random(128, 256, seed=1)}, scheme, scale)
    source: Any = {"files": directory(tmp_path, tensors), "dict": tensors}.get(given)
    result = online.load_into(model, source or list(tensors.items()), progress=told.append)
    for name in ("p", "q"):
        module = layer(model, name)
        assert isinstance(module, FP8Linear)
        assert module.granularity.value == scheme
        assert same(module.weight.detach(), tensors[f"layers.0.{name}.weight"])
        assert same(module.weight_scale.detach(), tensors[f"layers.0.{name}.{scale}"])
    assert result.unexpected == result.missing == ()
    assert {done.name for done in told} >= {"embed"}
    assert len(told) == 3
    # Those of bytes that were read.
    assert result.bytes_read >= sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("equal", [True, False])
def test_tensor_scales_of_several_are_channel_scales_of_one(tmp_path: Path, equal: bool) -> None:
    """Scales that differ would be one another's; each is said for each of its rows."""
    model = net(all=(384, 128))
    weights = {n: random(128, 128, seed=i) * (1 if equal else 10**i) for i, n in enumerate("qkv")}
    if equal:
        for weight in weights.values():
            weight[0, 0] = 8.0
    tensors = coded(weights, "tensor")
    places = rules(q=slice(0, 128), k=slice(128, 256), v=slice(256, 384))
    online.load_into(model, directory(tmp_path, tensors), mapping=places)
    module = layer(model, "all")
    assert isinstance(module, FP8Linear)
    assert module.granularity is (Granularity.TENSOR if equal else Granularity.CHANNEL)
    assert same(module.dequantize(), torch.cat([numbers(tensors, name) for name in "qkv"]))


@pytest.mark.parametrize(
    ("scheme", "rows", "others", "is_fp8"),
    [
        ("block", slice(0, 128), slice(128, 256), True),
        ("block", slice(64, 192), [slice(0, 64), slice(192, 256)], False),
        ("block", slice(0, None, 2), slice(1, None, 2), False),
        ("channel", slice(64, 192), [slice(0, 64), slice(192, 256)], True),
        ("channel", slice(0, None, 2), slice(1, None, 2), True),
        ("tensor", slice(64, 192), [slice(0, 64), slice(192, 256)], True),
        ("tensor", slice(1, None, 2), slice(0, None, 2), True),
    ],
)
def test_a_tensor_that_is_cut(
    tmp_path: Path, scheme: str, rows: slice, others: Any, is_fp8: bool
) -> None:
    model = net(p=(128, 192), q=(128, 192))
    weight = random(256, 192) * torch.linspace(0.01, 3, 256)[:, None].bfloat16()
    tensors = coded({"both": weight}, scheme)
    first, later = others if isinstance(others, list) else (others, None)
    end = 64 if later else 128
    parts = [
        Part("layers.0.p.weight", source_index=rows),
        Part("layers.0.q.weight", slice(0, end), first),
    ]
    if later is not None:
        parts.append(Part("layers.0.q.weight", slice(end, 128), later))
    result = online.load_into(
        model, directory(tmp_path, tensors), mapping={"layers.0.both.weight": parts}
    )
    whole = numbers(tensors, "both")
    rest = torch.cat([whole[part] for part in (first, later) if part is not None])
    for name, wanted in (("p", whole[rows]), ("q", rest)):
        module = layer(model, name)
        assert isinstance(module, FP8Linear) is (is_fp8 or (name == "q" and scheme != "block"))
        if isinstance(module, FP8Linear):
            assert same(module.dequantize(), wanted)
        else:
            assert same(module.weight.detach(), wanted.to(torch.bfloat16))
            assert any("back to numbers" in warning for warning in result.warnings)


class Subclass(nn.Linear):
    """Which may do anything with its weight."""


@schemes
@pytest.mark.parametrize("why", ["subclass", "turned", "ignored"])
def test_what_cannot_be_fp8_becomes_numbers(tmp_path: Path, scheme: str, why: str) -> None:
    model = net(p=(256, 300))
    if why == "subclass":
        with torch.device("meta"):
            module = Subclass(300, 256, bias=False, dtype=torch.bfloat16)
        model.get_submodule("layers.0").p = module
    weight = random(300, 256) if why == "turned" else random(256, 300)
    tensors = coded({"p": weight}, scheme)
    places: dict[str, Rule] = {"layers.0.p.weight": Part("layers.0.p.weight", transpose=True)}
    result = online.load_into(
        model,
        directory(tmp_path, tensors),
        mapping=places if why == "turned" else None,
        ignore=["layers.0.p"] if why == "ignored" else [],
        memory_budget="1MiB",
    )
    wanted = numbers(tensors, "p")
    found = layer(model, "p").weight.detach()
    assert same(found, (wanted.T if why == "turned" else wanted).to(torch.bfloat16).contiguous())
    assert "layers.0.p.weight: from FP8 codes back to numbers" in " ".join(result.warnings)


def test_codes_beside_16_bit_become_numbers(tmp_path: Path) -> None:
    model = net(all=(256, 128))
    tensors = {**coded({"p": random(128, 128)}, "tensor")}
    tensors["layers.0.q.weight"] = random(128, 128, seed=1)
    places = rules(p=slice(0, 128), q=slice(128, 256))
    online.load_into(model, directory(tmp_path, tensors), mapping=places)
    wanted = torch.cat([numbers(tensors, "p").bfloat16(), tensors["layers.0.q.weight"]])
    assert same(layer(model, "all").weight.detach(), wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e5m2])
def test_other_codes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"embed.weight": random(512, HIDDEN), "layers.0.p.weight_scale": torch.ones(128, 1)}
    tensors["layers.0.p.weight"] = torch.ones(128, 128).to(dtype)
    with pytest.raises(CheckpointError, match=r"layers\.0\.p\.weight.*only FP8"):
        online.load_into(net(p=(128, 128)), directory(tmp_path, tensors))


def test_codes_without_scales_are_refused(tmp_path: Path) -> None:
    tensors = coded({"p": random(128, 128)}, "channel")
    del tensors["layers.0.p.weight_scale"]
    with pytest.raises(CheckpointError, match=r"expected layers\.0\.p\.weight_scale"):
        online.load_into(net(p=(128, 128)), directory(tmp_path, tensors))


@schemes
@pytest.mark.parametrize("after", ["channel", "block", "tensor"])
def test_a_reload_keeps_the_granularity_or_is_refused(
    tmp_path: Path, scheme: str, after: str
) -> None:
    model = net(up=(256, 128), down=(128, 256))
    plain = {"embed.weight": random(512, HIDDEN)}
    plain |= {"layers.0.up.weight": random(256, 128), "layers.0.down.weight": random(128, 256)}
    online.load_into(model, plain, scheme=scheme)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = coded({"up": random(256, 128, seed=2), "down": random(128, 256, seed=3) * 4}, after)
    source = directory(tmp_path, tensors)
    if after not in (scheme, "tensor"):
        with pytest.raises(SchemeError, match=rf"{after} scales, and has {scheme}"):
            online.reload(model, source)
        assert all(same(tensor, before[name]) for name, tensor in model.state_dict().items())
        return
    online.reload(model, source)
    for name in ("up", "down"):
        module = layer(model, name)
        assert isinstance(module, FP8Linear)
        assert module.granularity.value == scheme
        assert same(module.dequantize(), numbers(tensors, name))


# Experts


class Experts(nn.Module):
    """As transformers marks those of its models."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(3, 256, HIDDEN, dtype=torch.bfloat16))
        self.down_proj = nn.Parameter(torch.empty(3, HIDDEN, 128, dtype=torch.bfloat16))
        self.act_fn = nn.SiLU()


def experts() -> nn.Module:
    with torch.device("meta"):
        embed = nn.Embedding(512, HIDDEN, dtype=torch.bfloat16)
        return nn.ModuleDict({"embed": embed, "experts": Experts()})


@schemes
def test_experts_in_one_tensor(tmp_path: Path, scheme: str) -> None:
    tensors = {"embed.weight": random(512, HIDDEN)}
    for name, shape in (("gate_up_proj", (3, 256, HIDDEN)), ("down_proj", (3, HIDDEN, 128))):
        made = [quantize_weight(matrix, Granularity(scheme)) for matrix in random(*shape)]
        tensors[f"experts.{name}"] = torch.stack([codes for codes, _ in made])
        tensors[f"experts.{name}_scale"] = torch.stack([scale for _, scale in made])
    model = experts()
    online.load_into(model, directory(tmp_path, tensors))
    module = model.get_submodule("experts")
    assert isinstance(module, FP8Experts)
    for name in ("gate_up_proj", "down_proj"):
        assert same(getattr(module, name).detach(), tensors[f"experts.{name}"])
        assert same(getattr(module, f"{name}_scale").detach(), tensors[f"experts.{name}_scale"])


@schemes
def test_experts_one_by_one(tmp_path: Path, scheme: str) -> None:
    """w1 and w3 with a scale each, as other tools write them."""
    tensors, places = {"embed.weight": random(512, HIDDEN)}, dict[str, Rule]()
    of = {
        "w1": ("gate_up_proj", slice(0, 128)),
        "w3": ("gate_up_proj", slice(128, 256)),
        "w2": ("down_proj", slice(0, HIDDEN)),
    }
    for number, (name, (target, rows)) in enumerate(of.items()):
        for expert in range(3):
            weight = random(128, 128, seed=expert) * 10**number
            codes, scale = quantize_weight(weight, Granularity(scheme))
            at = f"experts.{expert}.{name}.weight"
            tensors |= {at: codes, f"{at}_scale": scale}
            places[at] = Part(f"experts.{target}", (expert, rows))
    model = experts()
    online.load_into(model, directory(tmp_path, tensors), mapping=places)
    module = model.get_submodule("experts")
    assert isinstance(module, FP8Experts)
    assert module.granularity.value == ("channel" if scheme == "tensor" else scheme)
    for name, (target, rows) in of.items():
        for expert in range(3):
            at = f"experts.{expert}.{name}.weight"
            wanted = dequantize_weight(tensors[at], tensors[f"{at}_scale"])
            assert same(module.dequantize(target)[expert, rows].contiguous(), wanted)


@schemes
def test_experts_that_are_not_understood_become_numbers(tmp_path: Path, scheme: str) -> None:
    with torch.device("meta"):
        embed = nn.Embedding(512, HIDDEN, dtype=torch.bfloat16)
        model: Any = nn.ModuleDict({"embed": embed, "experts": nn.Module()})
        stack = nn.Parameter(torch.empty(3, 256, HIDDEN, dtype=torch.bfloat16))
    model["experts"].register_parameter("stack", stack)
    matrices = random(3, 256, HIDDEN) * torch.tensor([1, 10, 100])[:, None, None]
    made = [quantize_weight(matrix, Granularity(scheme)) for matrix in matrices]
    tensors = {
        "embed.weight": random(512, HIDDEN),
        "experts.stack": torch.stack([codes for codes, _ in made]),
        "experts.stack_scale": torch.stack([scale for _, scale in made]),
    }
    result = online.load_into(model, directory(tmp_path, tensors))
    wanted = torch.stack([dequantize_weight(*one) for one in made]).to(torch.bfloat16)
    assert same(model["experts"].stack.detach(), wanted)
    assert "experts.stack: from FP8 codes back to numbers" in " ".join(result.warnings)


@pytest.mark.parametrize("given", ["files", "dict"])
def test_names_without_a_use_are_told(tmp_path: Path, given: str) -> None:
    model = net(up=(256, 128))
    tensors = {**coded({"up": random(256, 128)}, "channel"), "more.weight": random(4)}
    tensors["layers.0.up.input_scale"] = torch.ones(1)
    source: Any = directory(tmp_path, tensors) if given == "files" else tensors
    assert online.load_into(model, source).unexpected == ("more.weight",)


def test_a_models_own_fp8_numbers_are_not_loaded() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(
                torch.empty(4, dtype=torch.float8_e4m3fn), requires_grad=False
            )

    with torch.device("meta"):
        model = Narrow()
    with pytest.raises(CheckpointError, match=r"table: is torch\.float8_e4m3fn and no weight"):
        online.load_into(model, {"table": torch.ones(4)})


def test_fused_layers_share_a_scale_when_a_model_from_codes_gets_numbers(tmp_path: Path) -> None:
    model = net(q_proj=(128, 128), k_proj=(128, 128), v_proj=(128, 128))
    weights = {f"{n}_proj": random(128, 128, seed=i) * 4**i for i, n in enumerate("qkv")}
    online.load_into(model, directory(tmp_path, coded(weights, "tensor")))
    assert len({layer(model, name).weight_scale.item() for name in weights}) == 3
    plain = {f"layers.0.{name}.weight": weight for name, weight in weights.items()}
    online.reload(model, {"embed.weight": random(512, HIDDEN), **plain})
    assert len({layer(model, name).weight_scale.item() for name in weights}) == 1
