"""How ranks of tensor parallelism work together in a forward.

Layers that have part of a sum add up, and layers that have some of the outputs give them to all, as
transformers' own do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fp8stream.errors import SchemeError
from fp8stream.fused_experts import FP8Experts, describe_experts
from fp8stream.linear import FP8Linear


@dataclass(frozen=True)
class Group:
    """This rank among `size` ranks, which are the processes of torch.distributed.

    Raises SchemeError where those are not there, or not as many.
    """

    rank: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SchemeError(f"tp_size {self.size}: expected 1 or more")
        if not 0 <= self.rank < self.size:
            raise SchemeError(f"tp_rank {self.rank}: expected one of 0 to {self.size - 1}")

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over all ranks, on each."""
        self._check()
        total = partial.contiguous()
        dist.all_reduce(total)
        return total

    def largest(self, values: Tensor) -> Tensor:
        """The largest of any rank, element by element, on each."""
        self._check()
        most = values.contiguous()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, one after another along the last side."""
        self._check()
        mine = part.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts, -1)

    def _check(self) -> None:
        there = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
        if there != self.size:
            raise SchemeError(
                f"rank {self.rank} of {self.size}: a forward takes all ranks together: expected "
                f"{self.size} processes of torch.distributed, found {there}; start with torchrun "
                "and call torch.distributed.init_process_group first"
            )


def sum_linear(group: Group, module: nn.Module) -> None:
    if isinstance(module, FP8Linear):
        module.ranks = group
    elif isinstance(module, nn.Linear):
        _around(module, partial(_linear_of_rows, group, module))


def _linear_of_rows(group: Group, linear: nn.Linear, _: Any, x: Tensor) -> Tensor:
    total = group.sum(functional.linear(x, linear.weight))
    return total if linear.bias is None else total + linear.bias


def gather_outputs(group: Group, module: nn.Module) -> None:
    _around(module, partial(_gathered, group))


def _gathered(group: Group, forward: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
    return group.gather(forward(*args, **more))


def sum_outputs(group: Group, module: nn.Module) -> None:
    _around(module, partial(_summed, group))


def _summed(group: Group, forward: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
    return group.sum(forward(*args, **more))


def split_inputs(group: Group, module: nn.Module) -> None:
    _around(module, partial(_of_own_inputs, group))


def _of_own_inputs(group: Group, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x.chunk(group.size, -1)[group.rank])


def look_up_rows(group: Group, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        # Only the gradient needs it, and it may be another rank's row.
        module.padding_idx = None
        _around(module, partial(_of_own_rows, group, module.weight.shape[0]))


def _of_own_rows(
    group: Group, rows: int, forward: Callable[[Tensor], Tensor], ids: Tensor
) -> Tensor:
    local = ids - group.rank * rows
    others = (local < 0) | (local >= rows)
    found = forward(local.masked_fill(others, 0))
    return group.sum(found.masked_fill(others[..., None], 0.0))


def sum_experts(group: Group, module: nn.Module) -> None:
    """For experts in 16 bit those of other ranks are masked as transformers does it itself."""
    if isinstance(module, FP8Experts):
        held: Tensor = getattr(module, module.form.weights[0])
        module.ranks, module.num_experts = group, held.shape[0]
        if held.shape[0] != module.form.experts:
            module.first_expert = group.rank * held.shape[0]
        return
    form = describe_experts(module)
    assert form is not None
    module.num_experts = form.experts  # type: ignore[assignment]
    module._is_expert_parallel = True  # type: ignore[assignment]
    _around(module, partial(_of_own_experts, group, form.experts))


def _of_own_experts(
    group: Group, held: int, forward: Callable[..., Tensor], x: Tensor, index: Tensor, by: Tensor
) -> Tensor:
    local = index - group.rank * held
    others = (local < 0) | (local >= held)
    return group.sum(forward(x, local.masked_fill(others, held), by.masked_fill(others, 0.0)))


def _around(module: nn.Module, new: Callable[..., Tensor]) -> None:
    """Puts `new`, which is given the forward that it replaces, in its place; hooks stay."""
    module.forward = partial(new, module.forward)
