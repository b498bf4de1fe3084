"""The measures of the whole house: how much of it there is. The frames to a loop are counted in ``test_frames``.

A bar that is not reached yet has a limit, the value of today, which must not grow. Whoever improves a measure lowers its limit.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import pytest

from tests.source import PACKAGE, trees

# What a rollout is on its way from a row of a file to a metric and a row of a table, in this order.
ROLLOUT = (
    "sample.py: Prompt",
    "sample.py: Generation",
    "sample.py: Rollout",
    "sample.py: Score",
    "pump/experience.py: ScoredGroup",
    "sample.py: Sample",
    "batch.py: Batch",
    "model/policy.py: Outputs",
    "learn/objective.py: Loss",
    "learn/learner.py: UpdateReport",
    "obs/metrics.py: StepRecord",
)


class Lines(NamedTuple):
    """Of the package: all, those of imports, those with a comment, and those of code (none of the former, docstring or blank)."""

    all: int
    imports: int
    comments: int
    code: int


@cache
def lines() -> Lines:
    every = imported = comments = code = 0
    for path, tree in trees().items():
        source = (PACKAGE / path).read_text()
        skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
        written: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                comments += 1
            elif token.type not in skipped:
                written |= set(range(token.start[0], token.end[0] + 1))
        imports = {line for node in of_type(tree, ast.Import, ast.ImportFrom) for line in span(node)}
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = {line for node in of_type(tree, *documented) if ast.get_docstring(node) for line in span(node.body[0])}
        every += source.count("\n")
        imported += len(imports)
        code += len(written - imports - texts)
    return Lines(every, imported, comments, code)


def of_type(tree: ast.AST, *types: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, types))


def span(node: ast.AST) -> range:
    return range(node.lineno, node.end_lineno + 1)


def any_per_thousand_lines() -> float:
    names = sum(node.id == "Any" for tree in trees().values() for node in of_type(tree, ast.Name))
    return 1000 * names / lines().all


def config_types_asked_for() -> int:
    """``isinstance(config, ...)`` and ``case XConfig()``: what a command is, asked outside of it."""
    found = 0
    for tree in trees().values():
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name(id="config" | "settings"), *_]):
                    found += 1
                case ast.MatchClass(cls=ast.Name(id=name)) if name.endswith("Config"):
                    found += 1
    return found


class Measure(NamedTuple):
    """A value, its limit today and the bar that is aimed at; both are upper bounds unless ``at_least``."""

    value: Callable[[], float]
    limit: float
    bar: float
    at_least: bool = False


MEASURES = {
    "record types that one rollout passes": Measure(lambda: len(ROLLOUT), 12, 12),
    "isinstance(config, ...) and case XConfig()": Measure(config_types_asked_for, 3, 3),
    "Any per 1,000 lines": Measure(any_per_thousand_lines, 4, 4),
    "import lines, percent": Measure(lambda: 100 * lines().imports / lines().all, 7.2, 6),
    "comment lines, percent": Measure(lambda: 100 * lines().comments / lines().all, 2, 2, at_least=True),
    "files": Measure(lambda: len(trees()), 212, 190),
    "lines of code": Measure(lambda: lines().code, 25_789, 17_500),
}


@pytest.mark.parametrize("name", MEASURES)
def test_no_measure_is_worse_than_its_limit(name: str) -> None:
    measure = MEASURES[name]
    value = measure.value()
    assert value >= measure.limit if measure.at_least else value <= measure.limit, f"{name}: {value:.2f}"
    assert measure.limit <= measure.bar if measure.at_least else measure.limit >= measure.bar, (
        "the bar is reached: hold it"
    )


def test_the_records_of_a_rollout_are_those_of_the_code() -> None:
    classes = {f"{path}: {node.name}" for path, tree in trees().items() for node in of_type(tree, ast.ClassDef)}
    assert [record for record in ROLLOUT if record not in classes] == []
