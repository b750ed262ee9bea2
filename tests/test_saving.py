"""A live model saved is the converter's output, and an output loaded is the live model."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8stream import cli
from fp8stream.errors import BudgetError, SchemeError
from fp8stream.mapping import model_tensors
from fp8stream.online import load_into
from fp8stream.saving import save
from tests.oracle import same
from tests.tiny import CONFIGS, automatic

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

# Those that the converter and `save` both write.
WRITTEN = [kind for kind in CONFIGS if kind not in ("gpt_oss", "gpt2")]
schemes = pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])


def build(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind.removesuffix("-tied"), **CONFIGS[kind])
    return automatic(kind).from_config(config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random checkpoint of each kind, as transformers saves it."""

    @cache
    def made(kind: str) -> Path:
        torch.manual_seed(0)
        model = build(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
            for module in model.modules():
                if hasattr(module, "e_score_correction_bias"):
                    # As DeepSeek has it, and transformers keeps it.
                    module.e_score_correction_bias.data = torch.randn(4)
        directory = tmp_path_factory.mktemp(kind)
        model.save_pretrained(directory)
        return directory

    return made


def live(kind: str, source: Any, **options: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = build(kind)
    load_into(model, source, **options)
    return model


def contents(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []


@pytest.mark.parametrize("kind", WRITTEN)
@schemes
def test_what_is_saved_is_what_the_converter_writes_and_loads_as_it_was(
    tmp_path: Path, source_of: Callable[[str], Path], kind: str, scheme: str
) -> None:
    source = source_of(kind)
    model = live(kind, source, scheme=scheme)
    save(model, tmp_path / "saved")
    arguments = ["quantize", str(source), str(tmp_path / "converted"), "--scheme", scheme, "-q"]
    assert cli.main(arguments) == 0
    assert_same(contents(tmp_path / "saved"), contents(tmp_path / "converted"))
    again = live(kind, tmp_path / "converted")
    assert_same(model_tensors(again), model_tensors(model))


@schemes
def test_experts_one_by_one_are_loaded_as_fused_ones(
    source_of: Callable[[str], Path], scheme: str
) -> None:
    """The form in which engines, and so the converter, have those of Llama-4."""
    fused = contents(source_of("llama4"))
    apart: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        module, _, leaf = name.rpartition(".")
        cut = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf, ())
        for expert, matrix in enumerate(tensor.mT if cut else ()):
            for part, one in zip(cut, matrix.chunk(len(cut)), strict=True):
                apart[f"{module}.{expert}.{part}.weight"] = one.contiguous()
        if not cut:
            apart[name] = tensor
    assert len(apart) == len(fused) - 2 * 2 + 2 * 4 * 3
    wanted = model_tensors(live("llama4", source_of("llama4"), scheme=scheme))
    assert_same(model_tensors(live("llama4", apart, scheme=scheme)), wanted)


def test_what_is_not_fp8_is_not_saved_as_such(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="nothing of the model is FP8"):
        save(nn.Linear(4, 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_that_no_engine_loads_are_refused_and_saved_if_they_were_kept(
    tmp_path: Path, source_of: Callable[[str], Path]
) -> None:
    source = source_of("gpt_oss")
    with pytest.raises(SchemeError) as refusal:
        save(live("gpt_oss", source), tmp_path / "no")
    assert str(refusal.value) == (
        "save: model.layers.0.mlp.experts.down_proj is FP8 in the model, and in a checkpoint it "
        'cannot be: no engine loads these experts in FP8; load the model with experts="keep"'
    )
    assert not (tmp_path / "no").exists()
    model = live("gpt_oss", source, experts="keep")
    save(model, tmp_path / "saved")
    assert cli.main(["quantize", str(source), str(tmp_path / "converted"), "-q"]) == 0
    assert_same(contents(tmp_path / "saved"), contents(tmp_path / "converted"))
    assert_same(model_tensors(live("gpt_oss", tmp_path / "saved")), model_tensors(model))


# In a checkpoint q, k and v are one weight, and up and gate, of 192 rows each, are another.
GTE: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


@schemes
def test_scales_that_a_checkpoint_cannot_hold_are_refused(tmp_path: Path, scheme: str) -> None:
    config = transformers.AutoConfig.for_model("gte", **GTE)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "source")
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
    load_into(model, tmp_path / "source", scheme=scheme)
    scales = [t for n, t in model_tensors(model).items() if n.endswith("weight_scale")]
    assert len(scales) == 7
    for number, scale in enumerate(scales):
        scale.data.fill_(number + 1)
    if scheme == "channel":
        save(model, tmp_path / "out")
        return
    with pytest.raises(SchemeError, match=r"(qkv|up_gate)_proj\.weight: rows that have scales of"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for scale in scales:
        scale.data.fill_(1)
    save(model, tmp_path / "out")


class Fresh(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The sizes in bytes of all that is made anew."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        old = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        new = [t for t in tree_leaves(made) if isinstance(t, Tensor) and not t.is_meta]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new}
        self.sizes += [size for pointer, size in sizes.items() if pointer not in old]
        return made


@pytest.mark.parametrize("experts", ["auto", "keep"])
@schemes
def test_experts_are_moved_once_not_once_for_each_of_their_matrices(
    tmp_path: Path,
    source_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    experts: str,
    scheme: str,
) -> None:
    """On a CPU that copies what is moved to it, as a GPU would."""
    model = live("mixtral", source_of("mixtral"), scheme=scheme, experts=experts)
    stacked = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").nbytes
    held = sum(tensor.nbytes for tensor in model_tensors(model).values())
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: tensor.clone())
    with Fresh() as fresh:
        save(model, tmp_path / "saved")
    assert max(fresh.sizes) < stacked
    # Picked, moved, and put together: with the numbers of rows three times the model or so.
    assert sum(fresh.sizes) < 5 * held


def test_what_torch_wrapped_is_saved_as_what_it_wraps(
    tmp_path: Path, source_of: Callable[[str], Path]
) -> None:
    model = live("llama", source_of("llama"))
    save(model, tmp_path / "bare")
    compiled: Any = torch.compile(model, backend="eager")
    for number, wrapped in enumerate((compiled, nn.DataParallel(model), nn.DataParallel(compiled))):
        save(wrapped, tmp_path / str(number))
        assert_same(contents(tmp_path / str(number)), contents(tmp_path / "bare"))
    model.compile(backend="eager")
    save(model, tmp_path / "in place")
    assert_same(contents(tmp_path / "in place"), contents(tmp_path / "bare"))


def test_a_part_that_was_compiled_by_itself_is_refused(
    tmp_path: Path, source_of: Callable[[str], Path]
) -> None:
    model: Any = live("llama", source_of("llama"))
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with pytest.raises(
        SchemeError, match=r"save: model\.layers\.1 is wrapped in a OptimizedModule"
    ):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_default_device_and_dtype_change_nothing(
    tmp_path: Path, source_of: Callable[[str], Path]
) -> None:
    model = live("mixtral", source_of("mixtral"), scheme="block")
    save(model, tmp_path / "bare")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            save(model, tmp_path / "other")
    finally:
        torch.set_default_dtype(before)
    assert_same(contents(tmp_path / "other"), contents(tmp_path / "bare"))


@pytest.mark.parametrize("size", ["lots", "", 0, -1])
def test_what_is_no_shard_size_is_refused(tmp_path: Path, size: str | int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.ModuleList([nn.Linear(128, 128, bias=False)]))
    load_into(model, {"0.0.weight": torch.ones(128, 128)}, device="cpu")
    with pytest.raises(BudgetError, match="max_shard_size: expected bytes or a size as '1GiB'"):
        save(model, tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


class Reading(nn.Module):
    """Attention that reads the weight of one of three layers which engines put together."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(128, 128, bias=False) for _ in "qkv")

    def forward(self, x: Tensor) -> Tensor:
        return self.k_proj(self.v_proj(x @ self.q_proj.weight))  # type: ignore[no-any-return]


def test_what_is_kept_of_a_fused_set_keeps_the_rest_of_it_with_ignore(tmp_path: Path) -> None:
    def reading() -> nn.Module:
        with torch.device("meta"):
            return nn.ModuleDict({"layers": nn.ModuleList([Reading(), nn.Linear(128, 128)])})

    weights = {name: torch.ones(tensor.shape) for name, tensor in reading().state_dict().items()}
    model = reading()
    quantized = load_into(model, weights, device="cpu").quantized
    assert quantized == ("layers.0.k_proj", "layers.0.v_proj", "layers.1")
    found = r"save: layers\.0\.k_proj\.weight: the model has channel scales, and a checkpoint that "
    way = r'engines load has no; load the model with ignore=\["layers\.0\.k_proj\.weight"\]'
    with pytest.raises(SchemeError, match=found + way):
        save(model, tmp_path / "out")
    model = reading()
    load_into(model, weights, ignore=["layers.0.k_proj.weight"], device="cpu")
    save(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["layers.1.weight_scale"].numel() == 128
