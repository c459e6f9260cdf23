"""The layering of the package, read from its imports."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "moe_lm"
LAYERS = {
    "kernels": set(),
    "model": {"kernels"},
    "data": set(),
    "checkpoint": set(),
    "parallel": {"kernels", "model"},
    "hf": {"kernels", "model", "checkpoint"},
    "evaluation": {"kernels", "model", "data", "checkpoint", "hf", "parallel"},
    "training": {"kernels", "model", "data", "checkpoint", "parallel", "evaluation"},
    "finetune": {"kernels", "model", "data", "checkpoint", "parallel", "hf", "evaluation", "training"},
    "commands": {
        *("kernels", "model", "data", "checkpoint", "hf", "parallel", "evaluation", "training", "finetune"),
        *("config", "cli"),
    },
}
EVERYWHERE = {"errors", "files", "interrupts", "memory", "plain", "process", "transfer"}
"""Leaves: the exceptions whose message is for the user, writing files whole, this process's signals, its memory and its
place among others, configurations as plain values, copies to a device."""
ONLY_IN = {
    "hydra": ["config.py"],
    "omegaconf": ["config.py"],
    "transformers": ["hf/", "data/tokenizer", "data/chat_template.py"],
    "tokenizers": ["data/tokenizer"],
    "accelerate": ["parallel/runtime.py", "training/"],
    "datasets": ["data/sources.py"],
    "triton": ["kernels/triton/"],
    "wandb": ["training/tracker_process.py"],
    "pickle": [],
}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_layer_may(path):
    """Catches a lower layer that reaches up, and a library that leaks out of the one place meant for it."""
    place = path.relative_to(PACKAGE)
    layer = place.parts[0] if len(place.parts) > 1 else None
    for name in _imports(path):
        root, *rest = name.split(".")
        if root == "moe_lm" and layer is not None:
            allowed = LAYERS[layer] | {layer} | EVERYWHERE
            assert rest[0] in allowed, f"{place} imports {name}"
        if root in ONLY_IN:
            assert any(str(place).startswith(where) for where in ONLY_IN[root]), f"{place} imports {name}"


def test_kernels_for_gpus_are_imported_where_they_are_used():
    """Catches an import at the top of a file by which every command would need Triton."""
    for path in FILES:
        if path.parent.name != "triton":
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_lm.kernels.triton"):
                    assert {alias.name for alias in node.names} == {"launch"}, path


def test_every_package_has_a_layer_and_an_empty_init():
    """Catches a package that nobody placed, and an import that hides in an __init__."""
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert packages == set(LAYERS)
    assert all(not p.read_text() for p in PACKAGE.rglob("__init__.py"))


def test_configurations_need_nothing_but_the_standard_library():
    """Catches a config.py that would make `moe-lm --help` import torch."""
    for path in PACKAGE.glob("*/config.py"):
        for name in _imports(path):
            root, *rest = name.split(".")
            assert (
                root in ("ast", "dataclasses", "enum", "re", "pathlib", "typing")
                or "config" in rest
                or "errors" in rest
            )
