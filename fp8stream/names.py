"""Names that differ in numbers alone belong together: layers and experts are lists of like modules.

`layers.3.mlp.experts.7.up_proj.weight` has the template `layers.*.mlp.experts.*.up_proj.weight` and
the numbers 3 and 7. What a tensor is, how it is shown and how an engine is told of it is decided
once for each template. Pure, and quick among very many names.
"""

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<![^.])([0-9]{1,9})(?=\.)")


def split_numbers(name: str) -> tuple[str, list[str]]:
    """The template of `name`, with `*` for every part that is a number, and those numbers.

    A `*` that the name itself has is written `?`.
    """
    pieces = _pieces(name)
    return "*".join(pieces[::2]), pieces[1::2]


def template_and_key(name: str) -> tuple[str, str]:
    """The template of `name`, and a key that sorts `layers.2` before `layers.10`."""
    pieces = _pieces(name)
    template = "*".join(pieces[::2])
    pieces[1::2] = [number.rjust(9) for number in pieces[1::2]]
    return template, "".join(pieces)


def numbers_in(name: str) -> list[str]:
    """The parts of `name` that are numbers."""
    return _NUMBER.findall(name)


def _pieces(name: str) -> list[str]:
    """Text and numbers in turn."""
    pieces = _NUMBER.split(name)
    if "*" in name:
        pieces[::2] = [piece.replace("*", "?") for piece in pieces[::2]]
    return pieces


def spans(numbers: Iterable[str]) -> list[str]:
    """`['0-3', '5']` for 0, 1, 2, 3 and 5, in any order and however often."""
    runs: list[list[int]] = []
    for number in sorted(map(int, set(numbers))):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ["-".join(map(str, run)) for run in runs]
