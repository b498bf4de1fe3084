"""The source of the package, parsed once: what the tests about its shape read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "togi"


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax tree of each file, by its path below togi/."""
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def modules() -> frozenset[str]:
    """The dotted names of all modules of the package."""
    return frozenset(map(module_of, trees()))


def module_of(path: str) -> str:
    """The dotted name of a file below togi/."""
    return ".".join(("togi", *path.removesuffix(".py").split("/"))).removesuffix(".__init__")


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@cache
def imports(tree: ast.AST) -> frozenset[str]:
    """The names of all modules that are imported, and of what is taken from them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """The modules of this package that a file imports when it runs, wherever in the file."""
    for node in at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                if module in modules() or node.module in modules():
                    yield module if module in modules() else node.module


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    yield node
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from at_run_time(child)


def places(path: str, node: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node with its place, such as "weights/buckets.py: Bucket.unpack"."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        here = f"{inside}.{child.name}".lstrip(".") if named else inside
        yield f"{path}: {here}", child
        yield from places(path, child, here)


@cache
def read_attributes() -> set[str]:
    """Every attribute that code outside the declarations of settings reads."""
    files = [tree for path, tree in trees().items() if not path.endswith(("checks.py", "fields.py", "parse.py"))]
    nodes = [node for tree in files for node in ast.walk(tree)]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
