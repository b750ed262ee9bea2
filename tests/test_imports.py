"""The architecture as a test: imports point downwards, and looking at a model loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fp8stream

# From the top floor down; a module may import those below it.
HOUSE = [
    "__main__",
    "cli",
    "options",
    "console",
    "saving",
    "online",
    "sources",
    "one_by_one",
    "incoming",
    "carried",
    "spread",
    "ranks",
    "trimming",
    "styles",
    "verify",
    "findings",
    "stream",
    "work",
    "reads",
    "initialization",
    "skeleton",
    "waiting",
    "fitting",
    "pieces",
    "coded",
    "held",
    "live",
    "device",
    "writer",
    "recorder",
    "filling",
    "output",
    "lock",
    "journal",
    "report",
    "evidence",
    "foreign",
    "replan",
    "expectation",
    "parallel",
    "summary",
    "plan",
    "advice",
    "weights",
    "layout",
    "reader",
    "mapping",
    "conversions",
    "filled",
    "tracing",
    "places",
    "views",
    "declaration",
    "policy",
    "engines",
    "experts",
    "roles",
    "structure",
    "names",
    "checkpoint",
    "header",
    "fused_experts",
    "linear",
    "matmul",
    "comparison",
    "fp8",
    "scheme",
    "layerwise",
    "coverage",
    "memory",
    "clock",
    "system",
    "signals",
    "errors",
    "__init__",
]
PACKAGE = Path(fp8stream.__file__).parent
PURE = {
    "pieces",
    "fitting",
    "coded",
    "filled",
    "places",
    "advice",
    "expectation",
    "foreign",
    "replan",
    "plan",
    "weights",
    "layout",
    "views",
    "declaration",
    "policy",
    "engines",
    "experts",
    "roles",
    "structure",
    "names",
    "parallel",
    "styles",
    "summary",
    "scheme",
    "coverage",
    "errors",
    "journal",
}
NO_TORCH = PURE | {
    "cli",
    "options",
    "console",
    "report",
    "checkpoint",
    "header",
    "memory",
    "reader",
    "output",
    "system",
    "signals",
    "evidence",
    "recorder",
    "filling",
    "lock",
    "clock",
    "__init__",
}


def imports(module: str, top_level_only: bool) -> set[str]:
    """Names of the modules that `module` imports; of fp8stream's own, the last part."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "fp8stream":
            found.update(a.name if a.name in HOUSE else "__init__" for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.removeprefix("fp8stream."))
    return found


def test_every_module_has_its_floor() -> None:
    assert sorted(HOUSE) == sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_the_package_itself_imports_nothing() -> None:
    """What it names for Python users stands on the top floor, and is imported when it is asked."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    modules = [n.module for n in tree.body if isinstance(n, ast.ImportFrom)]
    assert modules == ["typing"]
    assert not any(isinstance(node, ast.Import) for node in tree.body)


@pytest.mark.parametrize("module", [name for name in HOUSE if name != "__init__"])
def test_imports_point_downwards(module: str) -> None:
    floor = HOUSE.index(module)
    for name in imports(module, top_level_only=False) & set(HOUSE):
        assert HOUSE.index(name) > floor, f"{module} imports {name}, which is not below it"


@pytest.mark.parametrize("module", sorted(NO_TORCH))
def test_no_torch_at_the_top_of(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(module, top_level_only=True)}
    assert not roots & {"torch", "safetensors", "transformers", "numpy"}


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_core_does_no_io(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(module, top_level_only=False)}
    assert not roots & {"os", "io", "sys", "click", "rich", "tqdm", "logging", "shutil"}


def test_only_the_top_prints() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.stem in ("cli", "console", "report"):
            continue
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not {ast.unparse(call) for call in calls} & {"print", "click.echo"}, path.name


@pytest.mark.parametrize("arguments", [["--help"], ["inspect"], ["inspect", "--json"]])
def test_looking_loads_neither_torch_nor_transformers(arguments: list[str], llama: Path) -> None:
    if arguments[0] == "inspect":
        arguments = [*arguments, str(llama)]
    code = (
        "import sys; from fp8stream.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
