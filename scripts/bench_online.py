#!/usr/bin/env python3
"""Measures what loading a checkpoint into a live model takes, from outside.

A process of its own loads; this one reads its /proc/PID/status every few milliseconds. What counts
is RssAnon + RssShmem, less the level after imports and after the skeleton was made, over the size
of the finished model's tensors. The same is said of transformers' own `from_pretrained`.

A line for each, then the same as one line of JSON. Exit code 1: fp8stream took over the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 1.10
WAYS = ("channel", "block", "tensor", "transformers")


def resident(pid: int) -> int:
    """Bytes of RssAnon + RssShmem of a process."""
    found = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            found += int(line.split()[1]) * 1024
    return found


def measure(source: Path, way: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(source), "--child", way]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise SystemExit(f"{way}: the process that loads failed")
        before = peak = resident(child.pid)
        began = time.monotonic()
        child.stdin.write("go\n")
        child.stdin.flush()
        os.set_blocking(child.stdout.fileno(), False)
        while not (line := child.stdout.readline()):
            if child.poll() is not None:
                raise SystemExit(f"{way}: the process that loads failed")
            peak = max(peak, resident(child.pid))
            time.sleep(0.002)
        seconds, after = time.monotonic() - began, resident(child.pid)
        child.stdin.close()
    size = int(line)
    return {
        "way": way,
        "model_bytes": size,
        "peak_bytes": peak - before,
        "after_bytes": after - before,
        "peak_over_model": (peak - before) / size,
        "seconds": seconds,
    }


def load(source: Path, way: str) -> None:
    """The process that loads: says when it is ready, waits, and says how large the model is."""
    import torch
    import transformers

    from fp8stream import load_into

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(source)
    kind = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.bfloat16)
    print("ready", flush=True)
    sys.stdin.readline()
    if way == "transformers":
        model = kind.from_pretrained(source, dtype=torch.bfloat16)
    else:
        load_into(model, source, scheme=way, device="cpu")
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    print(sum(tensors.values()), flush=True)
    sys.stdin.readline()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, nargs="+", help="checkpoint directories")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        load(options.source[0], options.child)
        return 0
    rows = []
    for source in options.source:
        for way in options.ways:
            row = {"source": source.name, **measure(source, way)}
            rows.append(row)
            print(
                f"{source.name:16} {way:12} model {row['model_bytes'] / 1e9:6.3f} GB   peak "
                f"{row['peak_bytes'] / 1e9:6.3f} GB   {row['peak_over_model']:.3f} of the model   "
                f"{row['seconds']:6.1f} s",
                flush=True,
            )
    print(json.dumps(rows))
    ours = [row["peak_over_model"] for row in rows if row["way"] != "transformers"]
    return int(any(ratio > LIMIT for ratio in ours))


if __name__ == "__main__":
    sys.exit(main())
