"""A live layer, against arithmetic done at length."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fp8stream.errors import SchemeError
from fp8stream.fp8 import dequantize_weight
from fp8stream.linear import FP8Linear
from fp8stream.scheme import Granularity
from tests import oracle
from tests.live import (
    BLOCK,
    bits,
    compiled,
    dtypes,
    granularities,
    layer,
    on_gpu,
    random,
    relative,
)


def emulated(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """float64 numbers that the activations [tokens, in] stand for, by the oracle's arithmetic."""
    groups = torch.split(x, BLOCK, 1) if granularity is Granularity.BLOCK else (x,)
    numbers = []
    for group in groups:
        codes, scale = oracle.quantize([group], Granularity.CHANNEL)
        numbers.append(codes.double() * scale.double())
    return torch.cat(numbers, 1)


def within_rounding(
    found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """float32 sums of float64 operands: a rounding for each term, one at the end."""
    wanted = x @ weight.T + (0 if bias is None else bias.double())
    terms = x.abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    bound = (x.shape[1] + 4) * 2.0**-24 * terms + torch.finfo(found.dtype).eps / 2 * wanted.abs()
    # What is below float16's normal numbers has no relative bound.
    bound += torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    assert bool(((found.double() - wanted).abs() <= bound).all())


@granularities
def test_a_token_that_is_not_finite_spoils_itself_alone(granularity: Granularity) -> None:
    module = layer(300, 32, granularity)
    x = random(4, 300)
    wanted = module(x)
    x[1, 7], x[2, 200] = float("nan"), float("-inf")
    found = module(x)
    assert not found[1:3].isfinite().any()
    assert torch.equal(found[[0, 3]], wanted[[0, 3]])


SHAPES = [(128, 256), (300, 333), (16, 8), (1, 1), (127, 129), (513, 40)]


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@granularities
@dtypes
def test_a_layer_is_its_operands_product(
    columns: int, rows: int, bias: bool, granularity: Granularity, dtype: torch.dtype
) -> None:
    module = layer(columns, rows, granularity, bias, dtype)
    x = random(5, columns, dtype=dtype)
    found = module(x)
    assert found.dtype == dtype
    weight = dequantize_weight(module.weight.data, module.weight_scale.data).double()
    within_rounding(found, emulated(x, granularity), weight, module.bias)


@granularities
@dtypes
def test_activations_may_stay_as_they_are(granularity: Granularity, dtype: torch.dtype) -> None:
    module = layer(300, 333, granularity, dtype=dtype, quantize_activations=False)
    x = random(5, 300, dtype=dtype)
    weight = dequantize_weight(module.weight.data, module.weight_scale.data).double()
    within_rounding(module(x), x.double(), weight, module.bias)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4), (2, 3, 4)])
@granularities
def test_tokens_lie_in_any_shape(shape: tuple[int, ...], granularity: Granularity) -> None:
    module = layer(300, 40, granularity)
    x = random(*shape, 300)
    assert module(x).shape == (*shape, 40)
    assert torch.equal(module(x).view(-1, 40), module(x.reshape(-1, 300)))


def test_tokens_that_do_not_lie_one_after_the_other() -> None:
    module = layer(300, 40, Granularity.BLOCK)
    x = random(300, 6).T
    assert not x.is_contiguous()
    assert torch.equal(module(x), module(x.contiguous()))
    x = random(6, 600)[:, ::2]
    assert torch.equal(module(x), module(x.contiguous()))


def test_inputs_that_were_cast_to_the_weights_dtype_are_refused() -> None:
    module = layer(32, 16, Granularity.CHANNEL)
    with pytest.raises(SchemeError, match=r"inputs of torch\.float8_e4m3fn"):
        module(random(2, 32).to(module.weight.dtype))


def test_no_graph_is_kept() -> None:
    module = layer(32, 16, Granularity.CHANNEL)
    found = module(random(2, 32).requires_grad_())
    assert not found.requires_grad
    assert not any(module.get_parameter(name).requires_grad for name in ("weight", "weight_scale"))


@granularities
def test_names_and_shapes_are_those_of_checkpoints(granularity: Granularity) -> None:
    state = layer(300, 333, granularity).state_dict()
    shapes = {"channel": (333, 1), "tensor": (1,), "block": (3, 3)}
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "weight": ((333, 300), torch.float8_e4m3fn),
        "weight_scale": (shapes[granularity.value], torch.float32),
        "bias": ((333,), torch.float32),
    }


CASTS: list[Callable[[nn.Module], nn.Module]] = [
    lambda m: m.to(torch.bfloat16),
    lambda m: m.half(),
    lambda m: m.float(),
    lambda m: m.double(),
    lambda m: m.bfloat16(),
    lambda m: m.to("cpu", torch.float16),
    lambda m: m.type(torch.bfloat16),
]


@pytest.mark.parametrize("cast", CASTS)
def test_casts_of_a_model_leave_codes_and_scales(cast: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(layer(32, 16, Granularity.CHANNEL), nn.LayerNorm(16))
    before, pointer = bits(model[0]), model[0].get_parameter("weight").data_ptr()
    reference = nn.Linear(2, 2)
    cast(reference)
    cast(model)
    assert bits(model[0]) == before
    assert model[0].get_parameter("weight").data_ptr() == pointer
    assert model[0].get_parameter("bias").dtype == reference.weight.dtype
    assert model[1].get_parameter("weight").dtype == reference.weight.dtype


def test_a_cast_makes_no_copy_of_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(64, 64, Granularity.CHANNEL, bias=False)
    largest = []

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        largest.append(tensor.numel())
        return tensor.to(torch.bfloat16)

    module._apply(seen)
    assert max(largest) == 0


def test_devices_are_moved() -> None:
    module = layer(32, 16, Granularity.BLOCK).to("meta", torch.bfloat16)
    assert [(p.device.type, p.dtype) for p in module.parameters()] == [
        ("meta", torch.float8_e4m3fn),
        ("meta", torch.float32),
        ("meta", torch.bfloat16),
    ]
    module.to_empty(device="cpu")
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {
        ("cpu", torch.float8_e4m3fn),
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
    }
    shared = layer(32, 16, Granularity.BLOCK).share_memory()
    assert shared.weight.is_shared()  # type: ignore[no-untyped-call]


@granularities
def test_copies_and_states_are_the_same(granularity: Granularity) -> None:
    module = layer(300, 40, granularity)
    x = random(3, 300)
    other = FP8Linear(300, 40, granularity)
    other.load_state_dict(module.state_dict())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for same in (other, copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert bits(same) == bits(module)
        assert torch.equal(same(x), module(x))
        assert same.weight.data_ptr() != module.weight.data_ptr()


def test_a_state_of_16_bit_weights_is_refused() -> None:
    module = layer(32, 16, Granularity.CHANNEL)
    before = bits(module)
    plain = nn.Linear(32, 16).bfloat16()
    with pytest.raises(RuntimeError, match=r"expected codes of torch.float8_e4m3fn, found torch.b"):
        module.load_state_dict(plain.state_dict(), strict=False)
    assert bits(module) == before


def test_a_layer_like_another_has_its_bias_and_no_storage() -> None:
    plain = nn.Linear(48, 32).eval()
    made = FP8Linear.on_meta_like(plain, Granularity.BLOCK)
    assert made.bias is plain.bias
    assert made.weight.is_meta
    assert made.weight_scale.is_meta
    assert not made.training
    assert (made.in_features, made.out_features) == (48, 32)
    assert FP8Linear.on_meta_like(nn.Linear(2, 3, bias=False), Granularity.TENSOR).bias is None
    with torch.device("meta"):
        meta = nn.Linear(8, 4)
    assert [p.is_meta for p in FP8Linear.on_meta_like(meta, Granularity.CHANNEL).parameters()] == [
        True
    ] * 3


def test_a_layer_says_what_it_is() -> None:
    made = layer(32, 16, Granularity.BLOCK, bias=False, quantize_activations=False)
    assert repr(made) == (
        "FP8Linear(in_features=32, out_features=16, bias=False, granularity=block, "
        "quantize_activations=False)"
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@granularities
def test_a_layer_compiles_whole(backend: str, granularity: Granularity) -> None:
    module = layer(300, 333, granularity)
    for tokens in (2, 3, 9):
        x = random(tokens, 300)
        assert torch.equal(compiled(module, backend)(x), module(x))


def test_inductor_makes_code_of_a_layer() -> None:
    module = layer(300, 40, Granularity.CHANNEL)
    x = random(3, 300)
    try:
        found = compiled(module, "inductor")(x)
    except Exception as error:
        if "C++" not in str(error) and "compiler" not in str(error):
            raise
        pytest.skip(f"no C++ compiler that works: {error}")
    # Its quotients may differ in the last bit, and so a code that is nearly a tie.
    assert relative(found, module(x)) < 1e-3


@granularities
def test_a_default_device_changes_no_product(granularity: Granularity) -> None:
    module, x = layer(300, 40, granularity), random(3, 300)
    wanted = module(x), module.dequantize()
    with torch.device("meta"):
        found = module(x), module.dequantize()
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@on_gpu
@granularities
def test_the_gpu_gives_what_the_cpu_gives(granularity: Granularity) -> None:
    module = layer(640, 256, granularity, dtype=torch.bfloat16)
    x = random(5, 640, dtype=torch.bfloat16)
    wanted = module(x)
    module.cuda()
    assert relative(module(x.cuda()).cpu(), wanted) < 1e-2


@on_gpu
def test_a_captured_graph_sees_new_weights() -> None:
    module = layer(256, 128, Granularity.CHANNEL, dtype=torch.bfloat16).cuda()
    x = random(8, 256, dtype=torch.bfloat16).cuda()
    module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module(x)
    module.weight_scale.data.mul_(2)
    graph.replay()
    assert torch.equal(found, module(x))
