"""fp8stream: turn a bf16 checkpoint into an FP8 one, layer by layer, inside a memory budget.

The package itself imports nothing: `fp8stream inspect` and `--help` never load torch. What Python
users call is loaded when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8stream.fused_experts import FP8Experts as FP8Experts
    from fp8stream.linear import FP8Linear as FP8Linear
    from fp8stream.mapping import Part as Part
    from fp8stream.online import LoadResult as LoadResult
    from fp8stream.online import load_into as load_into
    from fp8stream.online import quantize_model as quantize_model
    from fp8stream.online import reload as reload
    from fp8stream.saving import save as save

__version__ = "0.1.0"

_LAZY = {
    "FP8Experts": "fused_experts",
    "FP8Linear": "linear",
    "LoadResult": "online",
    "Part": "mapping",
    "load_into": "online",
    "quantize_model": "online",
    "reload": "online",
    "save": "saving",
}


def __getattr__(name: str) -> Any:
    """A name of the Python interface, from the module that has it."""
    if name not in _LAZY:
        raise AttributeError(f"module 'fp8stream' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fp8stream.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
