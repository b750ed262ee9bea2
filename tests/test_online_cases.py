"""Twenty-five cases that loading layer by layer has gone wrong in, elsewhere; in the order of the
table in docs/online.md."""

import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8stream import online, skeleton
from fp8stream.errors import CheckpointError, DeviceError
from fp8stream.fused_experts import FP8Experts
from fp8stream.mapping import Part, Rule, model_tensors
from fp8stream.memory import MIB
from tests.nets import (
    HIDDEN,
    LINEARS,
    TOKENS,
    WIDE,
    Block,
    Net,
    all_there,
    directory,
    is_fp8,
    on_meta,
    random,
    tensor_at,
    weights_of,
)
from tests.oracle import same

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("spoiled")]


def fused(scheme: str = "channel") -> tuple[Net, dict[str, Rule]]:
    """A net whose `up` is fed by two tensors."""
    half = WIDE // 2
    rules: dict[str, Rule] = {
        r"re:(.+)\.one\.weight": Part(r"\1.up.weight", slice(0, half)),
        r"re:(.+)\.two\.weight": Part(r"\1.up.weight", slice(half, WIDE)),
    }
    return on_meta(lambda: Block(bias=False)), rules


def halves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("up.weight"):
            one, two = tensor.chunk(2)
            found |= {
                name.replace("up", "one"): one.clone(),
                name.replace("up", "two"): two.clone(),
            }
        else:
            found[name] = tensor
    return found


def test_case_01_counting_elements(tmp_path: Path) -> None:
    """Counting copied elements takes any copies for all of a tensor; here regions are known, so
    rows that come twice do not stand for rows that never come."""
    net, rules = fused()
    tensors = halves(weights_of(net))
    quarter = slice(0, WIDE // 4)
    rules[r"re:(.+)\.two\.weight"] = Part(r"\1.up.weight", slice(0, WIDE // 2))
    with pytest.raises(CheckpointError, match=r"both fill layers\.0\.up\.weight"):
        online.load_into(net, directory(tmp_path, tensors), mapping=rules)
    rules[r"re:(.+)\.two\.weight"] = Part(r"\1.up.weight", slice(192, 256), quarter)
    with pytest.raises(CheckpointError, match=r"missing layers\.0\.up\.weight\[128:192"):
        online.load_into(net, directory(tmp_path, tensors), mapping=rules)
    assert all(tensor.is_meta for tensor in model_tensors(net).values())


def test_case_02_composed_loaders(tmp_path: Path) -> None:
    """A loader that copied twice (Mamba's `A = -exp(A_log)`) counted double, and what came last was
    dropped; slices of one tensor to several places, and turned, all arrive."""

    class Mixer(Block):
        def __init__(self) -> None:
            super().__init__(bias=False)
            self.gain = nn.Parameter(torch.ones(HIDDEN, dtype=torch.bfloat16))
            self.shift = nn.Parameter(torch.ones(HIDDEN, dtype=torch.bfloat16))

    net = on_meta(Mixer)
    tensors = weights_of(net)
    source = {}
    for name, tensor in tensors.items():
        if name.endswith("gain"):
            source[name.replace("gain", "both")] = torch.stack(
                [tensor, tensors[f"{name[:-4]}shift"]]
            )
        elif name.endswith("down.weight"):
            source[name] = tensor.T.contiguous()
        elif not name.endswith("shift"):
            source[name] = tensor
    rules: dict[str, Rule] = {
        r"re:(.+)\.both": [
            Part(r"\1.gain", source_index=(0,)),
            Part(r"\1.shift", source_index=(1,)),
        ],
        r"re:(.+\.down\.weight)": Part(r"\1", transpose=True),
    }
    online.load_into(net, directory(tmp_path, source), mapping=rules)
    assert all_there(net, tensors, LINEARS)
    other = on_meta(Mixer)
    online.load_into(other, iter(source.items()), mapping=rules)
    assert all_there(other, tensors, LINEARS)


def test_case_02_rules_that_do_nothing_are_told(tmp_path: Path) -> None:
    """A mapping that matches nothing, or sends part of a tensor nowhere, is a warning."""
    net = on_meta(lambda: Block(bias=False))
    tensors = weights_of(net)
    long = {**tensors, "layers.0.up.weight": random(WIDE + 8, HIDDEN)}
    rules: dict[str, Rule] = {
        "layers.0.up.weight": Part("layers.0.up.weight", source_index=slice(0, WIDE)),
        "layers.7.up.weight": None,
    }
    result = online.load_into(net, directory(tmp_path, long), mapping=rules)
    assert "mapping: layers.7.up.weight matches no name of the source" in result.warnings
    assert "mapping: layers.0.up.weight[256:264, 0:128] goes nowhere" in result.warnings
    assert is_fp8(net, "layers.0.up", long["layers.0.up.weight"][:WIDE])


def test_case_03_scalar_parameters(tmp_path: Path) -> None:
    """A parameter of no axes (`k_scale`) was never counted, and its layer never finished."""

    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__()
            self.k_scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self.nothing = nn.Parameter(torch.ones(0, 4, dtype=torch.bfloat16))

    tensors = weights_of(on_meta(Scaled))
    for source in (directory(tmp_path, tensors), list(tensors.items()), iter(tensors.items())):
        net = on_meta(Scaled)
        result = online.load_into(net, source)
        assert all_there(net, tensors, LINEARS)
        assert not result.missing
        online.reload(net, source if not isinstance(source, Iterator) else iter(tensors.items()))
        assert all_there(net, tensors, LINEARS)


def test_case_04_padded_parameters(tmp_path: Path) -> None:
    """A parameter that is larger than what comes never reached its count, and was finished late,
    with garbage; here it is an error that says which rows lack, before anything is touched."""
    net = on_meta(lambda: Block(bias=False))
    tensors = weights_of(net)
    short = {n: t[: WIDE - 56] if n.endswith("up.weight") else t for n, t in tensors.items()}
    with pytest.raises(CheckpointError, match=r"layers\.0\.up\.weight"):
        online.load_into(net, directory(tmp_path, short))
    rules: dict[str, Rule] = {
        r"re:(.+\.up\.weight)": Part(r"\1", slice(0, WIDE - 56)),
    }
    for source in (directory(tmp_path, short), list(short.items())):
        with pytest.raises(CheckpointError, match=r"missing layers\.0\.up\.weight\[200:256"):
            online.load_into(net, source, mapping=rules)
        assert all(tensor.is_meta for tensor in model_tensors(net).values())


@pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])
def test_case_05_padding(tmp_path: Path, scheme: str) -> None:
    """Rows that nothing came for were memory as it was, and their NaN went into the scale; here
    such a weight stays in 16 bit, the rows that came are there, and the rest are NaN to be seen."""
    net = on_meta(lambda: Block(bias=False))
    tensors = weights_of(net)
    short = {n: t[: WIDE - 56] if n.endswith("0.up.weight") else t for n, t in tensors.items()}
    rules: dict[str, Rule] = {"layers.0.up.weight": Part("layers.0.up.weight", slice(0, WIDE - 56))}
    result = online.load_into(
        net, directory(tmp_path, short), mapping=rules, strict=False, scheme=scheme
    )
    assert result.missing == ("layers.0.up.weight[200:256, 0:128]",)
    assert type(net.get_submodule("layers.0.up")) is nn.Linear
    assert same(tensor_at(net, "layers.0.up.weight")[:200], short["layers.0.up.weight"])
    assert tensor_at(net, "layers.0.up.weight")[200:].isnan().all()
    for name in sorted(LINEARS - {"layers.0.up"}):
        assert is_fp8(net, name, tensors[f"{name}.weight"], scheme)
        assert not tensor_at(net, f"{name}.weight_scale").isnan().any()


def test_case_06_the_same_weight_again(tmp_path: Path) -> None:
    """A weight that came again was ignored, or counted for another; here an iterable that gives a
    name twice is an error that names it."""
    tensors = weights_of(on_meta())
    twice = [*tensors.items(), ("layers.0.up.weight", tensors["layers.0.up.weight"])]
    for source in (twice, iter(twice)):
        with pytest.raises(CheckpointError, match=r"layers\.0\.up\.weight'?: comes twice"):
            online.load_into(on_meta(), source)


@pytest.mark.parametrize("first", [True, False])
def test_case_07_late_parameters(first: bool) -> None:
    """A bias that was registered after the weight was not in the total, and the layer finished
    without it; here what a module has is read when loading begins, and order means nothing."""

    def late() -> nn.Module:
        block = Block(bias=False)
        for linear in (block.up, block.down):
            bias = torch.zeros(linear.out_features, dtype=torch.bfloat16)
            linear.bias = nn.Parameter(bias)
        return block

    net = on_meta(late)
    tensors = weights_of(net)
    items = sorted(tensors.items(), key=lambda item: item[0].endswith("bias") == first)
    online.load_into(net, iter(items))
    assert all_there(net, tensors, LINEARS)


def test_case_08_biases(tmp_path: Path) -> None:
    """The worst of the bugs there were: biases lost or overwritten, and models that babbled; here
    they are loaded, kept on reload, and take part."""
    net = on_meta()
    tensors = weights_of(net)
    online.load_into(net, directory(tmp_path, tensors))
    assert all_there(net, tensors, LINEARS)
    without = copy.deepcopy(net)
    for name in sorted(LINEARS):
        bias = without.get_submodule(name).bias
        assert isinstance(bias, nn.Parameter)
        bias.data.zero_()
    with torch.no_grad():
        assert not torch.allclose(net(TOKENS), without(TOKENS), atol=0.05)
    other = weights_of(on_meta(), seed=100)
    weights = {n: t for n, t in other.items() if not n.endswith("bias")}
    with pytest.raises(CheckpointError, match=r"layers\.0\.up\.bias"):
        online.reload(net, weights)
    result = online.reload(net, weights, strict=False)
    assert {*tensors} - {*result.missing} == {"embed.weight"}
    assert all_there(net, {**tensors, "embed.weight": weights["embed.weight"]}, LINEARS)
    online.reload(net, other)
    assert all_there(net, other, LINEARS)


def test_case_09_tensors_that_no_checkpoint_has(tmp_path: Path) -> None:
    """A tensor that two modules shared and no file held kept its layer from ever finishing; here no
    layer waits for what is not its own, and such a tensor is named."""

    class Mapped(Block):
        def __init__(self, shared: Tensor) -> None:
            super().__init__()
            self.register_buffer("expert_map", shared)

    with torch.device("meta"):
        shared = torch.zeros(8, dtype=torch.int64)
        net = Net(lambda: Mapped(shared))
    tensors = weights_of(net)
    del tensors["layers.0.expert_map"]
    with pytest.raises(CheckpointError, match=r"missing layers\.0\.expert_map"):
        online.load_into(net, directory(tmp_path, tensors))
    result = online.load_into(net, directory(tmp_path, tensors), strict=False)
    assert result.missing == ("layers.0.expert_map",)
    assert all_there(net, tensors, LINEARS)
    there = torch.arange(8)
    net = on_meta()
    for layer in net.layers:
        layer.register_buffer("expert_map", there)
    online.load_into(net, directory(tmp_path, tensors), strict=False)
    assert net.get_buffer("layers.1.expert_map") is there
    assert same(there, torch.arange(8))


def test_case_10_values_from_the_constructor(tmp_path: Path) -> None:
    """Tables that a constructor computes were overwritten with empty memory; here what is not on
    meta and does not come keeps its values, and its storage."""
    net = on_meta()
    table = torch.linspace(0, 1, 64)
    gains = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
    for layer in net.layers:
        layer.register_buffer("table", table, persistent=False)
        layer.gains = gains
    tensors = {n: t for n, t in weights_of(net).items() if "gains" not in n}
    result = online.load_into(net, directory(tmp_path, tensors), strict=False)
    assert result.missing == ("layers.0.gains",)
    for layer in net.layers:
        assert layer.table is table
        assert layer.gains is gains
    assert same(table, torch.linspace(0, 1, 64))
    assert same(gains.detach(), torch.full((4,), 2.0))
    online.reload(net, directory(tmp_path, tensors))
    assert same(gains.detach(), torch.full((4,), 2.0))


def test_case_11_buffers_that_are_not_saved_aliases_and_none(tmp_path: Path) -> None:
    """Buffers that alias a parameter were copied apart, others lost their place in the state or
    their values; here an alias stays one, `None` stays `None`, and what is not saved is not asked
    for."""

    class Odd(Block):
        view: Tensor
        scratch: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(16, 8, dtype=torch.bfloat16))
            self.register_buffer("view", self.table.detach()[4:8], persistent=False)
            self.register_buffer("absent", None)
            self.register_buffer("gone", None, persistent=False)

    net = on_meta(Odd)
    for layer in net.layers:
        layer.register_buffer("scratch", torch.full((3,), 7.0), persistent=False)
    tensors = weights_of(net)
    result = online.load_into(net, directory(tmp_path, tensors))
    assert not result.missing
    assert all_there(net, tensors, LINEARS)
    state = net.state_dict()
    for number, layer in enumerate(net.layers):
        assert isinstance(layer, Odd)
        assert layer.view.data_ptr() == layer.table[4].data_ptr()
        assert same(layer.view, tensors[f"layers.{number}.table"][4:8])
        assert layer._buffers["absent"] is None
        assert layer._buffers["gone"] is None
        assert same(layer.get_buffer("scratch"), torch.full((3,), 7.0))
        assert f"layers.{number}.view" not in state
        assert f"layers.{number}.scratch" not in state
    other = weights_of(on_meta(Odd), seed=50)
    online.reload(net, other)
    for number, layer in enumerate(net.layers):
        assert same(layer.get_buffer("view"), other[f"layers.{number}.table"][4:8])


def test_case_11_a_buffer_that_nobody_can_compute_is_named(tmp_path: Path) -> None:
    """One on meta that is not saved, in a model that does not say how it is made, is an error."""

    class Rotary(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.arange(8.0), persistent=False)

    net = on_meta(Rotary)
    with pytest.raises(CheckpointError, match=r"layers\.0\.inv_freq, layers\.1\.inv_freq"):
        online.load_into(net, weights_of(net))


def test_case_12_lazy_parameters(tmp_path: Path) -> None:
    """A parameter without a shape has no storage to look up; here it is an error that says what to
    do, before anything is touched."""
    net = on_meta()
    tensors = weights_of(net)
    net.layers[1].extra = nn.LazyLinear(4)
    with pytest.raises(CheckpointError, match=r"layers\.1\.extra\.weight: has no shape yet"):
        online.load_into(net, directory(tmp_path, tensors))
    assert all(p.is_meta for n, p in net.named_parameters() if "extra" not in n)


def test_case_13_strides(tmp_path: Path) -> None:
    """A parameter that does not lie contiguous came back contiguous, and kernels that count on its
    strides read garbage; here strides stay, on loading and reloading."""

    class Strided(Block):
        def __init__(self) -> None:
            super().__init__()
            self.turned = nn.Parameter(torch.zeros(8, 16, dtype=torch.bfloat16).T)
            self.conv = nn.Conv2d(4, 4, 3, dtype=torch.bfloat16)
            turned = self.conv.weight.detach().to(memory_format=torch.channels_last)
            self.conv.weight = nn.Parameter(turned)

    net = on_meta(Strided)
    strides = {n: t.stride() for n, t in model_tensors(net).items() if "turned" in n or "conv" in n}
    assert not all(tensor_at(net, name).is_contiguous() for name in strides)
    tensors = {n: t.contiguous() for n, t in weights_of(net).items()}
    for source in (directory(tmp_path, tensors), list(tensors.items())):
        net = on_meta(Strided)
        online.load_into(net, source)
        assert all_there(net, tensors, LINEARS)
        other = weights_of(on_meta(Strided), seed=9)
        online.reload(net, other)
        assert all_there(net, other, LINEARS)
        assert {n: tensor_at(net, n).stride() for n in strides} == strides


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("given", ["files", "list", "iterator"])
def test_case_14_tied_weights(tmp_path: Path, name: str, given: str) -> None:
    """Of tied weights only one parent's was processed; here they are one tensor before and after,
    under whichever name it comes."""

    def tied() -> Net:
        net = on_meta()
        net.head = nn.Linear(HIDDEN, 512, bias=False, dtype=torch.bfloat16, device="meta")
        net.head.weight = net.embed.weight
        return net

    net = tied()
    tensors = weights_of(net)
    tensors[name] = tensors.pop("embed.weight")
    source: Any = list(tensors.items())
    source = {"files": directory(tmp_path, tensors), "list": source, "iterator": iter(source)}[
        given
    ]
    result = online.load_into(net, source)
    assert net.head.weight is net.embed.weight  # type: ignore[union-attr]
    assert same(net.embed.weight.detach(), tensors[name])
    assert not result.missing
    assert not result.unexpected
    assert all_there(net, {n: t for n, t in tensors.items() if n != name}, LINEARS)


def test_case_14_linear_layers_that_are_tied_to_each_other(tmp_path: Path) -> None:
    """Two layers with one weight, and one layer in two places, both become FP8, with one tensor of
    codes and one of scales."""
    net = on_meta(lambda: Block(bias=False))
    first, second = net.layers
    assert isinstance(first, Block)
    assert isinstance(second, Block)
    second.up.weight = first.up.weight
    second.down = first.down
    tensors = weights_of(net)
    assert len(tensors) == 7
    online.load_into(net, directory(tmp_path, tensors))
    assert second.down is first.down
    for name in sorted(LINEARS):
        leaf = name.rpartition(".")[2]
        assert is_fp8(net, name, tensors[f"layers.0.{leaf}.weight"])
    assert second.up.weight is first.up.weight
    assert second.up.weight_scale is first.up.weight_scale
    other = weights_of(on_meta(lambda: Block(bias=False)), seed=77)
    other = {n: other[n] for n in tensors}
    online.reload(net, other)
    for name in sorted(LINEARS):
        leaf = name.rpartition(".")[2]
        assert is_fp8(net, name, other[f"layers.0.{leaf}.weight"])


def test_case_15_scales_that_are_derived_come_last(tmp_path: Path) -> None:
    """Attention that derives matrices from a linear layer's weight ran before it was there; here
    nothing is derived while loading, `load_into` has returned when a hook of yours may."""
    net = on_meta()
    tensors = weights_of(net)
    names: list[str] = []
    online.load_into(
        net, directory(tmp_path, tensors), progress=lambda done: names.append(done.name)
    )
    assert {*names} >= LINEARS
    derived = net.get_submodule("layers.0.up").dequantize()  # type: ignore[operator]
    weight = tensors["layers.0.up.weight"].float()
    assert (derived - weight).norm() / weight.norm() < 0.04


def test_case_16_modules_that_get_nothing(tmp_path: Path) -> None:
    """A layer without weights was processed with whatever its memory held; here it is an error,
    or, if not strict, listed, left in 16 bit and NaN. Modules that have none need none."""

    class Bare(Block):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.nothing = nn.Identity()

    net = on_meta(Bare)
    tensors = weights_of(net)
    some = {n: t for n, t in tensors.items() if "layers.1.up" not in n}
    expected = r"missing layers\.1\.up\.weight, layers\.1\.up\.bias"
    for source in (directory(tmp_path, some), list(some.items())):
        net = on_meta(Bare)
        with pytest.raises(CheckpointError, match=expected):
            online.load_into(net, source)
        assert all(tensor.is_meta for tensor in model_tensors(net).values())
        result = online.load_into(net, source, strict=False)
        assert {*result.missing} == {"layers.1.up.weight", "layers.1.up.bias"}
        assert type(net.get_submodule("layers.1.up")) is nn.Linear
        assert tensor_at(net, "layers.1.up.weight").isnan().all()
        assert all_there(net, some, LINEARS - {"layers.1.up"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.up\.bias, layers\.1\.up\.weight"):
        online.load_into(on_meta(Bare), iter(some.items()))
    net = on_meta(Bare)
    result = online.load_into(net, iter(some.items()), strict=False)
    assert {*result.missing} == {"layers.1.up.weight", "layers.1.up.bias"}
    assert all_there(net, some, LINEARS - {"layers.1.up"})
    codes = tensor_at(net, "layers.1.up.weight").float()
    assert codes.isnan().all()


@pytest.mark.parametrize("given", ["files", "list"])
def test_case_17_some_of_a_layers_weights(tmp_path: Path, given: str) -> None:
    """A layer with some of its weights was processed with a line in a debug log: silent garbage;
    here it is an error that lists them, or a layer that stays in 16 bit and is listed."""
    net, rules = fused()
    tensors = weights_of(net)
    some = halves(tensors)
    del some["layers.1.two.weight"]
    source: Any = directory(tmp_path, some) if given == "files" else list(some.items())
    with pytest.raises(CheckpointError, match=r"missing layers\.1\.up\.weight\[128:256"):
        online.load_into(net, source, mapping=rules)
    result = online.load_into(net, source, mapping=rules, strict=False)
    assert result.missing == ("layers.1.up.weight[128:256, 0:128]",)
    up = net.get_submodule("layers.1.up")
    assert type(up) is nn.Linear
    assert same(up.weight.detach()[:128], some["layers.1.one.weight"])
    assert up.weight[128:].isnan().all()
    assert "layers.1.up" not in result.quantized
    assert is_fp8(net, "layers.0.up", tensors["layers.0.up.weight"])


def test_case_16_what_nothing_came_for_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory as it was may look like weights: if not strict, it is NaN, whatever it was."""

    def used(like: Tensor, device: torch.device) -> Tensor:
        return torch.zeros_like(like, device=device)

    monkeypatch.setattr(skeleton, "storage", used)
    net = on_meta()
    some = {n: t for n, t in weights_of(net).items() if "layers.1" not in n}
    for source in (list(some.items()), iter(some.items())):
        net = on_meta()
        result = online.load_into(net, source, strict=False)
        lost = [n for n in model_tensors(net) if "layers.1" in n]
        assert {n for n in lost if not n.endswith("_scale")} == {*result.missing}
        assert all(tensor_at(net, name).float().isnan().all() for name in lost)
        assert all_there(net, some, LINEARS)


@pytest.mark.parametrize("scheme", ["channel", "tensor"])
def test_case_17_some_of_a_layers_weights_on_reload(tmp_path: Path, scheme: str) -> None:
    """Half of a weight would be codes under a scale that is not theirs: it stays what it was."""
    net, rules = fused()
    tensors = weights_of(net)
    online.load_into(net, directory(tmp_path, halves(tensors)), mapping=rules, scheme=scheme)
    other = weights_of(on_meta(lambda: Block(bias=False)), seed=40)
    some = halves(other)
    del some["layers.1.two.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.up\.weight\[128:256"):
        online.reload(net, some)
    assert is_fp8(net, "layers.0.up", tensors["layers.0.up.weight"], scheme)
    result = online.reload(net, some, strict=False)
    assert any("layers.1.up.weight" in name for name in result.missing)
    assert is_fp8(net, "layers.1.up", tensors["layers.1.up.weight"], scheme)
    assert is_fp8(net, "layers.0.up", other["layers.0.up.weight"], scheme)
    assert is_fp8(net, "layers.1.down", other["layers.1.down.weight"], scheme)


def test_case_18_out_of_order(tmp_path: Path) -> None:
    """Tensors that came in turns kept every layer open, without bound; from files nothing waits,
    whatever their order, and of an iterable a tensor waits for the rest of its scale alone."""
    net = on_meta(lambda: Block(bias=False))
    tensors = weights_of(net)
    names = sorted(tensors, key=lambda name: (name.rpartition(".")[0][::-1], name))
    shuffled = {name: tensors[name] for name in names}
    seen = []
    online.load_into(net, iter(shuffled.items()), progress=lambda done: seen.append(done.name))
    assert all_there(net, tensors, LINEARS)
    norms = sum(name.endswith("norm.bias") for name in names)
    assert len(seen) == len(names) - norms  # a norm is one layer
    other = on_meta(lambda: Block(bias=False))
    online.load_into(other, directory(tmp_path, shuffled), memory_budget="1MiB")
    assert all_there(other, tensors, LINEARS)


@pytest.mark.parametrize("given", ["files", "list", "iterator"])
def test_case_19_fused_projections(tmp_path: Path, given: str) -> None:
    """A weight fed by several tensors has one tensor scale over all of it, as engines that fuse it
    expect, not that of the part that came last."""
    net, rules = fused()
    tensors = weights_of(net)
    some = halves(tensors)
    some["layers.0.one.weight"] *= 5
    whole = torch.cat([some["layers.0.one.weight"], some["layers.0.two.weight"]])
    items = list(some.items())[::-1]
    source: Any = {"files": directory(tmp_path, some), "list": items, "iterator": iter(items)}[
        given
    ]
    online.load_into(net, source, mapping=rules, scheme="tensor")
    assert is_fp8(net, "layers.0.up", whole, "tensor")
    assert is_fp8(net, "layers.1.up", tensors["layers.1.up.weight"], "tensor")


def test_case_20_memory_of_experts(tmp_path: Path) -> None:
    """A whole layer of experts was quantized at once, 16 bit and FP8 side by side; here the unit is
    one expert's matrix, or rows of it."""
    transformers = pytest.importorskip("transformers")
    logging.disable(logging.WARNING)
    config = transformers.MixtralConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=16,
        vocab_size=512,
    )
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    del model
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    result = online.load_into(model, tmp_path, memory_budget="4MiB")
    experts = [m for m in model.modules() if isinstance(m, FP8Experts)]
    assert len(experts) == 1
    size = sum(tensor.nbytes for tensor in model_tensors(model).values())
    assert size > 24 * MIB
    assert result.peak_bytes < size + 8 * MIB


def test_case_22_hooks_and_offloading(tmp_path: Path) -> None:
    """A layer that is replaced keeps its hooks, and their handles; what accelerate has spread is
    refused, since its hooks would move what is not there, and may be spread when it is loaded."""
    net = on_meta()
    tensors = weights_of(net)
    up = net.get_submodule("layers.0.up")
    calls: list[object] = []
    handles = [
        up.register_forward_hook(lambda *_: calls.append("after")),
        up.register_forward_pre_hook(lambda *_: calls.append("before")),
        up.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(kwargs), with_kwargs=True
        ),
        up.register_forward_hook(lambda *_: calls.append("always"), always_call=True),
    ]
    online.load_into(net, directory(tmp_path, tensors))
    with torch.no_grad():
        expected = net(TOKENS)
    assert calls == ["before", "after", {}, "always"]
    for handle in handles:
        handle.remove()
    calls.clear()
    with torch.no_grad():
        net(TOKENS)
    assert calls == []
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert same(net(TOKENS), expected)
    spread = Net()
    accelerate.cpu_offload(spread, execution_device=torch.device("cpu"))
    with pytest.raises(DeviceError, match="accelerate"):
        online.load_into(spread, directory(tmp_path, tensors))


@pytest.mark.parametrize("given", ["files", "list", "iterator"])
def test_case_23_the_device_around(tmp_path: Path, given: str) -> None:
    """Loading inside a device context put helpers on that device, and broke models; here a context
    around the call changes nothing, on loading and reloading."""
    net = on_meta()
    tensors = weights_of(net)
    files = directory(tmp_path, tensors)

    def source() -> Any:
        return {"files": files, "list": [*tensors.items()], "iterator": iter(tensors.items())}[
            given
        ]

    with torch.device("meta"):
        online.load_into(net, source(), scheme="tensor")
        online.reload(net, source())
    assert not any(tensor.is_meta for tensor in model_tensors(net).values())
    for name in sorted(LINEARS):
        assert is_fp8(net, name, tensors[f"{name}.weight"], "tensor")


def test_case_23_tensors_without_values() -> None:
    """A source on meta has no values to load."""
    net = on_meta()
    items = [(n, torch.empty_like(t, device="meta")) for n, t in weights_of(net).items()]
    with pytest.raises(CheckpointError, match="lies on meta"):
        online.load_into(net, items)


def test_case_23_a_generator_makes_tensors_of_its_own() -> None:
    """What a source makes while it is asked can be trained afterwards: it is not of inference
    mode, in which layers are worked on."""
    made: list[Tensor] = []

    def source() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights_of(on_meta()).items():
            made.append(tensor.float())
            yield name, made[-1]

    online.load_into(on_meta(), source())
    assert not any(tensor.is_inference() for tensor in made)


@pytest.mark.parametrize("given", ["files", "list", "iterator"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8, torch.float8_e5m2])
def test_case_25_dtypes_that_are_not_quantized(
    tmp_path: Path, given: str, dtype: torch.dtype
) -> None:
    """What is quantized already cannot be quantized again: a weight in a dtype that has no way to
    FP8 is an error that names it, or, if it is float64, stays in 16 bit."""
    net = on_meta()
    tensors = weights_of(net)
    tensors["layers.0.up.weight"] = tensors["layers.0.up.weight"].to(dtype)
    items = list(tensors.items())
    source: Any = {"files": directory(tmp_path, tensors), "list": items, "iterator": iter(items)}
    if given == "iterator" or dtype != torch.float64:
        with pytest.raises(CheckpointError, match=r"layers\.0\.up\.weight"):
            online.load_into(net, source[given])
        return
    online.load_into(net, source[given])
    wide = tensors["layers.0.up.weight"].to(torch.bfloat16)
    assert same(tensor_at(net, "layers.0.up.weight"), wide)
    assert all_there(net, {n: t for n, t in tensors.items() if "0.up.weight" not in n}, LINEARS)


def test_case_24_loading_again(tmp_path: Path) -> None:
    """A flag on a layer kept it from being processed again; here a second load overwrites, in the
    same storage, and a load that failed may be given again."""
    net = on_meta()
    tensors = weights_of(net)
    bad = {**tensors, "layers.1.up.weight": tensors["layers.1.up.weight"].clone()}
    bad["layers.1.up.weight"][3, 4] = torch.inf
    with pytest.raises(Exception, match=r"\[3, 4\]"):
        online.load_into(net, directory(tmp_path, bad, "bad"))
    with pytest.raises(CheckpointError, match="load_into"):
        online.reload(net, directory(tmp_path, tensors))
    online.load_into(net, directory(tmp_path, tensors))
    assert all_there(net, tensors, LINEARS)
    before = {name: t.data_ptr() for name, t in model_tensors(net).items()}
    other = weights_of(on_meta(), seed=30)
    result = online.load_into(net, directory(tmp_path, other, "other"))
    assert all_there(net, other, LINEARS)
    assert before == {name: t.data_ptr() for name, t in model_tensors(net).items()}
    assert {*result.quantized} == LINEARS


def test_case_25_quantizing_again() -> None:
    """Quantizing what is quantized adds an error to an error; here a model that is FP8 is left
    alone or refused, and its codes do not move."""
    net = Net()
    online.quantize_model(net)
    codes = {name: t.clone() for name, t in model_tensors(net).items()}
    with pytest.raises(CheckpointError, match="FP8 already"):
        online.quantize_model(net)
    assert all(same(tensor_at(net, name), t.detach()) for name, t in codes.items())


def test_every_case_has_its_test() -> None:
    """21, tensor parallelism, is in a file of its own."""
    numbers = {name[10:12] for name in globals() if name.startswith("test_case_")}
    assert numbers == {f"{number:02}" for number in range(1, 26)} - {"21"}
