"""Meta, storage, meta again: on the skeleton and on any module."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fp8stream.errors import CheckpointError
from fp8stream.layerwise import Layer, build_skeleton


def layer() -> Layer:
    skeleton = build_skeleton([("a.b.weight", (4, 2), torch.bfloat16)])
    return Layer("a.b", skeleton)


def rows(count: int) -> torch.Tensor:
    return torch.zeros(count, 2, dtype=torch.bfloat16)


def test_a_skeleton_has_the_names_and_no_storage() -> None:
    skeleton = build_skeleton(
        [("a.0.weight", (4, 2), torch.float16), ("a.0.bias", (4,), torch.float32)]
    )
    found = {name: (p.shape, p.dtype, p.is_meta) for name, p in skeleton.named_parameters()}
    assert found == {
        "a.0.weight": ((4, 2), torch.float16, True),
        "a.0.bias": ((4,), torch.float32, True),
    }


@pytest.mark.parametrize("name", ["a.forward.weight", "training", "a..weight", "a.weight.weight"])
def test_a_name_that_a_module_uses_itself_is_no_trouble(name: str) -> None:
    skeleton = build_skeleton([("a.weight", (1,), torch.float32), (name, (1,), torch.float32)])
    one = Layer("a", skeleton)
    one.materialize(name, torch.ones(1))
    assert dict(skeleton.named_parameters())[name].item() == 1
    one.release()
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_released_means_freed() -> None:
    one = layer()
    storage = rows(4)
    alive = weakref.ref(storage)
    one.materialize("a.b.weight", storage)
    assert not next(one.module.parameters()).is_meta
    del storage
    one.release()
    gc.collect()
    assert alive() is None
    assert next(one.module.parameters()).is_meta
    one.finalize()


def test_a_parameter_may_come_in_runs_of_rows_in_any_order() -> None:
    one = layer()
    for first in (2, 0):
        one.materialize("a.b.weight", rows(2), first)
        one.release()
    one.finalize()


def test_rows_that_never_come_are_named() -> None:
    one = layer()
    one.materialize("a.b.weight", rows(3))
    with pytest.raises(CheckpointError, match=r"a\.b\.weight: rows \[3, 4\) missing"):
        one.finalize()


def test_rows_that_come_twice_are_refused() -> None:
    one = layer()
    one.materialize("a.b.weight", rows(3))
    with pytest.raises(CheckpointError, match=r"rows part of \[2, 4\) came before"):
        one.materialize("a.b.weight", rows(2), 2)


@pytest.mark.parametrize(
    ("key", "storage"),
    [
        ("a.b.weight", torch.zeros(4, 3, dtype=torch.bfloat16)),
        ("a.b.weight", torch.zeros(4, 2)),
        ("a.b.bias", torch.zeros(4)),
        ("a.b.weight", torch.zeros(5, 2, dtype=torch.bfloat16)),
    ],
)
def test_what_does_not_fit_is_refused(key: str, storage: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"layer a\.b"):
        layer().materialize(key, storage)


def test_any_module_will_do() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    one = Layer("model", model)
    for key, parameter in list(model.named_parameters()):
        one.materialize(key, torch.ones(parameter.shape))
    one.finalize()
    assert torch.equal(model(torch.ones(1, 2)), torch.ones(1, 3))
