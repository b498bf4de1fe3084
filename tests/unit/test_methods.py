"""A method of training is its own files: nothing else names one, and nothing asks which class of settings it was given."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator

from tests.source import PACKAGE, imports, module_of, trees
from togi.config.fields import Settings
from togi.methods import METHODS
from togi.methods.method import Method

# The files of each method, below togi/.
OWN = {name: {f"methods/{name}.py", f"methods/{name}_objective.py"} & set(trees()) for name in METHODS}
# Established module names, each of which starts its command.
SHIMS = {f"cli/train_{name}.py" for name in ("sft", "rm", "dpo", "kto", "prm", "kd")}
OUTSIDE = {path: tree for path, tree in trees().items() if not path.startswith("methods/") and path not in SHIMS}
# Words that are a method's name and something else too: values of flags of other commands, and commands that a loop gives.
WORDS = {"config/choices.py": {"rm", "dpo"}, "run/iterate_steps.py": {"sft", "dpo"}}


def classes(path: str) -> set[str]:
    return {node.name for node in ast.walk(trees()[path]) if isinstance(node, ast.ClassDef)}


def below(kind: type[Settings]) -> Iterator[type[Settings]]:
    """Every class derived from one."""
    for each in kind.__subclasses__():
        yield each
        yield from below(each)


def names_used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]


def type_tests(tree: ast.AST, settings: set[str]) -> Iterator[int]:
    """The lines that ask for a class of settings: ``isinstance(x, SomeConfig)`` and ``case SomeConfig()``."""
    for node in ast.walk(tree):
        asked: ast.AST | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = node.args[1]
        elif isinstance(node, ast.MatchClass):
            asked = node.cls
        if asked is not None and not settings.isdisjoint(names_used(asked)):
            yield getattr(node, "lineno", 0)


def test_a_method_is_found_by_its_name() -> None:
    for name, method in METHODS.items():
        assert issubclass(method, Method) and method.command == name
        assert method.__module__ == f"togi.methods.{name}" and OWN[name]


def test_nothing_else_names_a_method() -> None:
    files = set().union(*OWN.values(), {"methods/preference.py"})
    theirs, modules = set().union(*map(classes, files)), set(map(module_of, files))
    for path, tree in OUTSIDE.items():
        assert modules.isdisjoint(imports(tree)), f"{path} imports {modules & imports(tree)}"
        assert theirs.isdisjoint(names_used(tree)), f"{path} names {theirs & set(names_used(tree))}"
        words = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert words & set(METHODS) <= WORDS.get(path, set()), f"{path} has the word of a method"


def test_methods_do_not_name_each_other() -> None:
    for name, files in OWN.items():
        others = {module_of(path) for other, theirs in OWN.items() if other != name for path in theirs}
        for path in files:
            assert others.isdisjoint(imports(trees()[path])), path


def test_settings_are_asked_for_what_they_say_and_not_for_their_class() -> None:
    for module in pkgutil.iter_modules([str(PACKAGE / "config")]):
        importlib.import_module(f"togi.config.{module.name}")
    settings = {kind.__name__ for kind in below(Settings)}
    assert {"RLConfig", "ModelSettings", "Method", *(kind.__name__ for kind in METHODS.values())} <= settings
    found = [f"{path}:{line}" for path, tree in trees().items() for line in type_tests(tree, settings)]
    assert len(found) <= 3, found


def test_a_type_test_is_found() -> None:
    code = "isinstance(c, A | B)\nmatch c:\n    case A(x=1):\n        pass\nisinstance(c, D)"
    assert sorted(type_tests(ast.parse(code), {"A"})) == [1, 3]


def test_what_stands_in_braces_in_a_message_is_a_setting() -> None:
    """``fields.refuse`` writes the flag with its value in its place; {input} and {reward} are parts of templates."""
    known = {name for kind in below(Settings) for name in kind.model_fields} | {"input", "reward"}
    found = {
        (path, name)
        for path, tree in trees().items()
        if path.startswith(("config/", "methods/"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Yield)
        for text in ast.walk(node)
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
        for name in re.findall(r"{(\w+)}", text.value)
    }
    assert ("config/rl_checks.py", "kl_horizon") in found
    assert {(path, name) for path, name in found if name not in known} == set()
