"""Files planned from names and sizes alone, against the real parser."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fp8stream.layout import PAGE, OutputFile, OutputTensor, index_bytes, natural_key, pack

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
tensors = st.builds(
    OutputTensor,
    names,
    st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", "I64"]),
    st.lists(st.integers(0, 40), max_size=3).map(tuple),
)
METADATA = {"format": "pt"}


def write_zeros(file: OutputFile, directory: Path) -> Path:
    path = directory / file.name
    with path.open("wb") as stream:
        stream.write(file.header)
        stream.truncate(file.size)
    return path


@settings(max_examples=100, deadline=None)
@given(
    unique=st.lists(tensors, min_size=1, max_size=12, unique_by=lambda tensor: tensor.name),
    limit=st.integers(1, 60_000),
)
def test_the_real_parser_reads_every_layout(
    tmp_path_factory: pytest.TempPathFactory, unique: list[OutputTensor], limit: int
) -> None:
    if any(tensor.name == "__metadata__" for tensor in unique):
        return
    directory = tmp_path_factory.mktemp("layout")
    files = pack([[tensor] for tensor in unique], limit, METADATA)
    found = {}
    for file in files:
        path = write_zeros(file, directory)
        with safe_open(path, framework="np") as opened:
            assert opened.metadata() == METADATA
            for name in opened.keys():  # noqa: SIM118
                view = opened.get_slice(name)
                found[name] = view.get_dtype(), tuple(view.get_shape())
        assert file.tensors
        assert file.size <= limit or len(file.tensors) == 1
        assert len(file.header) % PAGE == 0
        for tensor, offset in zip(file.tensors, file.offsets, strict=True):
            assert offset % min(8, max(1, tensor.nbytes and itemsize(tensor))) == 0
    assert found == {tensor.name: (tensor.dtype, tensor.shape) for tensor in unique}


def itemsize(tensor: OutputTensor) -> int:
    return {"F32": 4, "BF16": 2, "I64": 8}.get(tensor.dtype, 1)


def layer(name: str, size: int) -> list[OutputTensor]:
    return [
        OutputTensor(f"{name}.weight", "F8_E4M3", (size,)),
        OutputTensor(f"{name}.weight_scale", "F32", (1,)),
    ]


def test_a_weight_and_its_scale_share_a_file() -> None:
    files = pack([layer(str(n), 10_000) for n in range(5)], 40_000, METADATA)
    assert [len(file.tensors) for file in files] == [6, 4]
    assert files[0].name == "model-00001-of-00002.safetensors"


def test_no_file_is_empty_when_the_first_tensor_is_larger_than_a_file() -> None:
    files = pack([layer("a", 90_000), layer("b", 10)], 40_000, METADATA)
    assert [file.tensors[-1].name for file in files] == ["a.weight", "b.weight"]


def test_one_file_has_the_plain_name() -> None:
    (file,) = pack([layer("a", 10)], 10**9, METADATA)
    assert file.name == "model.safetensors"


def test_the_header_stands_in_the_order_of_the_data() -> None:
    (file,) = pack([layer("a", 10), layer("b", 7)], 10**9, METADATA)
    entries = json.loads(file.header[8:])
    assert list(entries) == [
        "__metadata__",
        "a.weight_scale",
        "b.weight_scale",
        "a.weight",
        "b.weight",
    ]
    assert [e["data_offsets"] for n, e in entries.items() if n != "__metadata__"] == [
        [0, 4],
        [4, 8],
        [8, 18],
        [18, 25],
    ]


def test_the_index_counts_tensor_bytes() -> None:
    files = pack([layer(str(n), 10_000) for n in range(5)], 40_000, METADATA)
    index = json.loads(index_bytes(files))
    assert index["metadata"] == {"total_size": 5 * 10_004}
    assert index["weight_map"]["4.weight"] == "model-00002-of-00002.safetensors"
    assert list(index["weight_map"]) == sorted(index["weight_map"])


def test_numbers_sort_as_numbers() -> None:
    assert sorted(["layers.10.a", "layers.2.b", "layers.2.a"], key=natural_key) == [
        "layers.2.a",
        "layers.2.b",
        "layers.10.a",
    ]
