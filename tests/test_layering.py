"""Imports go one way, and the light half of the project stays light. Read off the source, file by file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "accelerate")
LAYERS: list[tuple[str, ...]] = [
    ("patchers",),
    ("sharded_ckpt.errors", "sharded_ckpt.checkpoint"),
    ("collective", "runtime", "local_ranks", "launch"),  # how a process stands to the others
    ("ownership", "surgery", "config", "model", "ties"),  # one rank's model, before it has weights
    ("progress", "loading", "distribute", "saving", "offload"),  # weights in and out
    ("children", "pipeline", "training"),
    ("report", "plots", "cli", "commands", "demo", "__main__"),
    ("sharded_ckpt",),  # the public surface, which nobody inside may use
]


def layer_of(module: str) -> int:
    """The layer of a module is that of its longest known prefix."""
    known = {
        name if name.startswith(("patchers", "sharded_ckpt")) else f"sharded_ckpt.{name}": layer
        for layer, names in enumerate(LAYERS)
        for name in names
    }
    parts = module.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    found = next(prefix for prefix in prefixes if prefix in known)
    if found == "sharded_ckpt" and module != found:
        pytest.fail(f"{module} has no place in the layers: give it one in {Path(__file__).name} and the docs")
    return known[found]


def modules() -> dict[str, Path]:
    files = [path for package in ("patchers", "sharded_ckpt") for path in (ROOT / package).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(module: str, path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Every import in a file, also those in functions and under TYPE_CHECKING, as absolute names."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node) for alias in node.names)


def imported_modules(module: str, path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Imports of this project, as modules: `from a.b import c` is of a.b.c, if that is one, else of a.b."""
    known = modules()
    for name, node in imports(module, path):
        if name.split(".")[0] in ("patchers", "sharded_ckpt") and not name.endswith(".__version__"):
            yield (name if name in known else name.rpartition(".")[0] or name), node


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_one_way(module: str) -> None:
    path = modules()[module]
    back = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {target}"
        for target, node in imported_modules(module, path)
        if layer_of(target) > layer_of(module)
    ]
    assert not back, "\n".join(back)


def test_no_module_imports_itself_in_a_circle() -> None:
    """By imports at the top of a file; those inside functions are resolved later."""
    graph = {
        module: {target for target, node in imported_modules(module, path) if node.col_offset == 0}
        for module, path in modules().items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " imports ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in graph.get(module, set()) - {module}:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_what_a_block_is_knows_no_ranks() -> None:
    for module, path in modules().items():
        if module.startswith("patchers"):
            found = [name for name, _ in imports(module, path) if name.startswith("torch.distributed")]
            assert not found, f"{module} imports {found}"


def test_the_public_packages_and_all_light_modules_import_nothing_heavy() -> None:
    light = [
        "patchers",
        "sharded_ckpt",
        "sharded_ckpt.ownership.plan",
        "sharded_ckpt.ownership.costs",
        "sharded_ckpt.collective.verdict",
    ]
    light += ["patchers.block_config", "patchers.dialects", "patchers.inference", "sharded_ckpt.runtime"]
    light += [name for name in modules() if name in ("sharded_ckpt.cli", "sharded_ckpt.loading.plan")]
    light += ["sharded_ckpt.checkpoint", "sharded_ckpt.checkpoint.coordinator"]
    check = (
        f"import sys, importlib\nfor name in {light!r}:\n    importlib.import_module(name)\n"
        f"    heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    assert not heavy, f'importing {name} imports {heavy}'"
    )
    result = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
