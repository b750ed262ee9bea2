"""One rank of a real run over gloo: `python -m tests.tp_rank RANK RANKS PORT CASES RESULT`.

CASES is a JSON list of [source, scheme, dtype, plan]; what each gives goes to RESULT.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp8stream.online import load_into

KEEP: Mapping[str, Any] = {"experts": "keep", "ignore": ["re:.*proj.*"]}
PROMPT = torch.arange(5, 45).remainder(23).mul(13).view(2, 20)


def run(case: Sequence[Any], rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Logits of a prompt, and the tokens that greedy generation adds to it."""
    import transformers

    source, scheme, dtype, plan = case
    config = transformers.AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    at: dict[str, Any] = {"tp_rank": rank, "tp_size": ranks, "tp_plan": plan}
    at |= KEEP if scheme == "16 bit" else {"scheme": scheme}
    load_into(model.eval(), source, device="cpu", **at)
    with torch.no_grad():
        logits = model(PROMPT).logits.float()
        tokens = model.generate(PROMPT, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return logits, tokens


def main(rank: int, ranks: int, port: str, cases: Path, result: Path) -> None:
    """Raises whatever keeps gloo from starting before the first case."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    torch.save([run(case, rank, ranks) for case in json.loads(cases.read_text())], result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
