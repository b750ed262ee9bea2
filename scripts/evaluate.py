"""Loads a checkpoint the way its users do and says what came of it.

``from_pretrained`` gets no argument that would help it. What it reports missing or unexpected, the
perplexity over scripts/text.txt and one greedy completion are printed, then the same as one line of
JSON. A checkpoint that does not load whole, or does not run, is exit code 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
import transformers
from torch import Tensor
from torch.nn import functional

TEXT = Path(__file__).with_name("text.txt")
WINDOW = 1024
KEY_COUNTS = ("missing", "unexpected", "mismatched")


def text_windows(checkpoint: Path, count: int) -> list[Tensor]:
    """The text's first ``count`` tokens in rows of ``WINDOW``, each read without the one before."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids: list[int] = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < count:
        raise SystemExit(f"{TEXT.name} has {len(ids)} tokens in this tokenizer, {count} are needed")
    windows = [ids[start : min(start + WINDOW, count)] for start in range(0, count, WINDOW)]
    return [torch.tensor([window]) for window in windows if len(window) > 1]


@torch.inference_mode()
def log_probabilities(model: Any, windows: list[Tensor]) -> Iterator[Tensor]:
    """Per window, in float32, each next token's: ``[tokens - 1, vocabulary]``."""
    for window in windows:
        logits: Tensor = model(input_ids=window.to(model.device), use_cache=False).logits
        yield logits[0, :-1].float().log_softmax(dim=-1).cpu()


def negative_log_likelihood(log_probs: Tensor, window: Tensor) -> float:
    """Summed over the tokens that a window predicts."""
    return float(functional.nll_loss(log_probs, window[0, 1:], reduction="none").double().sum())


def perplexity(model: Any, windows: list[Tensor]) -> float:
    total = sum(
        negative_log_likelihood(log_probs, window)
        for log_probs, window in zip(log_probabilities(model, windows), windows, strict=True)
    )
    return math.exp(total / sum(window.shape[1] - 1 for window in windows))


@torch.inference_mode()
def complete(model: Any, checkpoint: Path, prompt: str, new_tokens: int) -> str:
    """The prompt and its greedy continuation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def evaluate(checkpoint: Path, tokens: int, prompt: str, new_tokens: int) -> dict[str, Any]:
    result: dict[str, Any] = {"checkpoint": str(checkpoint), "tokens": tokens}
    result |= dict.fromkeys([*KEY_COUNTS, "perplexity", "completion", "error"])
    windows = text_windows(checkpoint, tokens)
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, output_loading_info=True
        )
        result |= {kind: len(loading[f"{kind}_keys"]) for kind in KEY_COUNTS}
        model.eval()
        result["perplexity"] = perplexity(model, windows)
        result["completion"] = complete(model, checkpoint, prompt, new_tokens)
    except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
        result["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="how much of the text to read")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args()
    if not (options.checkpoint / "config.json").is_file():
        parser.error(f"{options.checkpoint} is no checkpoint: it has no config.json")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    result = evaluate(options.checkpoint, options.tokens, options.prompt, options.new_tokens)
    print(f"checkpoint:  {result['checkpoint']}")
    if result["missing"] is not None:
        print("keys:        " + ", ".join(f"{result[kind]} {kind}" for kind in KEY_COUNTS))
    if result["error"] is None:
        print(f"perplexity:  {result['perplexity']:.3f} over {result['tokens']} tokens")
        print(f"completion:  {' '.join(result['completion'].split())}")
    else:
        print(f"error:       {result['error']}")
    print(json.dumps(result))
    return 1 if result["error"] or any(result[kind] for kind in KEY_COUNTS) else 0


if __name__ == "__main__":
    sys.exit(main())
