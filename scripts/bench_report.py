"""What `bench` prints, for people: everything is in the JSON too, and nothing is decided here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench_contest import (
    Record,
    Spread,
    State,
    count,
)
from bench_measure import (
    cores,
)
from make_layers import GB

# Fewer runs than these tell a median and no spread.
FEWEST_RUNS = 5
# Of all cores' time: beyond this others disturb the figures enough to say so.
DISTURBED = 0.05


def print_header(document: Record) -> None:
    facts, checkpoint = document["machine"], document["checkpoint"]
    found = document["versions"] | {
        f"peer's {k}": v for k, v in (document.get("peer") or {}).items()
    }
    changed = " (changed)" if facts["commit_is_changed"] else ""
    print(
        f"checkpoint  {checkpoint['name']}: {checkpoint['model_type']}, "
        f"{checkpoint['bytes'] / GB:.3f} GB in {count(checkpoint['files'], 'file')}\n"
        f"machine     {facts['cpu']}, {count(facts['cores'], 'core')}, "
        f"{facts['memory_bytes'] / GB:.0f} GB, Linux {facts['kernel']}, {facts['file_system']}\n"
        f"versions    {', '.join(f'{k} {v}' for k, v in found.items())}, "
        f"Python {facts['python']}, commit {(facts['commit'] or 'none')[:12]}{changed}\n"
        f"figures     median (least-most) of {count(document['runs'], 'alternating run')}"
    )
    if document["runs"] < FEWEST_RUNS:
        print(f"            too few to tell anything: {FEWEST_RUNS} at least")


def print_state(state: State, rows: Sequence[Record], limits: Sequence[Record]) -> None:
    print(f"\n{state}")
    print_rows(rows)
    for limit in limits:
        print_limits(limit, state)
    print_stages(rows)
    print_ratios(rows)
    print_disturbance(rows)


def spread(row: Record, key: str, unit: float = 1.0) -> Spread:
    found = row["summary"][key]
    return Spread(*(found[part] / unit for part in ("median", "least", "most")))


def print_rows(rows: Sequence[Record]) -> None:
    """A line a contestant, of a comparison or a sweep."""
    cached = [spread(row, "cached_before") for row in rows]
    least, most = min(c.least for c in cached), max(c.most for c in cached)
    print(f"before each run {least:.1%} to {most:.1%} of the source was in memory")
    lines = [
        [
            "",
            "GB",
            "seconds",
            "GB/s",
            "process s",
            "CPU s",
            "peak MB",
            "planned",
            "start-up MB",
            "resident MB",
        ]
    ]
    for row in rows:
        planned = row.get("planned_peak_bytes")
        lines.append(
            [
                row["name"],
                f"{row['source_bytes'] / GB:.2f}",
                f"{spread(row, 'seconds'):.2f}",
                f"{row['gb_per_second']:.2f}",
                f"{spread(row, 'wall_seconds'):.2f}",
                f"{spread(row, 'cpu_seconds').median:.2f}",
                f"{spread(row, 'peak_bytes', 1e6):.0f}",
                "" if planned is None else f"{planned / 1e6:.0f}",
                f"{spread(row, 'baseline_bytes', 1e6).median:.0f}",
                f"{spread(row, 'resident_peak_bytes', 1e6).median:.0f}",
            ]
        )
    print_table(lines)


def print_table(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def print_limits(limit: Record, state: State) -> None:
    """The limit, what it is made of, and what that comes from."""
    job, kinds = limit["job"], limit["kinds"]
    sizes = {
        "read": job["source"],
        "write": sum(limit["output_sizes"]),
        "turns": job["source"] + sum(limit["output_sizes"]),
        "copy": job["kept"],
        "cast": 2 * job["elements"],
    }
    terms = (" + " if state == "memory" else ", ").join(
        f"{term} {seconds:.2f}" for term, seconds in limit["terms"].items()
    )
    print(
        f"limit, {count(limit['threads'], 'thread')}: {limit['seconds']:.2f} s ({terms}), "
        f"{limit['binding']} binds; fp8stream reaches {limit['share']:.0%} of it"
    )
    if state == "cold":
        print(
            "  reading and writing by turns, without arithmetic, is a limit too: "
            f"{limit['share_of_turns']:.0%} of that"
        )
    for kind, size in sizes.items():
        wall, cpu = (Spread(**kinds[kind][clock]) for clock in ("wall", "cpu"))
        rate = size / GB / wall.median if wall.median else 0.0
        print(
            f"  {kind:<6} {size / GB:.2f} GB in {wall:.2f} s, {cpu.median:.2f} CPU s, "
            f"{rate:.2f} GB/s"
        )


def print_stages(rows: Sequence[Record]) -> None:
    """Thread-seconds of each stage, as fp8stream counts them itself."""
    for row in rows:
        stages = row["runs"][0].get("stages", {})
        parts = [
            f"{stage} {spread(row, f'stages.{stage}.busy').median:.2f}"
            f"+{spread(row, f'stages.{stage}.blocked').median:.2f}"
            for stage in stages
        ]
        if parts:
            print(f"{row['name']}, seconds busy+blocked, of all threads: {', '.join(parts)}")


def print_ratios(rows: Sequence[Record]) -> None:
    ours = [row for row in rows if row["name"].startswith("fp8stream")]
    theirs = [row for row in rows if row not in ours]
    best = ours[-1]
    if len(ours) > 1:
        ratio = spread(ours[0], "seconds").median / spread(best, "seconds").median
        print(f"{count(best['threads'], 'thread')} over 1: {ratio:.2f} times as fast")
    for other in theirs:
        seconds, wall, peak = (
            spread(other, key).median / max(1e-9, spread(best, key).median)
            for key in ("seconds", "wall_seconds", "peak_bytes")
        )
        print(
            f"{other['name']} over {best['name']}: {seconds:.1f} times the seconds, {wall:.1f} "
            f"times with start-up, {peak:.0f} times the peak"
        )


def print_disturbance(rows: Sequence[Record]) -> None:
    """Says so where others had a share of the machine that is not theirs to have."""
    for row in rows:
        capacity = cores() * spread(row, "wall_seconds").median
        for key, what in (("others_cpu_seconds", "other programs"), ("stolen_seconds", "the host")):
            share = spread(row, key).median / capacity
            if share > DISTURBED:
                print(f"{row['name']}: disturbed: {what} took {share:.0%} of all cores' time")


def print_sweep(document: Record) -> None:
    print_header(document)
    turns = "in turns" if document["alternating"] else "one after another: too little room for all"
    print(f"            over {document['over']}, values {turns}; {document['state']}\n")
    print_rows(document["rows"])
    print_disturbance(document["rows"])


def print_cgroup(rows: Sequence[Record], in_memory: bool) -> None:
    if in_memory:
        print("the files lie in memory: they cannot leave it, and are all charged to a bound")
    print_rows(rows)
    for row in rows:
        source, output = (spread(row, f"{k}_cached_after").median for k in ("source", "output"))
        line = f"{row['name']}: in memory after it {source:.1%} of the source"
        line += f" and {output:.1%} of the output"
        if "cgroup_peak_bytes" in row["summary"]:
            line += f"; charged at most {spread(row, 'cgroup_peak_bytes', 1e6):.0f} MB"
        print(line)
    if len(rows) > 1:
        free, bound = (spread(row, "seconds").median for row in rows)
        print(f"bound over free: {bound / free:.2f} times the seconds")
    print_disturbance(rows)


def print_startup(rows: Sequence[Record]) -> None:
    lines = [["", "seconds"]]
    for row in rows:
        lines.append([row["name"], f"{spread(row, 'wall_seconds'):.3f}"])
        if "first_byte_seconds" in row["summary"]:
            lines.append(["  to the first byte", f"{spread(row, 'first_byte_seconds'):.3f}"])
    print_table(lines)


def print_table_of(documents: Sequence[Record]) -> None:
    """What `--save` kept, as one table in Markdown: a line a contestant, its command beside it."""
    print("| | what | seconds | GB/s | peak MB | planned MB | made by |")
    print("|---|---|---|---|---|---|---|")
    for document in documents:
        states = document.get("states", {document.get("state", ""): document})
        for state, found in states.items():
            for row in found["rows"]:
                print(_markdown(document, state, row))
            for limit in found.get("limits", ()):
                print(_markdown_limit(document, state, limit))


def _markdown(document: Record, state: str, row: Record) -> str:
    planned = row.get("planned_peak_bytes")
    seconds = "seconds" if "seconds" in row["summary"] else "wall_seconds"
    cells = [
        f"{document['bench']} {state}".strip(),
        row["name"],
        f"{spread(row, seconds):.2f}",
        f"{row['gb_per_second']:.2f}" if "gb_per_second" in row else "",
        f"{spread(row, 'peak_bytes', 1e6).median:.0f}" if "peak_bytes" in row["summary"] else "",
        "" if planned is None else f"{planned / 1e6:.0f}",
        f"`{_shown(document)}`",
    ]
    return f"| {' | '.join(cells)} |"


def _markdown_limit(document: Record, state: str, limit: Record) -> str:
    what = f"limit of {count(limit['threads'], 'thread')}: {limit['share']:.0%} reached, "
    what += f"{limit['binding']} binds"
    head = f"{document['bench']} {state}"
    return f"| {head} | {what} | {limit['seconds']:.2f} | | | | `{_shown(document)}` |"


def _shown(document: Record) -> str:
    """The command, without where its result was kept."""
    return re.sub(r" --(save|keep)( \S+\.json)?", "", str(document["command"]))
