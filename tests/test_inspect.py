"""What `inspect` tells a person: what a checkpoint is, what becomes of it, what to beware of."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import LLAMA, Run, Tensors, llama_tensors, write_checkpoint

Runner = Callable[..., Run]

MOE: Mapping[str, Any] = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 128,
}


def experts(layers: int = 2, count: int = 4, inter: int = 128) -> Tensors:
    shapes = {"gate_proj": (inter, 128), "up_proj": (inter, 128), "down_proj": (128, inter)}
    return {
        f"model.layers.{n}.mlp.experts.{e}.{leaf}.weight": torch.zeros(shape).bfloat16()
        for n in range(layers)
        for e in range(count)
        for leaf, shape in shapes.items()
    }


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    dense = {n: t for n, t in llama_tensors().items() if ".mlp." not in n}
    return write_checkpoint(tmp_path / "moe", {**dense, **experts()}, shards=3, config=MOE)


def rows(text: str) -> dict[str, str]:
    """The rows of the tables of labels, by label."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        label, gap, value = line.partition("  ")
        if gap and label not in found:
            found[label] = value.strip()
    return found


def test_experts_are_one_row_of_the_table(run: Runner, moe: Path) -> None:
    done = run("inspect", moe)
    line = next(line for line in done.out.splitlines() if "experts" in line and "down" in line)
    assert line.split()[:2] == ["model.layers.[0-1].mlp.experts.[0-3].down_proj.weight", "x8"]
    assert "[128, 128]" in line
    assert "FP8 channel" in line
    assert "expert of a repeated layer" in line


def test_the_model_in_words(run: Runner, moe: Path) -> None:
    found = rows(run("inspect", moe).out)
    assert found["architecture"] == "Qwen3MoeForCausalLM (qwen3_moe)"
    total = json.loads(run("inspect", moe, "--json").out)["source"]["parameters"]
    idle = 2 * 3 * 3 * 128 * 128  # three of four experts, in two layers
    assert found["parameters"] == f"{total:,}, {total - idle:,} of them for each token"
    assert found["tensors"].startswith("39 in 3 files of ")
    assert "layers in more than one" in found["tensors"]
    assert found["output head"] == "lm_head.weight [96, 128]"


def test_a_dense_model_is_active_whole_and_may_be_tied(run: Runner, tmp_path: Path) -> None:
    config = {**LLAMA, "num_hidden_layers": 2, "tie_word_embeddings": True}
    source = write_checkpoint(tmp_path / "m", llama_tensors(tied=True), config=config)
    found = rows(run("inspect", source).out)
    assert found["parameters"].replace(",", "").isdigit()
    assert found["output head"].startswith("tied")
    assert found["tensors"].endswith("in 1 file")


def test_the_forecast_names_the_largest_layer(run: Runner, llama: Path) -> None:
    found = rows(run("inspect", llama).out)
    assert found["largest layer"] == "64.0 KiB, model.layers.0.mlp.down_proj"
    assert {"bits per weight", "disk needed", "peak memory", "writes"} <= found.keys()


def test_tensor_parallel_limits_are_told_for_blocks_alone(run: Runner, llama: Path) -> None:
    assert "tensor parallel" not in rows(run("inspect", llama).out)
    found = rows(run("inspect", llama, "--scheme", "block").out)
    assert found["tensor parallel"] == "1 rank"


def test_the_largest_safe_number_of_ranks(run: Runner, tmp_path: Path) -> None:
    tensors = llama_tensors(hidden=512, inter=1024, kv=256, layers=1)
    config = {
        **LLAMA,
        "hidden_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    }
    source = write_checkpoint(tmp_path / "m", tensors, config=config)
    found = rows(run("inspect", source, "--scheme", "block").out)
    assert found["tensor parallel"] == "up to 4 ranks: 1, 2, 4"
    assert "ranks cut" not in run("inspect", source, "--scheme", "block", "--tp", 4).err


def test_every_layer_that_ranks_would_cut_is_named_once(run: Runner, llama: Path) -> None:
    done = run("inspect", llama, "--scheme", "block", "--tp", 4)
    cut = [line for line in done.err.splitlines() if "ranks cut" in line]
    names = [line.removeprefix("warning: ").partition(":")[0] for line in cut]
    assert len(names) == len(set(names)) == 7
    assert (
        "warning: model.layers.*.mlp.down_proj: 4 ranks cut its 256 inputs into parts of 64, no "
        "multiple of 128"
    ) in cut
    document = json.loads(run("inspect", llama, "--scheme", "block", "--tp", 4, "--json").out)
    assert sum("ranks cut" in warning for warning in document["warnings"]) == 7


def test_what_is_mostly_kept_is_said_with_the_reason(run: Runner, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", llama_tensors(vocab=9000, layers=1))
    (warning,) = [line for line in run("inspect", source).err.splitlines() if "16 bit" in line]
    assert "% of bytes stay in 16 bit" in warning
    assert "embedding" in warning or "output head" in warning


def test_tensors_can_be_filtered_and_sorted(run: Runner, moe: Path) -> None:
    done = run("inspect", moe, "--tensors", "--filter", r"experts\.2\.", "--sort", "name")
    names = [line.split("\t")[0] for line in done.out.splitlines()]
    assert len(names) == 6
    assert names == sorted(names)
    sizes = [
        int(line.split("\t")[5])
        for line in run("inspect", moe, "--tensors", "--sort", "size").out.splitlines()
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert not run("inspect", moe, "--tensors", "--filter", "no such name").out


@pytest.mark.parametrize("option", [("--filter", "x"), ("--sort", "size")])
def test_filter_and_sort_go_with_tensors(run: Runner, moe: Path, option: tuple[str, str]) -> None:
    done = run("inspect", moe, *option)
    assert done.code == 2
    assert "--tensors" in done.err


def test_a_filter_that_is_no_expression_is_wrong_usage(run: Runner, moe: Path) -> None:
    done = run("inspect", moe, "--tensors", "--filter", "(")
    assert done.code == 2
    assert "regular expression" in done.err


def test_nothing_to_quantize_is_refused_with_the_reasons(run: Runner, tmp_path: Path) -> None:
    tensors = {
        "wte.weight": torch.zeros(96, 128),
        "h.0.attn.c_attn.weight": torch.zeros(128, 384),
        "h.0.attn.c_attn.bias": torch.zeros(384),
    }
    config = {"model_type": "gpt2", "n_embd": 128, "n_layer": 1, "vocab_size": 96}
    source = write_checkpoint(tmp_path / "m", tensors, config=config)
    done = run("quantize", source, tmp_path / "out")
    assert done.code == 1
    assert "nothing to quantize" in done.err
    assert "Conv1D" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ties", [True, False, None])
@pytest.mark.parametrize("head", [True, False])
def test_a_head_that_is_not_where_the_config_says_is_told(
    run: Runner, tmp_path: Path, ties: bool | None, head: bool
) -> None:
    config = {**LLAMA, "num_hidden_layers": 2, "tie_word_embeddings": ties}
    tensors = llama_tensors(tied=not head)
    done = run("inspect", write_checkpoint(tmp_path / "m", tensors, config=config))
    told = [line for line in done.err.splitlines() if "config.json" in line]
    assert len(told) == (ties is head)
    assert all(("both are written" if head else "is the checkpoint whole") in t for t in told)


def test_what_is_stacked_on_disk_is_judged_by_its_parts(run: Runner, tmp_path: Path) -> None:
    """Sixteen heads of 64 and four of keys: at four ranks a rank has 64 rows of keys."""
    tensors = llama_tensors(hidden=1024, inter=1024, kv=256, layers=1)
    config = {
        **LLAMA,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 1,
    }
    apart = write_checkpoint(tmp_path / "apart", tensors, config=config)
    at = "model.layers.0.self_attn."
    parts = [tensors.pop(f"{at}{leaf}_proj.weight") for leaf in "qkv"]
    tensors[f"{at}qkv_proj.weight"] = torch.cat(parts)
    stacked = write_checkpoint(tmp_path / "stacked", tensors, config=config)
    found = [rows(run("inspect", s, "--scheme", "block").out) for s in (apart, stacked)]
    assert found[0]["tensor parallel"] == found[1]["tensor parallel"] == "up to 2 ranks: 1, 2"


def test_parts_on_disk_that_blocks_do_not_fit_fall_back(run: Runner, tmp_path: Path) -> None:
    tensors = llama_tensors(hidden=192, inter=384, layers=1)
    tensors = {n: t for n, t in tensors.items() if "self_attn" not in n}
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(576, 256).bfloat16()
    config = {**LLAMA, "hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 1}
    config["num_key_value_heads"] = 3
    source = write_checkpoint(tmp_path / "m", tensors, config=config)
    done = run("inspect", source, "--scheme", "block", "--tensors", "--filter", "qkv")
    assert done.out.split("\t")[2] == "channel"
    assert "part its rows" in done.out
