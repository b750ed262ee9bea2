#!/usr/bin/env python3
"""Loads a 16-bit checkpoint as a live FP8 model, and lets it go on with a prompt.

No 16-bit model exists at any time: layers are quantized as they are read. The completion is printed
on stdout; what was quantized, and the memory after loading and at the peak, on stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from fp8stream import load_into
from fp8stream.errors import Fp8StreamError
from fp8stream.memory import MemoryUsage, PeakMeter, format_size


def skeleton(source: Path) -> Any:
    """The model on meta: its modules, and no storage."""
    config = transformers.AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def complete(model: Any, source: Path, prompt: str, new_tokens: int) -> str:
    """The prompt and its greedy continuation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def note(name: str, text: str) -> None:
    print(f"{name:<12} {text}", file=sys.stderr)


def run(options: argparse.Namespace) -> None:
    model = skeleton(options.source)
    before, began = MemoryUsage.now().anonymous, time.monotonic()
    with PeakMeter() as meter:
        result = load_into(
            model, options.source, scheme=options.scheme, device=options.device, strict=True
        )
        meter.sample()
    seconds = time.monotonic() - began
    size = sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    quantized = f"{len(result.quantized)} modules quantized, {len(result.kept)} tensors kept"
    note("model", f"{format_size(size)}, {quantized}")
    note("read", f"{format_size(result.bytes_read)} in {seconds:.1f} s")
    note("after load", f"{format_size(MemoryUsage.now().anonymous - before)} of host memory")
    note("at peak", f"{format_size(meter.peak.anonymous - before)} of host memory")
    device = next(model.parameters()).device
    if device.type == "cuda":
        note("device", f"{format_size(torch.cuda.max_memory_allocated(device))} at the peak")
    for warning in result.warnings:
        note("warning", warning)
    print(complete(model, options.source, options.prompt, options.max_new_tokens))


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="a checkpoint directory")
    parser.add_argument("prompt")
    parser.add_argument("--scheme", choices=("channel", "block", "tensor"), default="channel")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--max-new-tokens", type=positive, default=24)
    options = parser.parse_args()
    if not (options.source / "config.json").is_file():
        parser.error(f"{options.source}: expected a checkpoint directory, which has a config.json")
    if not options.prompt:
        parser.error("prompt: expected text to go on with, found none")
    transformers.logging.set_verbosity_error()
    try:
        run(options)
    except Fp8StreamError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
