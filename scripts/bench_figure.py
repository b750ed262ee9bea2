"""Results of `bench compare` as an SVG of bars, light or dark as the reader has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, log10
from typing import Any

Record = Mapping[str, Any]

WIDTH = 760
LEFT = 84  # of the labels
PANEL = 250  # length of the longest bar
PANELS = (LEFT, LEFT + PANEL + 92)
TOP = 96
BAR = 18
BAR_STEP = 22
GROUP_GAP = 16
# Spelled in parts: it is a name that only looks like an address.
NAMESPACE = "/".join(("http:", "", "www.w3.org", "2000", "svg"))
STYLE = """
.page { fill: #ffffff; stroke: #d0d7de } .text { fill: #1f2328 } .faint { fill: #59636e }
.axis { stroke: #d0d7de } .ours { fill: #0969da } .theirs { fill: #9aa4af }
.spread { stroke: #1f2328; stroke-width: 1.5 }
text { font: 13px -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif }
.title { font-size: 16px; font-weight: 600 } .small { font-size: 11px }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #3d444d } .text { fill: #f0f6fc } .faint { fill: #9198a1 }
.axis { stroke: #3d444d } .ours { fill: #4493f8 } .theirs { fill: #656c76 }
.spread { stroke: #f0f6fc }
}"""


@dataclass(frozen=True)
class Bar:
    """A value with its least and its most, in the panel's unit."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Line:
    """One program in one group: GB/s of source, and MB of memory over its start-up."""

    style: str
    rate: Bar
    peak: Bar


@dataclass(frozen=True)
class Group:
    """One scheme."""

    label: str
    lines: tuple[Line, ...]


def draw(results: Sequence[Record], state: str | None = None) -> str:
    """The picture of results that differ in their scheme, all in one state of the page cache."""
    groups = [_group(result, state) for result in results]
    height = TOP + sum(_height(group) for group in groups) + 64
    body = [*_head(), *_bars(groups), *_foot(results, state, height)]
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    page = f'<rect class="page" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>'
    lines = [f'<svg xmlns="{NAMESPACE}" {size}>', f"<style>{STYLE}</style>", page, *body, "</svg>"]
    return "\n".join(lines) + "\n"


def _state(result: Record, state: str | None) -> str:
    return state or str(next(iter(result["states"])))


def _group(result: Record, state: str | None) -> Group:
    rows = result["states"][_state(result, state)]["rows"]
    ours = [row for row in rows if row["name"].startswith("fp8stream")][-1]
    theirs = [row for row in rows if row["name"].startswith("model_free_ptq")]
    size = result["checkpoint"]["bytes"]
    lines = [_line("theirs", row, size) for row in theirs] + [_line("ours", ours, size)]
    return Group(result["scheme"], tuple(lines))


def _line(style: str, row: Record, size: int) -> Line:
    seconds, peak = row["summary"]["seconds"], row["summary"]["peak_bytes"]
    # The quickest run is the one with the highest rate.
    rate = Bar(*(size / 1e9 / seconds[key] for key in ("median", "most", "least")))
    return Line(style, rate, Bar(*(peak[key] / 1e6 for key in ("median", "least", "most"))))


def _height(group: Group) -> int:
    return BAR_STEP * len(group.lines) + GROUP_GAP


def _head() -> Iterator[str]:
    yield _text(20, 30, "bf16 to FP8: rate and memory", "text title")
    for x, title in zip(
        PANELS, ("GB of bf16 a second", "peak memory over start-up, MB"), strict=True
    ):
        yield _text(x, TOP - 14, title, "faint")
    for x, style, name in ((20, "ours", "fp8stream"), (110, "theirs", "model_free_ptq")):
        yield f'<rect class="{style}" x="{x}" y="43" width="12" height="12" rx="2"/>'
        yield _text(x + 18, 54, name, "text")


def _bars(groups: Sequence[Group]) -> Iterator[str]:
    lines = [line for group in groups for line in group.lines]
    rates, peaks = (_scale(bar.most for bar in bars) for bars in _columns(lines))
    y = TOP
    for group in groups:
        middle = y + BAR_STEP * len(group.lines) / 2 + 2
        yield _text(20, middle, group.label, "text")
        for line in group.lines:
            yield from _bar(PANELS[0], y, line.style, line.rate, PANEL / rates, 2)
            yield from _bar(PANELS[1], y, line.style, line.peak, PANEL / peaks, 0)
            y += BAR_STEP
        y += GROUP_GAP
    for x in PANELS:
        yield f'<line class="axis" x1="{x}" y1="{TOP - 6}" x2="{x}" y2="{y - GROUP_GAP + 4}"/>'


def _columns(lines: Sequence[Line]) -> tuple[list[Bar], list[Bar]]:
    return [line.rate for line in lines], [line.peak for line in lines]


def _scale(values: Iterator[float]) -> float:
    """The end of an axis that begins at 0: the largest value, rounded up to two digits."""
    most = max(values)
    step = 10.0 ** (ceil(log10(most)) - 2)
    return ceil(most / step) * step


def _bar(x: int, y: float, style: str, bar: Bar, per_unit: float, digits: int) -> Iterator[str]:
    length, low, high = (per_unit * value for value in (bar.median, bar.least, bar.most))
    middle = y + BAR / 2
    size = f'width="{max(1.0, length):.1f}" height="{BAR}"'
    yield f'<rect class="{style}" x="{x}" y="{y}" {size} rx="2"/>'
    yield (
        f'<line class="spread" x1="{x + low:.1f}" y1="{middle}" x2="{x + high:.1f}" y2="{middle}"/>'
    )
    yield _text(x + max(length, high) + 7, middle + 4.5, f"{bar.median:,.{digits}f}", "text")


def _foot(results: Sequence[Record], state: str | None, height: int) -> Iterator[str]:
    first = results[0]
    facts, checkpoint = first["machine"], first["checkpoint"]
    cache = _state(first, state)
    place = facts["file_system"] + ("" if cache == "memory" else f", {cache} page cache")
    peers = [result["peer"]["llmcompressor"] for result in results if result["peer"]]
    yield _text(
        20,
        height - 36,
        f"{checkpoint['model_type']}, {checkpoint['bytes'] / 1e9:.2f} GB in {checkpoint['files']} "
        f"files on {place}; {facts['cores']} cores of {facts['cpu']}; no GPU",
        "faint small",
    )
    yield _text(
        20,
        height - 18,
        f"bars: median of alternating runs, {first['runs']} of each; lines: least to most; "
        f"fp8stream {first['versions']['fp8stream']}"
        + (f", llmcompressor {peers[0]}" if peers else ""),
        "faint small",
    )


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
