"""Surgery on live models: what is computed because nobody loads it, and what must be left alone."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8stream import online
from fp8stream.errors import CheckpointError
from fp8stream.fused_experts import FP8Experts
from fp8stream.initialization import finish, uncomputable
from fp8stream.linear import FP8Linear, is_linear
from fp8stream.live import Share as Held
from fp8stream.mapping import Part, find_places, model_tensors
from fp8stream.scheme import Granularity
from fp8stream.skeleton import (
    become_fp8,
    find_weights,
    give_storage,
    hold_parts,
    not_plain,
    original_tensors,
)
from tests.oracle import same

pytestmark = [pytest.mark.filterwarnings("ignore")]
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


def values(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model, saved or not."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# What nobody loads


def llava() -> Any:
    transformers = pytest.importorskip("transformers")
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text = transformers.LlamaConfig(
        **sides, num_attention_heads=2, num_key_value_heads=1, vocab_size=64
    )
    vision = transformers.CLIPVisionConfig(
        **sides, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    return transformers.LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


def dia() -> Any:
    transformers = pytest.importorskip("transformers")
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    encoder = transformers.DiaEncoderConfig(**sides, num_attention_heads=2, num_key_value_heads=2)
    decoder = transformers.DiaDecoderConfig(
        **sides,
        num_attention_heads=2,
        num_key_value_heads=2,
        cross_num_attention_heads=2,
        cross_num_key_value_heads=2,
        cross_head_dim=16,
        cross_hidden_size=32,
        vocab_size=64,
    )
    config = transformers.DiaConfig(encoder_config=encoder, decoder_config=decoder)
    return transformers.DiaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("make", [llava, dia])
def test_a_model_inside_another_computes_its_own_buffers(make: Callable[[], Any]) -> None:
    full, net = make(), on_meta(make)
    online.load_into(net, dict(model_tensors(full)), ignore=["re:.*"], device="cpu")
    expected = values(full)
    for name, tensor in values(net).items():
        assert same(tensor.detach(), expected[name].detach()), name


def marian() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.MarianConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=64,
        pad_token_id=3,
        max_position_embeddings=16,
    )
    return transformers.MarianMTModel._from_config(config, dtype=torch.bfloat16)


OPTIONAL = (
    "model.encoder.embed_positions.weight",
    "model.decoder.embed_positions.weight",
    "final_logits_bias",
)


@pytest.mark.parametrize("strict", [True, False])
def test_what_a_model_can_do_without_is_initialized_by_it(strict: bool) -> None:
    full, net = marian(), on_meta(marian)
    given = {n: t for n, t in model_tensors(full).items() if n not in OPTIONAL}
    result = online.load_into(net, given, ignore=["re:.*"], device="cpu", strict=strict)
    assert not result.missing
    expected = model_tensors(full)
    for name, tensor in model_tensors(net).items():
        assert same(tensor.detach(), expected[name].detach()), name
    assert net.lm_head.weight is net.model.shared.weight
    again = dict(model_tensors(net))
    online.load_into(net, given, ignore=["re:.*"], device="cpu")
    assert all(tensor is again[name] for name, tensor in model_tensors(net).items())


def test_what_had_values_before_the_load_keeps_them() -> None:
    net = marian()
    given = {n: t.clone() for n, t in model_tensors(net).items() if n not in OPTIONAL}
    with torch.no_grad():
        net.final_logits_bias.fill_(7)
        net.model.encoder.embed_positions.weight.fill_(3)
    online.load_into(net, given, ignore=["re:.*"], device="cpu")
    assert net.final_logits_bias.eq(7).all()
    assert net.model.encoder.embed_positions.weight.eq(3).all()


class Initialized(nn.Module):
    """A model that initializes what is in it, as other libraries' do: whatever was loaded."""

    _keys_to_ignore_on_load_missing = ("noise", "some", "extra")

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4, padding_idx=0, dtype=torch.bfloat16)
        self.table.register_buffer("ids", torch.arange(8), persistent=False)
        self.table.register_buffer("left", torch.zeros(3), persistent=False)
        self.table.register_buffer("whole", torch.zeros(3, dtype=torch.int64), persistent=False)
        self.noise = nn.Parameter(torch.zeros(5))
        self.some = nn.Parameter(torch.zeros(4))
        self.extra = nn.Parameter(torch.zeros(2))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            module.weight[0].zero_()
            module.get_buffer("ids").copy_(torch.arange(8))
            raise KeyError("what comes after this is not reached")
        self.noise.normal_()
        self.some[:2] = 1.0


def loaded(strict: bool = False) -> tuple[Any, online.LoadResult]:
    net = on_meta(Initialized)
    return net, online.load_into(net, {"table.weight": random(8, 4)}, strict=strict, device="cpu")


def test_what_is_loaded_stays_whatever_an_initialization_does() -> None:
    net, _ = loaded()
    assert same(net.table.weight.detach(), random(8, 4))
    assert not any(hasattr(tensor, "_is_hf_initialized") for tensor in values(net).values())


def test_what_is_random_is_drawn_once_and_what_is_half_written_is_named() -> None:
    torch.manual_seed(3)
    net, result = loaded()
    torch.manual_seed(3)
    assert same(net.noise.detach(), torch.empty(5).normal_())
    assert same(net.table.ids, torch.arange(8))
    assert result.missing == ("extra", "some", "table.left", "table.whole")


def test_a_buffer_that_nobody_computes_is_nan_and_named_again() -> None:
    net, _ = loaded()
    assert net.table.left.isnan().all()
    assert same(net.table.whole, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(CheckpointError, match=r"missing table\.left, table\.whole;"):
        online.load_into(net, {"table.weight": random(8, 4)}, device="cpu")
    net.table.left.fill_(2)
    net.table.whole.fill_(2)
    result = online.load_into(net, {"table.weight": random(8, 4)}, strict=False, device="cpu")
    assert result.missing == ("extra", "some")
    assert net.table.left.eq(2).all()


def test_part_of_what_a_model_can_do_without_is_named_and_stays() -> None:
    net = on_meta(Initialized)
    rule = {"low": Part("some", slice(2, 4))}
    placement = find_places(net, [("table.weight", (8, 4)), ("low", (2,))], rule)
    give_storage(net, CPU)
    with torch.no_grad():
        net.some[2:] = 5.0
    missing = finish(net, placement, CPU)
    assert "some" in missing
    assert net.some[2:].eq(5).all()


def test_what_cannot_be_computed_is_known_before_a_load() -> None:
    net = on_meta(Initialized)
    state, before = torch.get_rng_state(), values(net)
    assert uncomputable(net) == ["table.left", "table.whole"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor is before[name] for name, tensor in values(net).items())
    plain = on_meta(lambda: nn.Sequential(nn.Linear(2, 2)))
    plain[0].register_buffer("table", torch.empty(2, device="meta"), persistent=False)
    assert uncomputable(plain) == ["0.table"]
    assert uncomputable(nn.Linear(2, 2)) == []
    with torch.device("meta"):
        assert uncomputable(on_meta(llava)) == []


# What is replaced, and what is not


def experts() -> nn.Module:
    """A module of experts of transformers' own."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_local_experts=2, vocab_size=64
    )
    config._experts_implementation = "eager"
    module: nn.Module = MixtralExperts(config).bfloat16()
    return module


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32, dtype=torch.bfloat16)
        self.experts = experts()


def test_experts_and_layers_with_a_forward_of_their_own_are_left_alone() -> None:
    net = Holder()
    assert {weight.module for weight in find_weights(net)} == {"linear", "experts"}
    for module in (net.linear, net.experts):
        # accelerate leaves a module's own method on it when its hooks are removed.
        module.forward = module.forward
    assert {weight.module for weight in find_weights(net)} == {"linear", "experts"}
    for module in (net.linear, net.experts):
        module.forward = lambda *inputs: inputs[0]
    assert find_weights(net) == []
    assert not_plain(net) == {
        "linear.weight": "its module has a forward of its own",
        "experts.gate_up_proj": "MixtralExperts is no module of experts that is understood",
        "experts.down_proj": "MixtralExperts is no module of experts that is understood",
    }


def test_a_replaced_module_runs_its_own_forward() -> None:
    net = Holder()
    for module in (net.linear, net.experts):
        module.forward = module.forward
    channel = dict.fromkeys(("linear", "experts"), Granularity.CHANNEL)
    become_fp8(net, channel, {})
    assert isinstance(net.linear, FP8Linear)
    assert isinstance(net.experts, FP8Experts)
    assert "forward" not in {**vars(net.linear), **vars(net.experts)}


def test_every_hook_of_a_replaced_layer_is_kept_and_its_handle() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)

    net, calls = Net(), list[str]()
    up: Any = net.up
    handles = [
        up.register_state_dict_pre_hook(lambda *_: calls.append("state before")),
        up.register_state_dict_post_hook(lambda *_: calls.append("state after")),
        up.register_load_state_dict_pre_hook(
            lambda module, *_: calls.append(type(module).__name__)
        ),
        up.register_load_state_dict_post_hook(lambda module, _: calls.append(repr(module)[:9])),
        up.register_full_backward_pre_hook(lambda *_: None),
    ]
    assert {key for key in vars(nn.Module()) if "hook" in key} >= {"_state_dict_hooks"}
    before = {key: value for key, value in vars(up).items() if "hook" in key}
    weight = random(128, 128)
    online.load_into(net, {"up.weight": weight}, include=["up"], device="cpu")
    del up
    gc.collect()
    assert isinstance(net.up, FP8Linear)
    assert all(getattr(net.up, key) is value for key, value in before.items())
    net.load_state_dict(net.state_dict())
    assert calls == ["state before", "state after", "FP8Linear", "FP8Linear"]
    with pytest.raises(RuntimeError, match="expected codes"):
        net.load_state_dict({"up.weight": weight}, strict=False)
    for handle in handles:
        handle.remove()
    calls.clear()
    net.load_state_dict(net.state_dict())
    assert calls == []


def test_what_is_tied_is_one_tensor_when_it_is_spread() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.head = nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

    net = Tied()
    half = Held.cut((8, 4), 0, 0, 2)
    hold_parts(net, {"embed.weight": half, "head.weight": half})
    assert tuple(net.head.weight.shape) == (4, 4)
    whole = original_tensors(net)
    assert whole["embed.weight"] is whole["head.weight"]
    assert tuple(whole["head.weight"].shape) == (8, 4)
    assert not find_places(net, [("embed.weight", (8, 4))], None, whole).missing


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1).expand(6))
        self.register_buffer("windows", torch.zeros(6).as_strided((2, 3), (1, 1)))


def test_elements_that_share_memory_get_each_their_own() -> None:
    tensors = {"bias": torch.arange(6.0), "windows": torch.arange(6.0).view(2, 3)}
    net = on_meta(Expanded)
    online.load_into(net, tensors, device="cpu", strict=False)
    assert all(same(tensor.detach(), tensors[n]) for n, tensor in model_tensors(net).items())
    with pytest.raises(CheckpointError, match=r"bias: its elements share memory.* clone\(\)"):
        online.load_into(Expanded(), tensors, device="cpu")
    shared = on_meta(Expanded)
    shared.register_buffer("all", shared.bias.detach(), persistent=False)
    with pytest.raises(CheckpointError, match="bias: its elements share memory"):
        online.load_into(shared, tensors, device="cpu")


@pytest.mark.parametrize("persistent", [True, False])
def test_complex_numbers_that_nothing_comes_for_stay(persistent: bool) -> None:
    net = nn.Module()
    net.register_buffer("phases", torch.full((2,), 1 + 2j), persistent=persistent)
    net.register_parameter("gain", nn.Parameter(torch.zeros(3)))
    for source in ({"gain": torch.ones(3)}, [("gain", torch.ones(3))]):
        online.load_into(net, iter(dict(source).items()), device="cpu")
        online.load_into(net, source, device="cpu")
    assert same(net.get_buffer("phases"), torch.full((2,), 1 + 2j))
    with pytest.raises(CheckpointError, match=r"'phases': torch.complex64 is not a dtype"):
        online.load_into(net, {"phases": torch.ones(2) + 1j, "gain": torch.ones(3)}, device="cpu")
    empty = nn.Module()
    empty.register_buffer("phases", torch.empty(2, 2, device="meta") + 1j, persistent=False)
    assert online.load_into(empty, {}, strict=False, device="cpu").missing == ("phases",)
    assert empty.get_buffer("phases").isnan().all()


def test_one_predicate_says_what_a_linear_layer_is() -> None:
    class Other(nn.Linear):
        pass

    assert is_linear(nn.Linear(2, 2))
    assert not is_linear(Other(2, 2))
    assert not is_linear(nn.Embedding(2, 2))
    assert not is_linear(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert not is_linear(nn.utils.spectral_norm(nn.Linear(2, 2)))
    assert is_linear(FP8Linear(2, 2)) is False


def test_what_looks_like_a_layer_but_is_none_has_a_reason() -> None:
    class Other(nn.Linear):
        pass

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8))

    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 4))

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(2, 4, 8))
            self.bias = nn.Parameter(torch.zeros(2, 4))
            self.token = nn.Parameter(torch.zeros(1, 4, 8))

    net = nn.ModuleDict(
        {
            "plain": nn.Linear(2, 2),
            "other": Other(2, 2),
            "turned": Conv1D(),
            "alike": Alike(),
            "stacked": Stacked(),
            "conv": nn.Conv1d(2, 2, 3),
            "table": nn.Embedding(4, 2),
            "experts": experts(),
        }
    )
    assert not_plain(net) == {
        "other.weight": "Other is not nn.Linear itself",
        "turned.weight": "a Conv1D lies transposed, [in, out]",
        "alike.weight": "Alike is not nn.Linear itself",
        "stacked.w1": "Stacked is no module of experts that is understood",
    }
    become_fp8(net, dict.fromkeys(("plain", "experts"), Granularity.CHANNEL), {})
    reasons = ["other.weight", "turned.weight", "alike.weight", "stacked.w1"]
    assert [*not_plain(net)] == reasons


def test_a_script_beside_the_layers_stays_what_it_is() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(128, 128, bias=False)])})
    model["gate"] = torch.jit.script(nn.Linear(8, 8))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert online.load_into(model, weights, device="cpu").quantized == ("layers.0",)
    assert same(model.get_parameter("gate.weight"), weights["gate.weight"])
    assert isinstance(model["gate"], torch.jit.ScriptModule)


def test_a_model_with_a_sparse_tensor_is_refused() -> None:
    net = nn.Module()
    net.register_buffer("graph", torch.eye(4).to_sparse())
    with pytest.raises(
        CheckpointError, match=r"graph: expected a dense tensor, found torch.sparse"
    ):
        online.load_into(net, {}, strict=False)
