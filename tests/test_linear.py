"""Live modules: against arithmetic done at length, and against transformers' own experts."""

import copy
import importlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8stream import matmul
from fp8stream.errors import SchemeError
from fp8stream.fp8 import dequantize_weight, quantize_weight
from fp8stream.fused_experts import FP8Experts, describe_experts
from fp8stream.fused_experts import _part as part_of
from fp8stream.linear import FP8Linear
from fp8stream.matmul import quantize_activations
from fp8stream.scheme import Granularity
from fp8stream.skeleton import find_weights
from tests import oracle

pytestmark = pytest.mark.thorough

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
granularities = pytest.mark.parametrize("granularity", list(Granularity))
dtypes = pytest.mark.parametrize("dtype", DTYPES)
BLOCK = 128


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(
    columns: int,
    rows: int,
    granularity: Granularity,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> FP8Linear:
    made = FP8Linear(columns, rows, granularity, bias, None, dtype, **options)
    weight = random(rows, columns, seed=1) * random(rows, 1, seed=2).exp() * 0.05
    codes, scale = quantize_weight(weight, granularity)
    made.weight.data.copy_(codes)
    made.weight_scale.data.copy_(scale)
    if made.bias is not None:
        made.bias.data.copy_(random(rows, seed=3))
    return made


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


# Activations


@pytest.mark.parametrize("columns", [1, 100, 128, 129, 300, 384])
@granularities
@dtypes
def test_activations_are_quantized_as_weights_are(
    columns: int, granularity: Granularity, dtype: torch.dtype
) -> None:
    x = random(7, columns, dtype=dtype)
    x[3] = 0
    codes, scale = quantize_activations(x, granularity)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.shape == x.shape
    width = BLOCK if granularity is Granularity.BLOCK else columns
    for number, group in enumerate(torch.split(x, width, 1)):
        wanted, wanted_scale = oracle.quantize([group], Granularity.CHANNEL)
        assert torch.equal(scale[:, number : number + 1], wanted_scale)
        assert oracle.same(torch.split(codes, width, 1)[number].contiguous(), wanted)
    assert torch.equal(scale[3], torch.ones_like(scale[3]))


@granularities
def test_a_token_that_is_not_finite_spoils_itself_alone(granularity: Granularity) -> None:
    module = layer(300, 32, granularity)
    x = random(4, 300)
    wanted = module(x)
    x[1, 7], x[2, 200] = float("nan"), float("-inf")
    found = module(x)
    assert not found[1:3].isfinite().any()
    assert torch.equal(found[[0, 3]], wanted[[0, 3]])


# The linear layer

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


@granularities
def test_runs_change_nothing(granularity: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(130, 700, granularity)
    whole = module.dequantize()
    assert torch.equal(whole, dequantize_weight(module.weight.data, module.weight_scale.data))
    monkeypatch.setattr(matmul, "_RUN", 1)
    runs = list(matmul._dequantized_runs(module.weight.data, module.weight_scale.data))
    assert len(runs) > 5
    assert torch.equal(module.dequantize(), whole)
    assert torch.equal(module.dequantize(torch.bfloat16), whole.bfloat16())


@granularities
def test_a_run_is_small(granularity: Granularity) -> None:
    module = layer(1700, 2000, granularity)
    runs = matmul._dequantized_runs(module.weight.data, module.weight_scale.data)
    assert max(wide.numel() for _, wide in runs) <= matmul._RUN < module.weight.numel() / 3


def test_every_code_is_the_number_that_it_is() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    numbers = codes.float()
    numbers[numbers.isnan()] = 0
    for each in (codes, numbers.to(torch.float8_e4m3fn)):
        for scale in (torch.full((1,), 7e35), torch.full((2, 1), 2.0**-126), torch.ones(1, 1)):
            found = matmul.dequantized(each, scale, torch.float32)
            assert torch.equal(found.nan_to_num(1e9), (each.float() * scale).nan_to_num(1e9))


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


def bits(module: nn.Module) -> list[bytes]:
    """Codes and scales, as bytes."""
    kept = [n for n, _ in module.named_parameters() if not n.endswith("bias")]
    return [
        module.get_parameter(n).detach().contiguous().view(torch.uint8).numpy().tobytes()
        for n in kept
    ]


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


def test_a_conv1d_is_a_linear_layer_that_lies_transposed() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    made = FP8Linear.on_meta_like(pytorch_utils.Conv1D(96, 32), Granularity.CHANNEL)
    assert tuple(made.weight.shape) == (96, 32)


def test_a_layer_says_what_it_is() -> None:
    made = layer(32, 16, Granularity.BLOCK, bias=False, quantize_activations=False)
    assert repr(made) == (
        "FP8Linear(in_features=32, out_features=16, bias=False, granularity=block, "
        "quantize_activations=False)"
    )


# Experts, of transformers' own classes

HIDDEN, INNER, EXPERTS, TOKENS, K = 160, 144, 5, 11, 2
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3MoeExperts": ("qwen3_moe", "Qwen3MoeConfig", {"moe_intermediate_size": INNER}),
    "MixtralExperts": ("mixtral", "MixtralConfig", {}),
    "DeepseekV3Experts": ("deepseek_v3", "DeepseekV3Config", {"moe_intermediate_size": INNER}),
    "GptOssExperts": ("gpt_oss", "GptOssConfig", {}),
    "Llama4TextExperts": ("llama4", "Llama4TextConfig", {}),
    "GraniteMoeExperts": ("granitemoe", "GraniteMoeConfig", {}),
    "JambaExperts": ("jamba", "JambaConfig", {"num_experts": EXPERTS}),
    "NemotronHExperts": (
        "nemotron_h",
        "NemotronHConfig",
        {"moe_intermediate_size": INNER, "moe_latent_size": None},
    ),
    "AriaExperts": (
        "aria",
        "AriaTextConfig",
        {"moe_num_experts": EXPERTS, "num_attention_heads": 4},
    ),
    "MuseSparkExperts": (
        "muse_spark",
        "MuseSparkTextConfig",
        {"moe_intermediate_size": INNER, "moe_hidden_size": HIDDEN, "num_attention_heads": 4},
    ),
    "Step3p7Experts": ("step3p7", "Step3p7TextConfig", {"moe_intermediate_size": INNER}),
}
classes = pytest.mark.parametrize("name", list(CLASSES))


def original(
    name: str, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN, inner: int = INNER
) -> nn.Module:
    """The real class, random, its own forward and none of transformers' faster ones."""
    pytest.importorskip("transformers")
    at, config_class, options = CLASSES[name]
    package = f"transformers.models.{at}"
    try:
        modeling = importlib.import_module(f"{package}.modeling_{at}")
        configuration = importlib.import_module(f"{package}.configuration_{at}")
    except ImportError:
        pytest.skip(f"this transformers has no {at}")
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_local_experts": EXPERTS}
    config = getattr(configuration, config_class)(**sizes | options)
    # DeepSeek's name for it is n_routed_experts, to which an attribute map leads.
    for key in ("n_routed_experts", "num_experts"):
        if hasattr(config, key):
            setattr(config, key, EXPERTS)
    config._experts_implementation = "eager"
    module: nn.Module = getattr(modeling, name)(config)
    for number, parameter in enumerate(module.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=number) * 0.1)
    return module.to(dtype).eval()


def fill(experts: FP8Experts, module: nn.Module) -> None:
    """Quantizes the module's weights into `experts`, and leaves in it what they stand for."""
    for name in experts.form.weights:
        stacked = module.get_parameter(name).data
        for expert in range(experts.num_experts):
            matrix = stacked[experts.first_expert + expert]
            matrix = matrix.T if experts.form.transposed else matrix
            quantize_expert(experts, name, expert, matrix)
        held = stacked[experts.first_expert : experts.first_expert + experts.num_experts]
        numbers = experts.dequantize(name)
        held.copy_(numbers.transpose(1, 2) if experts.form.transposed else numbers)


def quantize_expert(experts: FP8Experts, name: str, expert: int, matrix: torch.Tensor) -> None:
    """Gate and up as they would be quantized alone, but for a tensor scale."""
    parts = experts.form.parts(name)
    for part in range(parts):
        codes, scale = experts.part(name, expert, part)
        own = part_of(matrix, part, parts, experts.form.interleaved).contiguous()
        if experts.granularity is Granularity.TENSOR:
            wanted = oracle.quantize([own, matrix], Granularity.TENSOR)
        else:
            wanted = quantize_weight(own, experts.granularity)
        codes.copy_(wanted[0])
        scale.copy_(wanted[1])


def converted(module: nn.Module, granularity: Granularity, **options: Any) -> FP8Experts:
    made = FP8Experts.on_meta_like(module, granularity, **options)
    for name, parameter in list(made.named_parameters(recurse=False)):
        if parameter.is_meta:
            empty = torch.zeros(parameter.shape, dtype=parameter.dtype)
            setattr(made, name, nn.Parameter(empty, requires_grad=False))
    fill(made, module)
    return made


def inputs(dense: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Tokens, and two experts for each; none has expert 3."""
    if dense:
        return (random(TOKENS * EXPERTS, HIDDEN, dtype=dtype, seed=9),)
    scores = random(TOKENS, EXPERTS, seed=10)
    scores[:, 3] = -9
    weights, index = scores.softmax(1).topk(K)
    return random(TOKENS, HIDDEN, dtype=dtype, seed=9), index, weights.to(dtype)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


@classes
@granularities
def test_experts_are_the_originals_with_the_weights_that_codes_stand_for(
    name: str, granularity: Granularity
) -> None:
    module = original(name)
    made = converted(module, granularity, quantize_activations=False)
    given = inputs(made.form.dense)
    with torch.no_grad():
        wanted = module(*given)
    assert relative(made(*given), wanted) < 1e-6
    made.quantize_activations = True
    # Codes have 3 bits behind the point, that is 2.6 % a number; matrices and gate add up.
    assert 0.03 < relative(made(*given), wanted) < 0.05


@pytest.mark.parametrize("name", list(CLASSES)[:5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_16_bit(name: str, dtype: torch.dtype) -> None:
    module = original(name)
    made = converted(module, Granularity.CHANNEL, quantize_activations=False)
    module.to(dtype)
    made.to(dtype)
    given = inputs(made.form.dense, dtype)
    with torch.no_grad():
        wanted = module(*given)
    found = made(*given)
    assert found.dtype == wanted.dtype == dtype
    # The original rounds weights, sums and products to 16 bit; ours sums in float32.
    assert relative(found, wanted) < torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts"])
@granularities
def test_an_expert_is_two_linear_layers_and_a_gate(name: str, granularity: Granularity) -> None:
    """Tokens that go to one expert, with a weight of 1."""
    module = original(name)
    made = converted(module, granularity)
    up, down = (linear_of(made, weight, expert=2) for weight in made.form.weights)
    x = random(7, HIDDEN)
    found = made(x, torch.full((7, 1), 2), torch.ones(7, 1))
    gated = type(module)._apply_gate(module, up(x))  # type: ignore[attr-defined]
    assert torch.allclose(found, down(gated), rtol=1e-5, atol=1e-6)


def linear_of(experts: FP8Experts, name: str, expert: int) -> Callable[..., torch.Tensor]:
    """The layer, or those of gate and up together, that an expert's matrix is."""
    parts = experts.form.parts(name)
    layers = []
    for part in range(parts):
        codes, scale = experts.part(name, expert, part)
        made = FP8Linear(codes.shape[1], codes.shape[0], experts.granularity, bias=False)
        made.weight.data.copy_(codes)
        made.weight_scale.data.copy_(scale)
        if experts.form.biases:
            bias = experts.get_parameter(f"{name}_bias").data[expert]
            made.bias = nn.Parameter(part_of(bias, part, parts, experts.form.interleaved))
        layers.append(made)
    if experts.form.interleaved and parts > 1:
        return lambda x: torch.stack([one(x) for one in layers], 2).flatten(1)
    return lambda x: torch.cat([one(x) for one in layers], 1)


@granularities
def test_gate_and_up_have_the_bytes_that_they_have_alone(granularity: Granularity) -> None:
    """What is written from here is what the converter makes of tensors of one expert each."""
    for name in ("Qwen3MoeExperts", "GptOssExperts"):
        module = original(name)
        matrix = module.get_parameter("gate_up_proj").data[1].clone()
        made = converted(module, granularity)
        if made.form.transposed:
            matrix = matrix.T
        halves = [part_of(matrix, part, 2, made.form.interleaved) for part in range(2)]
        for part, half in enumerate(halves):
            group = [half, halves[1 - part]]
            codes, scale = oracle.quantize(group, granularity)
            found = made.part("gate_up_proj", 1, part)
            assert oracle.same(found[0].contiguous(), codes)
            assert torch.equal(found[1], scale)
        rows = {"channel": 2 * INNER, "tensor": 1, "block": 2 * 2}[granularity.value]
        assert made.get_parameter("gate_up_proj_scale").shape[1] == rows


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "MixtralExperts", "GptOssExperts"])
def test_masked_tokens_give_nothing(name: str) -> None:
    made = converted(original(name), Granularity.CHANNEL)
    x, index, weights = inputs(dense=False)
    masked = index.clone()
    masked[::2, 0] = EXPERTS
    masked[4] = EXPERTS
    weights[0, 0] = float("nan")
    found = made(x, masked, weights)
    wanted = made(x, index, weights.masked_fill(masked == EXPERTS, 0.0))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[4], torch.zeros(HIDDEN))


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts", "Llama4TextExperts"])
@granularities
def test_ranks_add_up(name: str, granularity: Granularity) -> None:
    module = original(name)
    whole = converted(module, granularity)
    given = inputs(whole.form.dense)
    ranks = [
        converted(original(name), granularity, experts=held)
        for held in (range(2), range(2, 3), range(3, EXPERTS))
    ]
    for rank in ranks:
        held = slice(rank.first_expert, rank.first_expert + rank.num_experts)
        for key in (*rank.form.weights, *(f"{n}_scale" for n in rank.form.weights)):
            mine, all_of_it = rank.get_parameter(key), whole.get_parameter(key)
            assert torch.equal(mine.float(), all_of_it[held].float())
    together = torch.stack([rank(*given) for rank in ranks]).sum(0)
    assert torch.allclose(together, whole(*given), rtol=1e-5, atol=1e-6)


@classes
def test_experts_keep_what_is_not_a_weight(name: str) -> None:
    module = original(name)
    made = FP8Experts.on_meta_like(module, Granularity.CHANNEL)
    weights = set(made.form.weights)
    for key, parameter in module.named_parameters():
        assert (made.get_parameter(key) is parameter) == (key not in weights)
    for key, child in module.named_children():
        assert made.get_submodule(key) is child
    for key in ("alpha", "limit", "config"):
        assert getattr(made, key, None) is getattr(module, key, None)
    assert not made.training
    assert {p.dtype for n, p in made.named_parameters() if n in weights} == {torch.float8_e4m3fn}
    assert describe_experts(made) is None


FORMS = {
    "Qwen3MoeExperts": (False, True, False, False, False, False),
    "MixtralExperts": (False, True, False, False, False, False),
    "DeepseekV3Experts": (False, True, False, False, False, False),
    "GptOssExperts": (True, True, True, True, False, False),
    "Llama4TextExperts": (True, True, False, False, True, False),
    "NemotronHExperts": (False, False, False, False, False, False),
    "AriaExperts": (True, True, False, False, False, False),
    "MuseSparkExperts": (False, True, False, False, False, True),
    "Step3p7Experts": (False, True, False, False, False, False),
}


@pytest.mark.parametrize("name", list(FORMS))
def test_forms(name: str) -> None:
    form = describe_experts(original(name))
    assert form is not None
    assert form.experts == EXPERTS
    first = "gate_up_proj" if form.gated else "up_proj"
    assert form.weights == (first, "down_proj")
    assert form.shapes == ((INNER * (2 if form.gated else 1), HIDDEN), (HIDDEN, INNER))
    assert FORMS[name] == (
        form.transposed,
        form.gated,
        form.interleaved,
        bool(form.biases),
        form.dense,
        form.normed,
    )


def test_modules_that_are_not_understood_are_left() -> None:
    module = original("Qwen3MoeExperts")
    for mark in ("is_transposed", "has_bias"):
        other = copy.copy(module)
        other.__dict__ = {key: value for key, value in vars(module).items() if key != mark}
        assert describe_experts(other) is None
    vars(module)["is_transposed"] = True
    assert describe_experts(module) is None
    assert describe_experts(nn.Linear(2, 2)) is None
    with pytest.raises(SchemeError, match="Linear: not a module of experts"):
        FP8Experts.on_meta_like(nn.Linear(2, 2), Granularity.CHANNEL)


def test_what_does_more_than_a_linear_layer_is_not_replaced() -> None:
    def is_found(module: nn.Module) -> bool:
        return bool(find_weights(nn.ModuleDict({"it": module})))

    settings = pytest.importorskip("transformers").Llama4TextConfig
    llama4 = importlib.import_module("transformers.models.llama4.modeling_llama4")
    router = llama4.Llama4Router(settings(hidden_size=2, num_local_experts=2))
    assert isinstance(router, nn.Linear)
    assert is_found(nn.Linear(2, 2))
    assert is_found(original("GptOssExperts"))
    assert not is_found(nn.Embedding(2, 2))
    assert not is_found(router)
    # Attention reads the weight of this one, and never calls it.
    assert not is_found(nn.MultiheadAttention(2, 1))


@pytest.mark.parametrize("held", [range(0), range(3, 9), range(0, 4, 2)])
def test_experts_that_there_are_not_cannot_be_held(held: range) -> None:
    with pytest.raises(SchemeError, match="expected a range within 5 experts"):
        FP8Experts.on_meta_like(original("MixtralExperts"), Granularity.CHANNEL, held)


def test_no_token_at_all() -> None:
    none = torch.zeros(0, HIDDEN)
    made = converted(original("MixtralExperts"), Granularity.BLOCK)
    assert made(none, torch.zeros(0, K, dtype=torch.long), torch.zeros(0, K)).shape == none.shape
    assert converted(original("Llama4TextExperts"), Granularity.BLOCK)(none).shape == none.shape


def test_only_experts_that_were_hit_are_computed() -> None:
    """An expert that no token goes to may hold anything."""
    made = converted(original("MixtralExperts"), Granularity.CHANNEL)
    given = inputs(dense=False)
    before = made(*given)
    made.get_parameter("down_proj_scale").data[3] = float("nan")
    assert torch.equal(made(*given), before)


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "Llama4TextExperts"])
def test_experts_are_copied_cast_and_loaded_as_layers_are(name: str) -> None:
    made = converted(original(name), Granularity.BLOCK)
    given = inputs(made.form.dense)
    wanted, before = made(*given), bits(made)
    other = FP8Experts.on_meta_like(original(name), Granularity.BLOCK).to_empty(device="cpu")
    other.load_state_dict(made.state_dict())
    for same in (other, copy.deepcopy(made)):
        assert torch.equal(same(*given), wanted)
    made.to(torch.bfloat16)
    assert bits(made) == before
    assert {made.get_parameter(b).dtype for b in made.form.biases} <= {torch.bfloat16}
    assert made(*inputs(made.form.dense, torch.bfloat16)).dtype == torch.bfloat16
    assert not made(*given).requires_grad


# Compilers


def compiled(module: nn.Module, backend: str) -> Callable[..., torch.Tensor]:
    torch._dynamo.reset()
    made: Callable[..., torch.Tensor] = torch.compile(module, fullgraph=True, backend=backend)
    return made


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@granularities
def test_a_layer_compiles_whole(backend: str, granularity: Granularity) -> None:
    module = layer(300, 333, granularity)
    for tokens in (2, 3, 9):
        x = random(tokens, 300)
        assert torch.equal(compiled(module, backend)(x), module(x))


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "Llama4TextExperts"])
def test_experts_compile_whole(name: str) -> None:
    made = converted(original(name), Granularity.BLOCK)
    given = inputs(made.form.dense)
    found = compiled(made, "aot_eager")(*given)
    assert torch.allclose(found, made(*given), rtol=1e-5, atol=1e-6)


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


def test_a_kernel_is_looked_for_while_a_graph_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is a constant of the graph, and not a part of it."""
    asked: list[tuple[Any, ...]] = []

    def answer(*question: Any) -> bool:
        asked.append(question)
        return False

    constant = torch.compiler.assume_constant_result(answer)  # type: ignore[no-untyped-call]
    monkeypatch.setattr(matmul, "_has_kernel", constant)
    module = layer(256, 256, Granularity.BLOCK)
    x = random(3, 256)
    assert torch.equal(compiled(module, "eager")(x), module(x))
    assert asked[0] == (torch.device("cpu"), True, torch.float32)
    assert not matmul._has_kernel(torch.device("cpu"), False, torch.float32)


# Kernels: torch has one for rows on the CPU too, which tells whether operands lie as they must


@pytest.mark.parametrize("granularity", [Granularity.CHANNEL, Granularity.TENSOR])
@pytest.mark.parametrize("tokens", [1, 3, 64])
@dtypes
def test_operands_of_rows_are_as_the_kernel_wants_them(
    granularity: Granularity, tokens: int, dtype: torch.dtype
) -> None:
    module = layer(640, 256, granularity, bias=False)
    x = random(tokens, 640)
    operands = *quantize_activations(x, granularity), module.weight, module.weight_scale
    try:
        found = matmul._scaled_rows(*operands, dtype)
    except NotImplementedError:
        pytest.skip("this torch has no such kernel for the CPU")
    assert found.dtype == dtype
    assert relative(found.float(), module(x)) < 1e-6 + torch.finfo(dtype).eps / 2


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The default dtype, for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("default_dtype", [*DTYPES, torch.float64], indirect=True)
def test_a_kernel_is_tried_in_float32_whatever_the_default(default_dtype: torch.dtype) -> None:
    device = torch.device("cpu")
    operands = quantize_activations(torch.ones(1, 128), Granularity.CHANNEL)
    try:
        matmul._scaled_rows(*operands, *operands, torch.float32)
    except NotImplementedError:
        pytest.skip("this torch has no such kernel for the CPU")
    assert matmul._is_right(device, False, torch.bfloat16)
    assert not matmul._is_right(device, True, torch.bfloat16)


@granularities
def test_a_default_device_changes_no_product(granularity: Granularity) -> None:
    module = layer(300, 40, granularity)
    experts = converted(original("GptOssExperts"), granularity)
    x, given = random(3, 300), inputs(dense=False)
    wanted = module(x), experts(*given), module.dequantize()
    with torch.device("meta"):
        found = module(x), experts(*given), module.dequantize()
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("block", [False, True])
def test_a_kernel_gets_rows_that_lie_one_after_the_other(
    block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of gate, where they lie in turns with those of up."""
    seen: list[torch.Tensor] = []

    def kernel(*operands: Any, **more: Any) -> torch.Tensor:
        seen.extend(o for o in (*operands, *more.values()) if isinstance(o, torch.Tensor))
        return torch.zeros(4, 256)

    monkeypatch.setattr(torch, "_scaled_mm", kernel)
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", kernel, raising=False)
    granularity = Granularity.BLOCK if block else Granularity.CHANNEL
    x, x_scale = quantize_activations(random(4, 512), granularity)
    weight, scale = quantize_weight(random(512, 512), granularity)
    scaled = matmul._scaled_blocks if block else matmul._scaled_rows
    scaled(x, x_scale, weight[::2], scale[::2], torch.float32)
    assert [t.shape for t in seen if t.dtype == weight.dtype] == [(4, 512), (512, 256)]
    assert all(t.is_contiguous() or t.T.is_contiguous() for t in seen)


@pytest.mark.parametrize("tokens", [1, 3, 4, 64])
@pytest.mark.parametrize("columns", [128, 512, 640])
def test_operands_of_blocks_are_as_the_kernel_wants_them(tokens: int, columns: int) -> None:
    """Torch's own rules for shapes and strides, without the kernel."""
    if not hasattr(torch.nn.functional, "scaled_mm"):
        pytest.skip("this torch multiplies no blocks")
    with FakeTensorMode():
        x, x_scale = quantize_activations(torch.empty(tokens, columns), Granularity.BLOCK)
        weight = torch.empty(256, columns, dtype=torch.float8_e4m3fn)
        scale = torch.empty(2, columns // BLOCK)
        found = matmul._scaled_blocks(x, x_scale, weight, scale, torch.bfloat16)
        assert (found.shape, found.dtype) == ((tokens, 256), torch.bfloat16)
        with pytest.raises(RuntimeError, match="128x128 blockwise"):
            matmul._scaled_blocks(x, x_scale, weight, scale.T.contiguous().T[:1], torch.bfloat16)


# GPUs

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@on_gpu
@granularities
@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize(("columns", "rows"), [(640, 256), (512, 384), (128, 128), (80, 48)])
def test_torchs_kernel_and_runs_agree(
    granularity: Granularity, dtype: torch.dtype, tokens: int, columns: int, rows: int
) -> None:
    module = layer(columns, rows, granularity, dtype=dtype).cuda()
    x = random(tokens, columns, dtype=dtype).cuda()
    codes, scale = quantize_activations(x, granularity)
    runs = torch.ops.fp8stream.linear_by_runs(
        codes, scale, module.weight, module.weight_scale, module.bias, torch.float32
    )
    assert relative(module(x).float(), runs) < 2 * torch.finfo(dtype).eps + 2e-3


@on_gpu
@granularities
def test_a_kernel_is_used_where_it_must_exist(granularity: Granularity) -> None:
    block = granularity is Granularity.BLOCK
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    if block and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("torch multiplies blocks on Hopper alone")
    if block and not hasattr(torch.nn.functional, "scaled_mm"):
        pytest.skip("this torch multiplies no blocks")
    assert matmul._has_kernel(torch.device("cuda", 0), block, torch.bfloat16)


@on_gpu
@granularities
def test_the_gpu_gives_what_the_cpu_gives(granularity: Granularity) -> None:
    module = layer(640, 256, granularity, dtype=torch.bfloat16)
    x = random(5, 640, dtype=torch.bfloat16)
    wanted = module(x)
    module.cuda()
    assert relative(module(x.cuda()).cpu(), wanted) < 1e-2
    experts = converted(original("GptOssExperts"), granularity)
    given = inputs(dense=False)
    wanted = experts(*given)
    experts.cuda()
    assert relative(experts(*(t.cuda() for t in given)).cpu(), wanted) < 2e-2


@on_gpu
def test_blocks_that_alternate_go_through_the_kernel_as_on_the_cpu() -> None:
    made = converted(original("GptOssExperts", hidden=256, inner=256), Granularity.BLOCK)
    x, *routed = inputs(dense=False)
    given = (random(len(x), 256, seed=9), *routed)
    wanted = made(*given)
    made.cuda()
    cuda = [t.cuda().bfloat16() if t.is_floating_point() else t.cuda() for t in given]
    assert relative(made(*cuda).float().cpu(), wanted) < 3e-2


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
