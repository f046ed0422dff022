"""Holds the dependency rules between the packages and the layers inside jaxrec."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    "typing",
    "parse_errors",
    "file_manifest",
    "array_files",
    "orbax_log",
    "sharding",
    "functional",
    "ops",
    "nn",
    "retrieval",
    "distributed",
    "data",
    "train",
    "serve",
]
SEPARATE = [{"retrieval", "distributed"}, {"data", "nn"}, {"data", "retrieval"}]
KERNEL_IMPORTS = {"jax", "jaxlib", "numpy", "jaxtyping"}
CORE_IMPORTS = KERNEL_IMPORTS | {"flax", "optax", "orbax", "pallas_kernels", "jaxrec"}
LAZY_IMPORTS = {"grain", "polars", "rich", "matplotlib", "tyro", "tensorboardX"}


def imported_modules(tree: ast.AST, *, lazy: bool) -> list[str]:
    """Dotted names that a module imports, at top level or (lazy) inside functions as well.

    `from a import b` counts as a.b, so that importing a module from its package is seen.
    """
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n)]
    inner = {id(n) for outer in functions + guards for n in ast.walk(outer)}
    names = []
    for node in ast.walk(tree):
        if not lazy and id(node) in inner:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer that they reach"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def violations(path: Path, source: str) -> list[str]:
    """What a file imports against the rules, one line each."""
    tree = ast.parse(source)
    parts = path.with_suffix("").parts
    package, layer = parts[0], parts[1] if len(parts) > 1 else ""
    every, top = imported_modules(tree, lazy=True), imported_modules(tree, lazy=False)
    found = []
    for name in every:
        found += _package_rules(package, layer, name)
    stdlib = __import__("sys").stdlib_module_names
    allowed = {"pallas_kernels": KERNEL_IMPORTS | {"pallas_kernels"}, "jaxrec": CORE_IMPORTS}
    for name in top:
        root = name.split(".")[0]
        if package in allowed and root not in stdlib and root not in allowed[package]:
            found.append(f"{package} may import {root} at most inside the function that uses it")
    for name in set(every) - set(top):
        root = name.split(".")[0]
        known = stdlib | CORE_IMPORTS | LAZY_IMPORTS
        if package in allowed and root not in known:
            found.append(f"{package} imports the unknown package {root}")
    return [f"{path}: {line}" for line in found]


def _package_rules(package: str, layer: str, name: str) -> list[str]:
    target = name.split(".")
    if package == "pallas_kernels" and target[0] in {"jaxrec", "experiments"}:
        return [f"pallas_kernels imports {name}"]
    if package == "jaxrec" and target[0] == "experiments":
        return [f"jaxrec imports {name}"]
    if package == "jaxrec" and target[0] == "pallas_kernels" and len(target) > 2:
        return [f"jaxrec imports {name}, which is not a public name of pallas_kernels"]
    if package == "jaxrec" and target[0] == "jaxrec" and len(target) > 1 and layer in LAYERS:
        return _layer_rules(layer, target[1], name)
    if package == "experiments" and target[0] == "experiments":
        shared = {"peers", "readme", "record", "report", "settings", "torch_peers"} | {
            "torch_training",
            "triton_kernels",
        }
        if layer not in shared and len(target) > 1 and target[1] not in shared:
            return [f"an experiment imports another: {name}"]
    return []


def _layer_rules(layer: str, target: str, name: str) -> list[str]:
    if target not in LAYERS or target == layer:
        return []
    if LAYERS.index(target) > LAYERS.index(layer):
        return [f"layer {layer} imports {name}, which stands below it"]
    if {layer, target} in SEPARATE:
        return [f"layers {layer} and {target} do not import each other: {name}"]
    return []


def source_files() -> list[Path]:
    return sorted(
        path.relative_to(ROOT)
        for package in ("jaxrec", "pallas_kernels", "experiments")
        for path in (ROOT / package).rglob("*.py")
    )


def test_every_import_keeps_the_rules():
    files = source_files()
    assert len(files) > 20
    found = [line for path in files for line in violations(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("pallas_kernels/bloom/ref.py", "import jaxrec.ops"),
        ("pallas_kernels/bloom/ref.py", "import flax"),
        ("jaxrec/ops/losses.py", "from jaxrec.nn import SASRec"),
        ("jaxrec/nn/hstu.py", "from pallas_kernels.hstu_attention.ref import attends"),
        ("jaxrec/nn/hstu.py", "from experiments import record"),
        ("jaxrec/data/readers.py", "from jaxrec.nn import SASRec"),
        ("jaxrec/data/readers.py", "import polars"),
        ("jaxrec/train/loop.py", "def f():\n    import pandas"),
        ("jaxrec/retrieval/publish.py", "from jaxrec import train"),
        ("experiments/quickstart.py", "from experiments.bench_bloom import main"),
    ],
)
def test_a_broken_rule_is_found(path, line):
    assert violations(Path(path), line)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("jaxrec/nn/hstu.py", "from pallas_kernels import hstu_attention"),
        ("jaxrec/train/loop.py", "def f():\n    import rich"),
        ("experiments/quickstart.py", "from experiments import record"),
    ],
)
def test_an_allowed_import_passes(path, line):
    assert not violations(Path(path), line)
