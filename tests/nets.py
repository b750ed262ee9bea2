"""Small models of no library, checkpoints for them, and what their tensors should be."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fp8stream.linear import FP8Linear
from fp8stream.mapping import model_tensors
from fp8stream.scheme import Granularity
from tests import oracle
from tests.conftest import write_checkpoint
from tests.oracle import same

WIDE, HIDDEN = 256, 128


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Block(nn.Module):
    """A layer as models have them: norm, two linear layers."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, dtype=torch.bfloat16)
        self.up = nn.Linear(HIDDEN, WIDE, bias=bias, dtype=torch.bfloat16)
        self.down = nn.Linear(WIDE, HIDDEN, bias=bias, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return hidden


class Net(nn.Module):
    """A language model of any library: an embedding and layers, which `make` makes."""

    def __init__(self, make: Callable[[], nn.Module] = Block, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, HIDDEN, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(make() for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


TOKENS = torch.arange(24).view(2, 12)


def on_meta(make: Callable[[], nn.Module] = Block, layers: int = 2) -> Net:
    with torch.device("meta"):
        return Net(make, layers)


def weights_of(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random values for what the model would save, ties once."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(model_tensors(model).items()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.is_floating_point():
            found[name] = random(*tensor.shape, seed=seed + number) * 0.1
        else:
            found[name] = torch.full(tensor.shape, 3 + number, dtype=tensor.dtype)
    return found


def directory(tmp_path: Path, tensors: Mapping[str, Tensor], name: str = "source") -> Path:
    config = {"hidden_size": HIDDEN, "vocab_size": 512, "num_hidden_layers": 2}
    return write_checkpoint(tmp_path / name, tensors, shards=2, config=config)


def is_fp8(model: nn.Module, name: str, weight: Tensor, scheme: str = "channel") -> bool:
    """Whether the module holds the codes and scales that the oracle makes of `weight`."""
    module = model.get_submodule(name)
    codes, scale = oracle.quantize([weight], Granularity(scheme))
    return (
        isinstance(module, FP8Linear)
        and same(module.weight.detach(), codes)
        and same(module.weight_scale.detach(), scale)
    )


def tensor_at(model: nn.Module, name: str) -> Tensor:
    return model_tensors(model)[name].detach()


def all_there(model: nn.Module, tensors: Mapping[str, Tensor], fp8: set[str]) -> bool:
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in fp8 and leaf == "weight":
            if not is_fp8(model, module, tensor):
                return False
        elif not same(tensor_at(model, name), tensor):
            return False
    return True


LINEARS = {f"layers.{number}.{leaf}" for number in (0, 1) for leaf in ("up", "down")}
