"""Measures what quantization costs a model, next to what compressed-tensors' own costs it.

Every output's weights are dequantized from its safetensors files and put into a float32 copy of the
source model, so that nothing but the weights differs and layouts that no CPU kernel runs (ragged
blocks) are measured too. compressed-tensors quantizes the same layers at the same granularities.
Mean KL divergence of the next-token distribution tells more than perplexity, whose ratio is noise
around a small effect.

The table is followed by one line of JSON. Exit code 1: an output is over a limit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from evaluate import log_probabilities, negative_log_likelihood, text_windows
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

BLOCK = 128
PRESETS = {"tensor": "FP8", "channel": "FP8_DYNAMIC", "block": "FP8_BLOCK"}
PERPLEXITY_LIMIT = 1.03
KL_LIMIT = 1.15
SCALE_SUFFIXES = (".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True)
class Distance:
    """How far a model's next-token distributions are from the source's."""

    perplexity: float
    kl: float


@dataclass(frozen=True)
class Row:
    output: str
    scheme: str
    format: str
    layers: dict[str, int]
    perplexity: float
    perplexity_ratio: float
    kl: float
    peer_perplexity: float
    peer_kl: float
    kl_ratio: float

    @property
    def passes(self) -> bool:
        return self.perplexity_ratio <= PERPLEXITY_LIMIT and self.kl_ratio <= KL_LIMIT


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint; an index, where there is one, names the shards."""
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [checkpoint / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(checkpoint.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return tensors


def granularity(weight_scale: Tensor, shape: torch.Size) -> str:
    """Which of the three a scale's shape says it is."""
    if weight_scale.numel() == 1 and weight_scale.ndim < 2:
        return "tensor"
    if weight_scale.shape == (shape[0], 1):
        return "channel"
    if weight_scale.shape == (math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK)):
        return "block"
    raise ValueError(f"no granularity has scales {list(weight_scale.shape)} for {list(shape)}")


def expand(weight_scale: Tensor, shape: torch.Size) -> Tensor:
    """One scale per element, or what broadcasts to it; ragged edges are cut off."""
    if granularity(weight_scale, shape) != "block":
        return weight_scale
    rows = weight_scale.repeat_interleave(BLOCK, dim=0)[: shape[0]]
    return rows.repeat_interleave(BLOCK, dim=1)[:, : shape[1]]


def dequantized(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict in float32, and the granularity of every weight that was quantized."""
    state: dict[str, Tensor] = {}
    granularities: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE_SUFFIXES):
            continue
        base = name.removesuffix(".weight")
        scales = [tensors[base + suffix] for suffix in SCALE_SUFFIXES if base + suffix in tensors]
        if (tensor.dtype == torch.float8_e4m3fn) != (len(scales) == 1):
            raise ValueError(f"{name} is {tensor.dtype} and has {len(scales)} scales")
        state[name] = tensor.float()
        if scales:
            weight_scale = scales[0].float()
            granularities[name] = granularity(weight_scale, tensor.shape)
            state[name] *= expand(weight_scale, tensor.shape)
    return state, granularities


def least_and_greatest(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Per group of one scale. Zeros pad the edges of blocks and leave both as they are."""
    if scheme == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if scheme == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    rows, columns = weight.shape
    padded = functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def peer_round_trip(weight: Tensor, scheme: str) -> Tensor:
    """A weight after compressed-tensors' preset and back, in the source's dtype as it works."""
    args = preset_name_to_scheme(PRESETS[scheme], ["Linear"]).weights
    weight_scale, zero_point = calculate_qparams(*least_and_greatest(weight, scheme), args)
    codes = quantize(weight, weight_scale, zero_point, args, dtype=torch.float8_e4m3fn)
    back: Tensor = dequantize(codes, weight_scale, args=args)
    return back.float()


def put(model: Any, state: Mapping[str, Tensor]) -> None:
    """Overwrites every parameter; only a tied one may be left out of the state dict."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    untied = set(missing) - set(model.all_tied_weights_keys)
    if untied or unexpected:
        raise ValueError(f"missing {sorted(untied)[:3]}, unexpected {sorted(unexpected)[:3]}")


@dataclass(frozen=True)
class Bench:
    """The float32 model, the text, and what the source makes of it."""

    model: Any
    source: dict[str, Tensor]
    windows: list[Tensor]
    reference: list[Tensor]
    perplexity: float

    def measure(self, state: Mapping[str, Tensor]) -> Distance:
        put(self.model, state)
        likelihood = divergence = 0.0
        rows = zip(
            log_probabilities(self.model, self.windows), self.reference, self.windows, strict=True
        )
        for log_probs, reference, window in rows:
            likelihood += negative_log_likelihood(log_probs, window)
            divergence += float(
                functional.kl_div(log_probs, reference, reduction="none", log_target=True)
                .sum(-1)
                .double()
                .sum()
            )
        count = predicted(self.windows)
        return Distance(math.exp(likelihood / count), divergence / count)


def predicted(windows: list[Tensor]) -> int:
    """How many tokens are predicted: all but the first of each window."""
    return sum(window.shape[1] - 1 for window in windows)


def open_bench(source: Path, tokens: int) -> Bench:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    windows = text_windows(source, tokens)
    reference = list(log_probabilities(model, windows))
    likelihood = sum(map(negative_log_likelihood, reference, windows))
    perplexity = math.exp(likelihood / predicted(windows))
    return Bench(model, read_tensors(source), windows, reference, perplexity)


def output_format(output: Path) -> str:
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    return str(config["quantization_config"]["quant_method"])


def measure_peer(bench: Bench, granularities: Mapping[str, str]) -> Distance:
    """compressed-tensors on the layers, and at the granularities, that an output chose."""
    state = {
        name: peer_round_trip(tensor, granularities[name])
        if name in granularities
        else tensor.float()
        for name, tensor in bench.source.items()
    }
    return bench.measure(state)


def measure_outputs(
    bench: Bench, outputs: list[Path], note: Callable[[str], None]
) -> Iterator[Row]:
    peers: dict[frozenset[tuple[str, str]], Distance] = {}
    for output in outputs:
        note(f"measuring {output}")
        state, granularities = dequantized(read_tensors(output))
        if not granularities:
            raise ValueError(f"{output} has no quantized weight")
        ours = bench.measure(state)
        layers = frozenset(granularities.items())
        if layers not in peers:
            note("measuring compressed-tensors on the same layers")
            peers[layers] = measure_peer(bench, granularities)
        peer, counts = peers[layers], Counter(granularities.values())
        yield Row(
            output=str(output),
            scheme=counts.most_common(1)[0][0],
            format=output_format(output),
            layers=dict(counts),
            perplexity=ours.perplexity,
            perplexity_ratio=ours.perplexity / bench.perplexity,
            kl=ours.kl,
            peer_perplexity=peer.perplexity,
            peer_kl=peer.kl,
            kl_ratio=ours.kl / peer.kl,
        )


def table(rows: list[Row], perplexity: float, tokens: int) -> Table:
    result = Table(title=f"bf16 source: perplexity {perplexity:.3f} over {tokens} tokens")
    for name in ("scheme", "format", "layers"):
        result.add_column(name)
    numbers = ("perplexity", "ratio", "KL", "their perplexity", "their KL", "KL ratio")
    for name in numbers:
        result.add_column(name, justify="right")
    result.add_column("")
    for row in rows:
        result.add_row(
            row.scheme,
            row.format,
            ", ".join(f"{count} {name}" for name, count in sorted(row.layers.items())),
            f"{row.perplexity:.3f}",
            f"{row.perplexity_ratio:.4f}",
            f"{row.kl:.5f}",
            f"{row.peer_perplexity:.3f}",
            f"{row.peer_kl:.5f}",
            f"{row.kl_ratio:.3f}",
            "ok" if row.passes else "over a limit",
        )
    result.caption = (
        f"theirs: compressed-tensors; limits: ratio {PERPLEXITY_LIMIT}, KL ratio {KL_LIMIT}"
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="the checkpoint that was quantized")
    parser.add_argument("outputs", type=Path, nargs="+", metavar="output")
    parser.add_argument("--tokens", type=int, default=4096, help="how much of the text to read")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    bench = open_bench(options.source, options.tokens)
    rows = list(measure_outputs(bench, options.outputs, note))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(rows, bench.perplexity, options.tokens))
    passes = all(row.passes for row in rows)
    result = {
        "source": str(options.source),
        "tokens": options.tokens,
        "perplexity": bench.perplexity,
        "limits": {"perplexity_ratio": PERPLEXITY_LIMIT, "kl_ratio": KL_LIMIT},
        "outputs": [asdict(row) for row in rows],
        "ok": passes,
    }
    print(json.dumps(result))
    return 0 if passes else 1


if __name__ == "__main__":
    sys.exit(main())
