"""Checkpoints of every shape, made on the spot: no network, no fixtures on disk."""

import json
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import save_file

from fp8stream import cli
from fp8stream.layout import OutputFile
from fp8stream.output import OutputDirectory
from fp8stream.plan import Written
from fp8stream.writer import CheckpointWriter

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
Tensors = dict[str, torch.Tensor]
# After which a test that may hang has failed.
SECONDS = 20


def llama_tensors(
    hidden: int = 128,
    inter: int = 256,
    layers: int = 2,
    kv: int = 128,
    vocab: int = 96,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    seed: int = 0,
) -> Tensors:
    """Every tensor of a small llama, random."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden)}
    for number in range(layers):
        at = f"model.layers.{number}"
        tensors |= {
            f"{at}.self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{at}.self_attn.k_proj.weight": matrix(kv, hidden),
            f"{at}.self_attn.v_proj.weight": matrix(kv, hidden),
            f"{at}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{at}.mlp.gate_proj.weight": matrix(inter, hidden),
            f"{at}.mlp.up_proj.weight": matrix(inter, hidden),
            f"{at}.mlp.down_proj.weight": matrix(hidden, inter),
            f"{at}.input_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{at}.post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
        }
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    return tensors


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    index: bool | None = None,
    order: Sequence[int] | None = None,
) -> Path:
    """`tensors` as a checkpoint of `shards` files, dealt round so that layers span files.

    `order` permutes the files; an index is written for several files unless `index` says no.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or _config(tensors), indent=2))
    weight_map: dict[str, str] = {}
    order = order or range(shards)
    for number, file in enumerate(order):
        name = f"model-{file + 1:05d}-of-{shards:05d}.safetensors"
        name = "model.safetensors" if shards == 1 else name
        part = {key: tensors[key] for key in list(tensors)[number::shards]}
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if shards > 1 if index is None else index:
        document = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(document))
    return directory


def _config(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    numbers = [int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")]
    return {**LLAMA, "num_hidden_layers": max(numbers, default=-1) + 1}


@contextmanager
def open_writer(
    output: Path, files: Sequence[OutputFile], there: Iterable[Written] = ()
) -> Iterator[CheckpointWriter]:
    """A writer of `files`, in a directory that will be `output`."""
    with OutputDirectory(output, {}) as directory, CheckpointWriter(directory, files, there) as w:
        yield w


def small_tensors() -> Tensors:
    """A llama of one layer, for tests that look at names and files."""
    return llama_tensors(hidden=64, inter=128, layers=1, kv=64, vocab=32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A good checkpoint of two files, with an index and a side file."""
    directory = write_checkpoint(tmp_path / "source", small_tensors(), shards=2)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def alarm() -> Iterator[None]:
    """Fails a test that hangs, as one that opens a FIFO would."""

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        pytest.fail("took too long")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small llama of two files, with side files."""
    directory = write_checkpoint(tmp_path / "llama", llama_tensors(), shards=2)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("# a model\n")
    return directory


class Run:
    """What one run of the command line did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit {self.code}\nstdout: {self.out}\nstderr: {self.err}"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs `fp8stream ARGUMENTS` in this process."""

    def call(*arguments: object) -> Run:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Run(code, *capsys.readouterr())

    return call


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live model's storage begins as NaN: what nothing is written to shows."""
    from fp8stream import initialization, skeleton

    fresh = skeleton.storage

    def spoil(like: torch.Tensor, device: torch.device) -> torch.Tensor:
        tensor = fresh(like, device)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
        elif tensor.is_floating_point():
            tensor.fill_(torch.nan)
        elif tensor.dtype != torch.bool:
            tensor.fill_(-1)
        return tensor

    for module in (skeleton, initialization):
        monkeypatch.setattr(module, "storage", spoil)
