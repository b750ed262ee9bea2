"""Names with their numbers taken out, and the order that people expect of them."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fp8stream.header import TensorSpec
from fp8stream.names import numbers_in, spans, split_numbers, template_and_key
from fp8stream.structure import in_order

words = st.text(st.sampled_from("abz_-*?09 é"), max_size=4)
numbers = st.integers(0, 999_999_999).map(str)
texts = words.filter(lambda word: not re.fullmatch("[0-9]{1,9}", word))
# What a name is made of, and the last part, which is never a number of a list.
parts = st.lists(st.one_of(texts, numbers), max_size=6)
last = st.one_of(words, numbers)


made = st.tuples(parts, last).map(lambda pair: ".".join([*pair[0], pair[1]]))
# Some of these have one key, and some one template.
names = st.one_of(made, st.sampled_from(["a.5.w", "a.        5.w", "a.?.w", "a.*.w"]))


def spec(name: str) -> TensorSpec:
    return TensorSpec(name, "BF16", (), "model.safetensors", 0, 2)


def key(name: str) -> str:
    return template_and_key(name)[1]


def is_number(part: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", part) is not None


@pytest.mark.parametrize(
    ("name", "template", "found"),
    [
        ("layers.3.mlp.experts.7.up.weight", "layers.*.mlp.experts.*.up.weight", ["3", "7"]),
        ("0.weight", "*.weight", ["0"]),
        ("layers.1.2.weight", "layers.*.*.weight", ["1", "2"]),
        ("layers.007.weight", "layers.*.weight", ["007"]),
        ("layers.999999999.weight", "layers.*.weight", ["999999999"]),
        # Numbers of a list are whole parts of a module's name, and not absurdly long.
        ("layers.1000000000.weight", "layers.1000000000.weight", []),
        ("fc1.norm2.weight", "fc1.norm2.weight", []),
        ("layers.2x.weight", "layers.2x.weight", []),
        ("layers.-1.weight", "layers.-1.weight", []),
        ("layers.٣.weight", "layers.٣.weight", []),
        ("layers.3", "layers.3", []),
        ("3", "3", []),
        ("", "", []),
        ("..", "..", []),
        # A star of its own is no number.
        ("layers.*.weight", "layers.?.weight", []),
        ("a*b.4.c*", "a?b.*.c?", ["4"]),
        ("*", "?", []),
    ],
)
def test_a_name_is_split_into_template_and_numbers(
    name: str, template: str, found: list[str]
) -> None:
    assert split_numbers(name) == (template, found)
    assert template_and_key(name)[0] == template
    assert numbers_in(name) == found


@given(parts=parts, last=last)
def test_the_template_has_a_star_for_every_number_and_for_nothing_else(
    parts: list[str], last: str
) -> None:
    name = ".".join([*parts, last])
    template, found = split_numbers(name)
    stars = ["*" if is_number(part) else part.replace("*", "?") for part in parts]
    assert template == ".".join([*stars, last.replace("*", "?")])
    assert found == [part for part in parts if is_number(part)]


@given(parts=parts, last=last)
def test_template_and_numbers_make_the_name_again(parts: list[str], last: str) -> None:
    name = ".".join([*parts, last])
    assume("*" not in name)
    template, found = split_numbers(name)
    left = iter(found)
    assert re.sub(r"\*", lambda _: next(left), template) == name


@given(listed=st.lists(names, unique=True, max_size=8), data=st.data())
def test_the_order_of_a_checkpoint_does_not_depend_on_that_of_its_files(
    listed: list[str], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(listed))
    one, other = ([n.name for n in in_order(map(spec, each))] for each in (listed, shuffled))
    assert one == other
    assert sorted(one) == sorted(listed)


@given(template=parts.map(lambda parts: [*parts, "weight"]), data=st.data())
def test_names_of_one_template_are_in_the_order_of_their_numbers(
    template: list[str], data: st.DataObject
) -> None:
    """The first number counts most: natural order, as that of tuples of numbers."""
    places = [at for at, part in enumerate(template) if is_number(part)]
    drawn = st.tuples(*[st.integers(0, 999_999_999) for _ in places])
    rows = data.draw(st.lists(drawn, max_size=8))

    def name(row: tuple[int, ...]) -> str:
        filled = list(template)
        for at, number in zip(places, row, strict=True):
            filled[at] = str(number)
        return ".".join(filled)

    by_key = sorted(map(name, rows), key=key)
    assert by_key == list(map(name, sorted(rows)))


def natural(name: str) -> list[tuple[int, int, str]]:
    """Part by part; a number comes before a word, and words are in the order of their letters."""
    *before, tail = name.split(".")
    keys = [(0, int(p), "") if is_number(p) else (1, 0, p) for p in before]
    return [*keys, (1, 0, tail)]


def test_names_of_a_model_are_in_natural_order() -> None:
    names = [
        f"model.{stack}.{layer}.{module}.{parameter}"
        for stack in ("layers", "layers_2", "encoder.layers", "experts")
        for layer in (1000, 0, 10, 2, 11, 1, 100, 9, 99)
        for module in ("mlp.experts.2.up", "mlp.experts.10.up", "mlp.gate", "norm")
        for parameter in ("weight", "bias")
    ]
    assert sorted(names, key=key) == sorted(names, key=natural)


def test_numbers_sort_as_numbers() -> None:
    names = ["layers.10.a", "layers.2.b", "layers.2.a"]
    assert sorted(names, key=key) == [
        "layers.2.a",
        "layers.2.b",
        "layers.10.a",
    ]


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ([], []),
        (["3"], ["3"]),
        (["2", "0", "1"], ["0-2"]),
        (["5", "0", "1", "5", "3"], ["0-1", "3", "5"]),
        (["9", "10", "11", "100"], ["9-11", "100"]),
    ],
)
def test_spans(found: list[str], shown: list[str]) -> None:
    assert spans(found) == shown


@given(values=st.sets(st.integers(0, 60)))
def test_spans_hold_every_number_once(values: set[int]) -> None:
    found: list[int] = []
    for span in spans(map(str, values)):
        first, _, final = span.partition("-")
        found += range(int(first), int(final or first) + 1)
    assert found == sorted(values)
