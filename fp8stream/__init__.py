"""fp8stream: turn a bf16 checkpoint into an FP8 one, layer by layer, inside a memory budget.

The package itself imports nothing: `fp8stream inspect` and `--help` never load torch.
"""

__version__ = "0.1.0"
