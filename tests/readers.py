"""How engines read a `quantization_config`: none of fp8stream's own rules.

compressed-tensors and transformers are asked themselves; what vLLM does is written down here, from
its public source: `should_ignore_layer` and `find_matched_target` for compressed-tensors, and
`is_layer_skipped` for `fp8`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from transformers.quantizers.quantizers_utils import should_convert_module

Config = Mapping[str, Any]
Strategies = dict[str, str | None]

_LINEAR = torch.nn.Linear(1, 1, device="meta")
# What vLLM's model classes call the projections of an expert; the last in classes without a gate.
EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj")
UNGATED_LEAVES = ("up_proj", "down_proj", "None")
MIXTRAL_LEAVES = ("w1", "w2", "w3")


def turned(config: Config) -> Config:
    """`config` with the last of its groups first."""
    groups = config.get("config_groups", {})
    return {**config, "config_groups": dict(reversed(groups.items()))}


def compressed_tensors(config: Config, names: Iterable[str]) -> Strategies:
    """The strategy of linear layers called `names` by compressed-tensors' own matching."""
    parsed = QuantizationConfig.model_validate(dict(config))
    targets = {t: group for group in parsed.config_groups.values() for t in group.targets}
    found: Strategies = {}
    for name in names:
        found[name] = None
        if is_match(name, _LINEAR, list(targets), parsed.ignore):
            first = match_targets(name, _LINEAR, list(targets))[0]
            found[name] = str(targets[first].weights.strategy)
    return found


def vllm(config: Config, names: Iterable[str]) -> Strategies:
    """The same by vLLM's: of all targets the first that names the layer, then the first class."""
    targets = {
        target: str(group["weights"]["strategy"])
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    found: Strategies = {}
    for name in names:
        named = [s for target, s in targets.items() if _names(target, name)]
        classes = [s for target, s in targets.items() if target == "Linear"]
        ignored = any(_names(entry, name) for entry in config["ignore"])
        found[name] = None if ignored else next(iter(named + classes), None)
    return found


def _names(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return entry == name


def vllm_experts(config: Config, module: str, leaves: Sequence[str] = EXPERT_LEAVES) -> str | None:
    """The strategy of the experts in `module`: asked by the names of expert 0, which must agree."""
    found = set(vllm(config, [f"{module}.0.{leaf}" for leaf in leaves]).values())
    assert len(found) == 1, f"vLLM refuses {module}: {found}"
    return found.pop()


def vllm_fp8(config: Config, name: str) -> bool:
    """Whether vLLM takes a layer for quantized under `quant_method: fp8`."""
    entries: list[str] = config["modules_to_not_convert"]
    if "experts" in name:
        return not any(name in entry for entry in entries if "experts" in entry)
    return name not in entries


def transformers_fp8(config: Config, name: str) -> bool:
    """Whether transformers does."""
    return bool(should_convert_module(name, config["modules_to_not_convert"]))


def vllm_stacked(config: Config, parent: str, stacked: str, members: Sequence[str]) -> str | None:
    """The strategy of a layer that vLLM stacks from `members`, which must agree."""
    names = [f"{parent}.{member}" for member in members]
    ignored = {any(_names(entry, name) for entry in config["ignore"]) for name in names}
    assert len(ignored) == 1, f"vLLM refuses {parent}.{stacked}"
    if ignored.pop():
        return None
    by_itself = vllm(config, [f"{parent}.{stacked}"])[f"{parent}.{stacked}"]
    return by_itself or vllm(config, names[:1])[names[0]]
