"""The shape of the house, read from the syntax tree: arrows, fences, size bars, typed signatures, no print."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "togi"
FILES = sorted(PACKAGE.rglob("*.py"))

# A package may import packages of a lower level, and itself. Nothing imports sideways.
LEVELS = {
    "errors": 0,
    "config": 1,
    "obs": 1,
    "sample": 2,
    "batch": 2,
    "algo": 3,
    "plan": 3,
    "kernels": 4,
    "data": 5,
    "model": 5,
    "parallel": 5,
    "learn": 6,
    "rollout": 6,
    "reward": 6,
    "runtime": 7,
    "recipes": 8,
    "cli": 9,
    "__init__": 10,
    "__main__": 10,
}
# Where a package from outside may be imported; a path is a file or a folder below togi/.
FENCES = {
    "ray": ("runtime/",),
    "vllm": ("rollout/vllm_engine.py",),
    "deepspeed": ("parallel/deepspeed.py",),
    "torch.distributed": ("parallel/", "runtime/weight_sync.py"),
    "transformers": (
        "model/",
        "learn/schedule.py",
        "data/chat.py",
        "rollout/transformers_engine.py",
        "rollout/slot_cache.py",
    ),
    "huggingface_hub": ("model/", "recipes/preflight.py"),
    "peft": ("model/",),
    "bitsandbytes": ("model/",),
    "wandb": ("obs/sinks.py",),
    "torch.utils.tensorboard": ("obs/sinks.py",),
    "tensorboard": ("obs/sinks.py",),
}
TORCH_FREE = ("config", "plan", "obs", "errors", "sample")


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def package_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_arrows_point_right(path: Path) -> None:
    own = package_of(path)
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "togi" or len(parts) == 1 or parts[1] == own or parts[1] not in LEVELS:
            continue
        assert LEVELS[parts[1]] < LEVELS[own], f"{relative(path)} ({own}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_fences(path: Path) -> None:
    for name in imports(ast.parse(path.read_text())):
        for package, allowed in FENCES.items():
            if within(name, package):
                assert relative(path).startswith(allowed), f"{relative(path)} imports {name}"
        if package_of(path) in TORCH_FREE:
            assert not within(name, "torch"), f"{relative(path)} must not import torch"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_size_bars(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 500, f"{relative(path)} is longer than 500 lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{relative(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_signatures_are_typed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.returns is not None, f"{relative(path)}: {node.name} has no return type"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            if argument.arg not in ("self", "cls", "ctx"):
                assert argument.annotation is not None, f"{relative(path)}: {node.name}({argument.arg}) is not typed"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_print_no_catch_all_no_soft_getattr(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert package_of(path) == "cli", f"{relative(path)}:{node.lineno} prints"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            raise AssertionError(f"{relative(path)}:{node.lineno} catches everything")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{relative(path)} has no docstring"
