"""Experts in one live module, against transformers' own."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fp8stream.errors import SchemeError
from fp8stream.fp8 import quantize_weight
from fp8stream.fused_experts import FP8Experts, describe_experts, part_of
from fp8stream.linear import FP8Linear
from fp8stream.scheme import Granularity
from fp8stream.skeleton import find_weights
from tests import oracle
from tests.live import bits, compiled, granularities, on_gpu, random, relative

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


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "Llama4TextExperts"])
def test_experts_compile_whole(name: str) -> None:
    made = converted(original(name), Granularity.BLOCK)
    given = inputs(made.form.dense)
    found = compiled(made, "aot_eager")(*given)
    assert torch.allclose(found, made(*given), rtol=1e-5, atol=1e-6)


@granularities
def test_a_default_device_changes_no_expert(granularity: Granularity) -> None:
    made, given = converted(original("GptOssExperts"), granularity), inputs(dense=False)
    wanted = made(*given)
    with torch.device("meta"):
        assert torch.equal(made(*given), wanted)


@on_gpu
@granularities
def test_the_gpu_gives_what_the_cpu_gives(granularity: Granularity) -> None:
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
