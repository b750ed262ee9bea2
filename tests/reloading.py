"""A process that reloads a model again and again, and says what it holds after each time.

Run with an allocator that gives back what is freed, so that what is seen is what is held.
"""

import gc
import sys
from pathlib import Path

import torch
import transformers

from fp8stream.memory import MemoryUsage
from fp8stream.online import load_into, reload


def main(source: Path) -> None:
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    load_into(model, source)
    for _ in range(5):
        peak = reload(model, source).peak_bytes
        gc.collect()
        print(MemoryUsage.now().anonymous, peak)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
