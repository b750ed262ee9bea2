"""What comes, and how: names of all kinds, one by one or all at once, whole or not."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8stream import online
from fp8stream.errors import (
    BudgetError,
    CheckpointError,
    ReloadError,
    SchemeError,
    WeightError,
)
from fp8stream.linear import FP8Linear
from fp8stream.mapping import Part, Rule
from fp8stream.memory import MIB
from tests.nets import (
    HIDDEN,
    LINEARS,
    TOKENS,
    all_there,
    directory,
    is_fp8,
    on_meta,
    random,
    tensor_at,
    weights_of,
)
from tests.oracle import same
from tests.tiny import TINY, computing

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("spoiled")]


def causal(kind: str, **more: Any) -> Any:
    """A random model of transformers."""
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **more})
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)


def skeleton_of(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(model.config).to(torch.bfloat16)


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    return [name for name in one if not same(one[name], other[name])]


# Iterators


@pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])
def test_a_giver_may_write_to_its_tensor_once_the_next_is_asked_for(scheme: str) -> None:
    """Many loaders have one buffer for all that they give."""
    full = causal("Llama", attention_bias=True)
    buffers: dict[Any, Tensor] = {}

    def source() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in full.state_dict().items():
            buffer = buffers.setdefault(tensor.numel(), torch.empty(tensor.numel()).bfloat16())
            yield name, buffer.copy_(tensor.view(-1)).view(tensor.shape)

    wanted, model = skeleton_of(full), skeleton_of(full)
    online.load_into(wanted, full.state_dict(), scheme=scheme)
    online.load_into(model, source(), scheme=scheme)
    assert not differing(states(wanted), states(model))
    online.reload(model, source())
    assert not differing(states(wanted), states(model))


@pytest.mark.parametrize("given", ["iterator", "dict"])
def test_what_comes_of_a_layer_is_there_and_the_rest_is_named(given: str) -> None:
    net = on_meta()
    tensors = weights_of(net)
    some = {name: t for name, t in tensors.items() if name != "layers.1.norm.bias"}
    source: Any = some if given == "dict" else iter(some.items())
    result = online.load_into(net, source, strict=False)
    assert result.missing == ("layers.1.norm.bias",)
    assert tensor_at(net, "layers.1.norm.bias").isnan().all()
    assert all_there(net, some, LINEARS)


def test_what_came_of_a_shared_scale_is_there() -> None:
    full = causal("Llama")
    tensors = {n: t for n, t in full.state_dict().items() if ".0.self_attn.v_proj" not in n}
    model = skeleton_of(full)
    result = online.load_into(model, iter(tensors.items()), scheme="tensor", strict=False)
    assert result.missing == ("model.layers.0.self_attn.v_proj.weight",)
    for leaf in "qk":
        module = model.get_submodule(f"model.layers.0.self_attn.{leaf}_proj")
        wanted = tensors[f"model.layers.0.self_attn.{leaf}_proj.weight"].float()
        assert (module.dequantize() - wanted).norm() < 0.05 * wanted.norm()


MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


@pytest.mark.parametrize(
    ("kind", "more"),
    [("Qwen3Moe", MOE), ("Mixtral", {"num_local_experts": 3}), ("Llama", {})],
)
@pytest.mark.parametrize("scheme", ["channel", "tensor"])
def test_a_models_own_names_do_whatever_its_checkpoints_are_called(
    kind: str, more: dict[str, Any], scheme: str
) -> None:
    """Weights that are sent from a trainer have the trainer's names; ties come twice."""
    full = causal(kind, tie_word_embeddings=True, **more)
    wanted, model = skeleton_of(full), skeleton_of(full)
    online.load_into(wanted, full.state_dict(), scheme=scheme)
    result = online.load_into(model, iter(full.state_dict().items()), scheme=scheme)
    assert not differing(states(wanted), states(model))
    assert result.unexpected == result.missing == ()
    torch.manual_seed(1)
    for parameter in full.parameters():
        parameter.data.normal_(std=0.02)
    online.reload(wanted, full.state_dict())
    for source in (full.named_parameters(), iter(full.state_dict().items())):
        result = online.reload(model, source)
        assert not differing(states(wanted), states(model))
        assert result.warnings == result.missing == ()


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["embed.weight", "embed.weight"], "'embed.weight': comes twice"),
        (["embed.weight", "nothing"], None),
    ],
)
def test_names_that_come_twice_or_are_nothings(names: list[str], error: str | None) -> None:
    net = on_meta()
    tensors = {**weights_of(net), "nothing": torch.ones(1)}
    rest = [name for name in tensors if name not in names]
    source = ((name, tensors[name]) for name in [*names, *rest])
    if error is None:
        assert online.load_into(net, source).unexpected == ("nothing",)
        return
    with pytest.raises(CheckpointError, match=error):
        online.load_into(net, source)


def test_signs_that_are_only_noted_are_seen() -> None:
    net = on_meta()
    tensors = weights_of(net)
    source = {name: torch._neg_view(-tensor) for name, tensor in tensors.items()}
    for given in (source, iter(source.items())):
        net = on_meta()
        online.load_into(net, given)
        assert all_there(net, tensors, LINEARS)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ({"embed.weight": None}, "'embed.weight': expected a torch.Tensor"),
        ([("embed.weight", 3)], "'embed.weight': expected a torch.Tensor"),
        ([3], "expected names and tensors, found 3"),
        (3, "expected a checkpoint directory, a file, or names and tensors, found 3"),
        ({"embed.weight": torch.ones(512, HIDDEN).to_sparse()}, "'embed.weight': expected a dense"),
        (iter([("embed.weight",)]), "expected names and tensors"),
    ],
)
def test_what_is_no_tensor_is_named(source: Any, error: str) -> None:
    with pytest.raises(CheckpointError, match=error):
        online.load_into(on_meta(), source, strict=False)


def test_part_of_what_is_expected_is_refused() -> None:
    """An iterator is not gathered: what would have to be put together is asked for otherwise."""
    config = transformers.Llama4TextConfig(
        **{**TINY, "intermediate_size_mlp": 256, "num_local_experts": 2}
    )
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(config).to(torch.bfloat16)
    name = "model.layers.0.feed_forward.experts.0.down_proj.weight"
    with pytest.raises(CheckpointError, match=r"down_proj\.weight': is part of .*: give a dict"):
        online.load_into(model, iter([(name, random(128, 256))]))


def test_what_saving_leaves_out_is_loaded_and_what_may_lack_is_computed() -> None:
    """Marian does not save its sinusoids, and can do without a bias."""
    config = transformers.MarianConfig(
        d_model=128, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=128, decoder_ffn_dim=128,
        encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=320, pad_token_id=0,
        decoder_start_token_id=0, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    full = transformers.MarianMTModel(config).to(torch.bfloat16)
    tensors = full.state_dict()
    position = "model.encoder.embed_positions.weight"
    some = {n: t for n, t in tensors.items() if n not in (position, "final_logits_bias")}
    wanted, model, lacking = skeleton_of(full), skeleton_of(full), skeleton_of(full)
    online.load_into(wanted, tensors)
    assert online.load_into(model, iter(tensors.items())).missing == ()
    assert not differing(states(wanted), states(model))
    assert online.load_into(lacking, iter(some.items())).missing == ()
    assert same(states(lacking)[position], tensors[position])
    assert same(states(lacking)["final_logits_bias"], torch.zeros_like(full.final_logits_bias))
    online.quantize_model(full)
    assert not differing(states(wanted), states(full))


def test_a_buffer_may_be_given_again_with_a_mapping_too() -> None:
    net = on_meta()
    tensors = weights_of(net)
    buffers: dict[Any, Tensor] = {}

    def source() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield f"my.{name}", buffers.setdefault(tensor.shape, tensor.clone()).copy_(tensor)

    online.load_into(net, source(), mapping={r"re:my\.(.*)": r"\1"})
    assert all_there(net, tensors, LINEARS)


@pytest.mark.parametrize("given", ["dict", "iterator"])
def test_values_that_a_model_has_stay_where_nothing_comes(given: str) -> None:
    net = on_meta()
    tensors = weights_of(net)
    net.load_state_dict(tensors, assign=True)
    some = {name: t for name, t in weights_of(net, seed=30).items() if "layers.1" not in name}
    result = online.load_into(net, some if given == "dict" else iter(some.items()), strict=False)
    assert {name for name in tensors if "layers.1" in name} == {*result.missing}
    module: Any = net.get_submodule("layers.1.up")
    if isinstance(module, FP8Linear):
        assert is_fp8(net, "layers.1.up", tensors["layers.1.up.weight"])
    else:
        assert same(module.weight.detach(), tensors["layers.1.up.weight"])
    assert same(module.bias.detach(), tensors["layers.1.up.bias"])
    assert is_fp8(net, "layers.0.up", some["layers.0.up.weight"])


# Options


@pytest.mark.parametrize(
    ("options", "kind", "error"),
    [
        ({"scheme": "foo"}, SchemeError, "scheme: expected one of 'channel', 'block', 'tensor'"),
        ({"experts": "foo"}, SchemeError, "experts: expected one of 'auto'"),
        ({"ignore": "lm_head"}, SchemeError, "ignore: expected a list of names"),
        ({"include": [3]}, SchemeError, "include: expected a list of names"),
        ({"memory_budget": "x"}, BudgetError, "memory_budget: expected bytes or a size"),
        ({"memory_budget": None}, BudgetError, "memory_budget: expected bytes or a size"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], kind: Any, error: str) -> None:
    net = on_meta()
    with pytest.raises(kind, match=error):
        online.load_into(net, weights_of(net), **options)
    assert all(tensor.is_meta for tensor in net.state_dict().values())


def test_a_second_load_that_asks_otherwise_is_refused() -> None:
    net = on_meta()
    tensors = weights_of(net)
    online.load_into(net, tensors, device=torch.device("cpu"))
    with pytest.raises(SchemeError, match="ignore, include, experts: the model was loaded with"):
        online.load_into(net, tensors, ignore=["layers.1"])


# Reload: whole modules


def parted(*parts: tuple[str, slice]) -> list[Part]:
    """Rows of a source, in turn, to tensors of the model."""
    begin, found = 0, []
    for target, rows in parts:
        count = len(range(rows.start, rows.stop))
        found.append(Part(target, rows, slice(begin, begin + count)))
        begin += count
    return found


def test_a_tensor_that_two_sources_fill_is_new_in_both_halves() -> None:
    """Each half belonged with another module, and the one that was late was lost."""
    net = on_meta()
    tensors = weights_of(net)
    half = HIDDEN // 2
    rules: dict[str, Rule] = {
        "a": parted(
            ("layers.0.norm.weight", slice(0, HIDDEN)), ("layers.1.norm.weight", slice(0, half))
        ),
        "b": parted(
            ("layers.0.norm.bias", slice(0, HIDDEN)), ("layers.1.norm.weight", slice(half, HIDDEN))
        ),
    }
    gone = ("layers.0.norm.weight", "layers.1.norm.weight", "layers.0.norm.bias")
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    for seed in (0, 1):
        both = {name: random(HIDDEN + half, seed=seed + 10 * len(name)) for name in "ab"}
        call: Any = online.reload if seed else online.load_into
        for source in ({**both, **kept}, {**kept, **dict(reversed(both.items()))}):
            call(net, source, **({} if seed else {"mapping": rules}))
            halves = [both[name][HIDDEN:] for name in "ab"]
            assert same(tensor_at(net, "layers.1.norm.weight"), torch.cat(halves))
            assert same(tensor_at(net, "layers.0.norm.bias"), both["b"][:HIDDEN].contiguous())


@pytest.mark.parametrize("scheme", ["channel", "tensor"])
def test_a_module_is_new_with_all_that_it_has(scheme: str) -> None:
    """A bias does not change without its weight, nor what shares a source without the other."""
    net = on_meta()
    tensors = weights_of(net)
    rules: dict[str, Rule] = {
        "bias": parted(("layers.0.up.bias", slice(0, 256)), ("layers.1.up.bias", slice(0, 256)))
    }
    apart = {n: t for n, t in tensors.items() if not n.endswith("up.bias")}
    old = {**apart, "bias": torch.cat([tensors[f"layers.{n}.up.bias"] for n in (0, 1)])}
    online.load_into(net, old, scheme=scheme, mapping=rules)
    before = states(net)
    new = {name: random(*tensor.shape, seed=99) for name, tensor in old.items()}
    for name in [n for n in new if n.endswith("up.weight")]:
        bad = {**new, name: new[name].clone()}
        bad[name][3, 3] = torch.nan
        with pytest.raises(ReloadError) as caught:
            online.reload(net, bad)
        fresh = {*caught.value.new}
        assert not fresh & {"layers.0.up", "layers.1.up"}
        for key, tensor in states(net).items():
            assert same(tensor, before[key]) is (key.rpartition(".")[0] not in fresh), key
        online.reload(net, old)


@pytest.mark.parametrize("given", ["files", "dict", "iterator"])
@pytest.mark.parametrize("lost", ["layers.1.up.weight", "layers.1.up.bias", "layers.1.norm.bias"])
def test_part_of_a_module_is_refused_or_changes_nothing_of_it(
    tmp_path: Path, given: str, lost: str
) -> None:
    net = on_meta()
    online.load_into(net, weights_of(net))
    before, module = states(net), lost.rpartition(".")[0]
    new = {n: t for n, t in weights_of(on_meta(), seed=50).items() if n != lost}

    def source() -> Any:
        return {"files": directory(tmp_path, new), "dict": new}.get(given) or iter(new.items())

    with pytest.raises(CheckpointError if given != "iterator" else ReloadError, match=lost):
        online.reload(net, source())
    assert given == "iterator" or not differing(states(net), before)
    result = online.reload(net, source(), strict=False)
    assert {name.rpartition(".")[0] for name in result.missing} == {module}
    assert any(module in warning for warning in result.warnings)
    for name, tensor in states(net).items():
        assert same(tensor, before[name]) is name.startswith(f"{module}."), name


def test_a_part_of_a_fused_set_changes_nothing_of_it() -> None:
    full = causal("Llama")
    model = skeleton_of(full)
    online.load_into(model, full.state_dict(), scheme="tensor")
    before = states(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match="k_proj"):
        online.reload(model, {name: random(128, 128)})
    online.reload(model, {name: random(128, 128)}, strict=False)
    assert not differing(states(model), before)


def test_other_weights_need_not_have_what_was_ignored() -> None:
    net = on_meta()
    tensors = weights_of(net)
    online.load_into(net, tensors, ignore=["layers.0.up"], include=["re:layers.1.down"])
    some = {n: t for n, t in weights_of(on_meta(), seed=9).items() if "layers.1.up" in n}
    online.reload(net, some)
    assert is_fp8(net, "layers.1.up", some["layers.1.up.weight"])
    assert same(tensor_at(net, "layers.0.up.weight"), tensors["layers.0.up.weight"])


def test_what_was_never_loaded_is_not_waited_for_until_it_comes() -> None:
    net = on_meta()
    tensors = weights_of(net)
    lost = "layers.1.up.bias"
    some = {name: tensor for name, tensor in tensors.items() if name != lost}
    online.load_into(net, some, strict=False)
    other = weights_of(on_meta(), seed=40)
    for source in ({n: t for n, t in other.items() if n != lost}, some):
        for given in (source, iter(source.items())):
            assert online.reload(net, given).missing == ()
            assert all_there(net, source, LINEARS)
    online.reload(net, other)
    with pytest.raises(CheckpointError, match=lost):
        online.reload(net, some)
    online.load_into(net, {"embed.weight": other["embed.weight"]}, strict=False)
    with pytest.raises(CheckpointError, match=lost):
        online.reload(net, some)
    assert all_there(net, other, LINEARS)


@pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])
@pytest.mark.parametrize("given", ["dict", "iterator"])
def test_a_second_load_of_half_a_weight_leaves_it(scheme: str, given: str) -> None:
    net = on_meta()
    tensors = weights_of(net)
    rules: dict[str, Rule] = {
        "layers.0.one.weight": Part("layers.0.up.weight", slice(0, 128)),
        "layers.0.two.weight": Part("layers.0.up.weight", slice(128, 256)),
    }
    both = {
        f"layers.0.{n}.weight": random(128, HIDDEN, seed=seed)
        for seed, n in enumerate(("one", "two"))
    }
    rest = {name: t for name, t in tensors.items() if name != "layers.0.up.weight"}
    online.load_into(net, {**rest, **both}, scheme=scheme, mapping=rules)
    half: Any = {**rest, "layers.0.one.weight": 100 * both["layers.0.one.weight"]}
    half = half if given == "dict" else iter(half.items())
    result = online.load_into(net, half, scheme=scheme, mapping=rules, strict=False)
    assert result.missing == ("layers.0.up.weight[128:256, 0:128]",)
    assert is_fp8(net, "layers.0.up", torch.cat(list(both.values())), scheme)


@pytest.mark.parametrize("scheme", ["channel", "tensor"])
def test_modules_of_one_source_change_together(scheme: str) -> None:
    """A NaN in the last of them leaves the first old, however the load's source was cut."""
    net = on_meta()
    tensors = weights_of(net)
    online.load_into(net, tensors, scheme=scheme)
    rules: dict[str, Rule] = {
        "layers.0.ups.weight": parted(
            ("layers.0.up.weight", slice(0, 256)), ("layers.1.up.weight", slice(0, 256))
        )
    }
    fused = on_meta()
    ups = torch.cat([tensors[f"layers.{n}.up.weight"] for n in (0, 1)])
    rest = {name: t for name, t in tensors.items() if not name.endswith("up.weight")}
    online.load_into(fused, {**rest, "layers.0.ups.weight": ups}, scheme=scheme, mapping=rules)
    before = states(fused)
    ups = random(512, HIDDEN, seed=70)
    ups[511, 0] = torch.inf
    with pytest.raises(ReloadError):
        online.reload(fused, {**rest, "layers.0.ups.weight": ups})
    for n in (0, 1):
        name = f"layers.{n}.up.weight"
        assert same(states(fused)[name], before[name])


def test_what_lies_in_one_storage_changes_together() -> None:
    class Seeing(nn.Module):
        def __init__(self, table: Tensor) -> None:
            super().__init__()
            self.register_buffer("table", table)

    def make() -> nn.Module:
        with torch.device("meta"):
            base = torch.empty(8)
            return nn.ModuleDict({"a": Seeing(base), "b": Seeing(base[2:])})

    model = make()
    tensors = {"a.table": torch.arange(8.0), "b.table": torch.arange(2.0, 8.0)}
    online.load_into(model, tensors)
    with pytest.raises(CheckpointError, match=r"b\.table"):
        online.reload(model, {"a.table": torch.zeros(8)})
    assert same(model.state_dict()["b.table"], tensors["b.table"])


def test_a_layer_that_is_in_two_places_is_one() -> None:
    net = on_meta()
    net.layers[1].up = net.layers[0].up
    vars(net)["all_tied_weights_keys"] = {"layers.0.up.weight": "layers.1.up.weight"}
    tensors = weights_of(net)
    online.load_into(net, tensors)
    assert is_fp8(net, "layers.0.up", tensors["layers.0.up.weight"])
    new = {name: random(*tensor.shape, seed=80) for name, tensor in tensors.items()}
    online.reload(net, new)
    assert is_fp8(net, "layers.1.up", new["layers.0.up.weight"])


def test_what_a_failed_load_or_reload_brought_is_remembered() -> None:
    """Weights of a module without its bias are refused, whatever failed before."""
    tensors, other = weights_of(on_meta()), weights_of(on_meta(), seed=40)
    lost = "layers.0.up.bias"
    some = {name: tensor for name, tensor in tensors.items() if name != lost}
    bad = {**other, "layers.1.up.weight": torch.full((256, HIDDEN), torch.nan).bfloat16()}
    net = on_meta()
    online.load_into(net, some, strict=False)
    with pytest.raises(ReloadError) as caught:
        online.reload(net, iter(bad.items()))
    assert "layers.0.up" in caught.value.new
    with pytest.raises(CheckpointError, match=lost):
        online.reload(net, some)
    with pytest.raises(WeightError):
        online.load_into(net, bad)
    online.load_into(net, {"embed.weight": tensors["embed.weight"]}, strict=False)
    with pytest.raises(CheckpointError, match=lost):
        online.reload(net, some)


def test_a_weight_keeps_its_values_where_its_bias_alone_comes() -> None:
    net = on_meta()
    tensors = weights_of(net)
    net.load_state_dict(tensors, assign=True)
    bias = {"layers.0.up.bias": random(256, seed=5)}
    online.load_into(net, iter(bias.items()), strict=False)
    assert is_fp8(net, "layers.0.up", tensors["layers.0.up.weight"])
    assert same(tensor_at(net, "layers.0.up.bias"), bias["layers.0.up.bias"])


def test_what_lies_side_by_side_in_one_storage_is_apart() -> None:
    flat = torch.zeros(2 * HIDDEN)
    model = nn.ModuleDict({name: nn.Module() for name in "ab"})
    for number, part in enumerate(flat.chunk(2)):
        model["ab"[number]].register_buffer("table", part)
    online.load_into(model, {"a.table": torch.ones(HIDDEN), "b.table": torch.ones(HIDDEN)})
    result = online.reload(model, {"a.table": torch.zeros(HIDDEN)})
    assert result.missing == ("b.table",)
    assert flat.sum() == HIDDEN


def test_an_fp8_layer_by_itself_is_reloaded() -> None:
    layer = FP8Linear(HIDDEN, 256, dtype=torch.bfloat16)
    weight = random(256, HIDDEN)
    online.load_into(layer, {"weight": weight, "bias": random(256)}, include=["weight"])
    assert (layer.dequantize() - weight.float()).norm() < 0.05 * weight.float().norm()


def test_wrappers_have_no_memory_to_read() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    tensors = {
        name: TwoTensor(t, t)  # type: ignore[no-untyped-call]
        for name, t in weights_of(on_meta()).items()
    }
    for source in (tensors, iter(tensors.items())):
        with pytest.raises(CheckpointError, match="expected a plain tensor, found TwoTensor"):
            online.load_into(on_meta(), source)


def test_what_torch_compile_made_is_the_model_itself() -> None:
    net = on_meta()
    tensors, new = weights_of(net), weights_of(net, seed=7)
    compiled: Any = torch.compile(net, backend="eager")
    online.load_into(compiled, tensors)
    assert all_there(net, tensors, LINEARS)
    online.reload(compiled, new)
    assert all_there(net, new, LINEARS)
    assert compiled(TOKENS).isfinite().all()


# What is computed, and what is large


def halves(model: Any) -> dict[str, Tensor]:
    """A checkpoint of the model for the conversion that computes."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if "q_proj" in name:
            for side, half in zip(("left", "right"), (tensor / 2).chunk(2), strict=True):
                found[name.replace("q_proj", side)] = half.contiguous()
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("given", ["dict", "iterator", "model"])
def test_what_transformers_computes(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computing(monkeypatch)
    full = causal("Llama")
    tensors, model = halves(full), skeleton_of(full)
    if given == "model":
        model = causal("Llama")
        online.quantize_model(model)
    else:
        online.load_into(model, tensors if given == "dict" else iter(tensors.items()))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert same(model.state_dict()[name], full.state_dict()[name])
    before = states(model)
    # A reload changes it with its module alone.
    new = {key: random(*tensor.shape, seed=5) for key, tensor in tensors.items()}
    spoilt = {**new, name.replace("q_proj", "k_proj"): torch.full((128, 128), torch.inf)}
    with pytest.raises(ReloadError) as caught:
        online.reload(model, iter(spoilt.items()))
    for key, tensor in states(model).items():
        assert same(tensor, before[key]) is (key.rpartition(".")[0] not in caught.value.new), key
    online.reload(model, new)
    sides = [new[name.replace("q_proj", side)] for side in ("left", "right")]
    assert same(model.state_dict()[name], 2 * torch.cat(sides))


def test_a_model_with_a_bad_weight_stays_what_it_is() -> None:
    """Nothing else has its weights: they are looked at before any of them is let go."""
    net = on_meta()
    tensors = weights_of(net)
    net.load_state_dict(tensors, assign=True)
    net.get_parameter("layers.1.down.weight").data[3, 3] = torch.nan
    before = states(net)
    with pytest.raises(WeightError, match=r"'layers\.1\.down\.weight'.*ignore=\['layers.1.down'\]"):
        online.quantize_model(net)
    assert not differing(states(net), before)
    result = online.quantize_model(net, ignore=["layers.1.down"])
    assert "layers.1.up" in result.quantized
    assert not isinstance(net.get_submodule("layers.1.down"), FP8Linear)


def test_what_is_kept_and_comes_in_parts_fits_the_budget() -> None:
    """A large tensor that goes to two places is never all in memory beside them."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(512, HIDDEN, dtype=torch.bfloat16)
            self.a = nn.Parameter(torch.empty(4096, 2048, dtype=torch.bfloat16))
            self.b = nn.Parameter(torch.empty(2048, 4096, dtype=torch.bfloat16))

    with torch.device("meta"):
        model = Wide()
    both = random(4096, 4096)
    rules: dict[str, Rule] = {
        "both": [
            Part("a", source_index=(slice(None), slice(0, 2048))),
            Part("b", source_index=(slice(None), slice(2048, None)), transpose=True),
        ]
    }
    source = {"embed.weight": random(512, HIDDEN), "both": both}
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    result = online.load_into(model, source, mapping=rules, memory_budget="4MiB")
    assert result.peak_bytes < size + 12 * MIB
    assert same(model.a.detach(), both[:, :2048].contiguous())
    assert same(model.b.detach(), both[:, 2048:].T.contiguous())
