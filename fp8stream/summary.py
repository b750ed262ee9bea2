"""A checkpoint and its plan in a few figures: what a person asks of a model before converting it.

Pure: everything is read off the plan.
"""

from fp8stream.plan import Plan
from fp8stream.roles import Role
from fp8stream.structure import Config
from fp8stream.weights import Kind


def active_parameters(plan: Plan, config: Config) -> int | None:
    """How many parameters one token meets.

    None for a model that has no experts, or does not say how many there are and are used.
    """
    used = config.numbers_like(r"(num_)?experts_per_tok(en)?|moe_(topk|top_k|k)|top_k_experts")
    if len(used) != 1 or len(config.experts) != 1:
        return None
    (each,), (count,) = used, config.experts
    routed = [kind for kind in plan.kinds if _is_routed(kind)]
    total = sum(len(kind.members) * kind.first.numel for kind in plan.kinds)
    experts = sum(len(kind.members) * kind.first.numel for kind in routed)
    return total - experts * (count - each) // count if experts and each < count else None


def _is_routed(kind: Kind) -> bool:
    known = kind.treatment.known
    return known.role is Role.EXPERT and "shared" not in kind.template


def largest_layer(plan: Plan) -> tuple[str, int]:
    """The layer with the most source bytes, and how many those are."""
    name, size = "", 0
    for kind in plan.kinds:
        each = kind.first.nbytes // max(1, kind.treatment.count)
        if each > size:
            name, size = kind.first.module or kind.first.name, each
    return name, size


def spread_modules(plan: Plan) -> int:
    """How many modules, or sets that engines fuse, have tensors in more than one file."""
    files: dict[str, str] = {}
    spread: set[str] = set()
    for tensor in plan.tensors:
        module = tensor.spec.module
        if tensor.known.fused:
            module = f"{module.rpartition('.')[0]}.{tensor.known.fused[0]}"
        if files.setdefault(module, tensor.spec.file) != tensor.spec.file:
            spread.add(module)
    return len(spread)
