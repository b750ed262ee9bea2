"""What was asked for is read off an output: planned again it is the same, to the config's bytes."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8stream.checkpoint import Checkpoint, open_checkpoint
from fp8stream.errors import SchemeError
from fp8stream.header import Shard, TensorSpec
from fp8stream.layout import config_bytes
from fp8stream.plan import Plan, Resources, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.replan import expect_ours
from fp8stream.scheme import Scheme
from tests.test_declaration import ARCHS, SCHEMES, USER, archs, quantizable, schemes
from tests.test_declaration import sources as sources

RESOURCES = Resources(10**8, 1, 10**6)


def as_written(plan: Plan, source: Path) -> Checkpoint:
    """The headers of the output that `plan` would give."""
    shards = [
        Shard(
            file.name,
            file.size,
            0,
            tuple(
                TensorSpec(tensor.name, tensor.dtype, tensor.shape, file.name, at, tensor.nbytes)
                for tensor, at in zip(file.tensors, file.offsets, strict=True)
            ),
        )
        for file in plan.files
    ]
    return Checkpoint(source, source, plan.config, tuple(shards))


def assert_the_same_again(source: Path, scheme: Scheme, patterns: Patterns) -> None:
    checkpoint = open_checkpoint(source)
    plan = plan_quantization(checkpoint, scheme, patterns, RESOURCES)
    if not plan.layers_quantized:
        return  # which a run refuses
    config = config_bytes(plan.config)
    found = expect_ours(checkpoint, as_written(plan, source), config, True, None)
    assert found.problems == ()
    assert found.config == config
    assert {w.name for layer in found.layers for w in layer.weights} == {
        w.name for tensor in plan.tensors for w in tensor.weights
    }
    assert {spec.name for spec, _ in found.kept} == {
        tensor.spec.name for tensor in plan.tensors if not tensor.weights
    }


@schemes
@archs
@pytest.mark.parametrize("ignore", [[], *USER.values()], ids=["nothing", *USER])
def test_what_a_user_keeps(
    sources: Mapping[str, Path],
    name: str,
    scheme: Scheme,
    ignore: list[str],
) -> None:
    try:
        assert_the_same_again(sources[name], scheme, Patterns(tuple(ignore)))
    except SchemeError as error:
        assert "matches nothing" in str(error)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_choice_of_layers(
    sources: Mapping[str, Path],
    data: st.DataObject,
) -> None:
    name = data.draw(st.sampled_from(sorted(ARCHS)))
    choices = st.sampled_from([n for n in quantizable(ARCHS[name]) if not n.startswith("mtp.")])
    ignore = data.draw(st.lists(choices, max_size=8, unique=True))
    include = data.draw(st.lists(choices, max_size=4, unique=True))
    scheme = data.draw(st.sampled_from(SCHEMES))
    try:
        assert_the_same_again(sources[name], scheme, Patterns(tuple(ignore), tuple(include)))
    except SchemeError as error:
        assert "--include" in str(error) or "cannot say" in str(error)
