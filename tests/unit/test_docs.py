"""What the documentation says must be so: links lead somewhere, commands parse, targets exist, examples are tested."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from togi.cli.commands import CHECKED
from togi.cli.main import COMMANDS
from togi.config.infer import ChatConfig, InferConfig, check_infer
from togi.config.iterate import IterateConfig, check_iterate
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.config.tools import ExportConfig, RLCheckConfig, ServeRMConfig
from togi.methods import METHODS, check_method

CONFIGS = (
    RLConfig,
    RLCheckConfig,
    ChatConfig,
    InferConfig,
    IterateConfig,
    ServeRMConfig,
    ExportConfig,
    *METHODS.values(),
)
ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def code_lines(page: Path) -> list[str]:
    """Commands of the indented code blocks, with continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_real(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code_lines(page):
        words = shlex.split(line, comments=True) if line.startswith(("make ", "togi ")) else []
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        elif words[:1] == ["togi"]:
            assert words[1] in COMMANDS, line
            if words[1] == "check":
                assert words[2] in CHECKED, line
                words = words[1:]
                if words[1] == "rl":
                    check_rl(parse(RLCheckConfig, words[2:], "check rl").config)
                    continue
            if words[1] == "rl" and "--help" not in words:
                check_rl(parse(RLConfig, words[2:], "rl").config)
            elif words[1] == "infer" and "--help" not in words:
                check_infer(parse(InferConfig, words[2:], "infer"))
            elif words[1] == "iterate" and "--help" not in words:
                check_iterate(parse(IterateConfig, words[2:], "iterate"))
            elif words[1] in METHODS and "--help" not in words:
                check_method(parse(METHODS[words[1]], words[2:], words[1]))


def test_the_files_that_the_architecture_names_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = {
        name
        for name in re.findall(r"`((?:\w+/)+\w+\.\w+)`", text)
        if not name.endswith(("X.py", "X_engine.py", "X_objective.py"))
    }
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / "togi" / name).exists() and not (ROOT / name).exists()] == []


def examples_of(module: Path) -> set[str]:
    """The scripts that a test module lists as its EXAMPLES, and in what that list is made of."""
    values = {
        target.id: node.value
        for node in ast.parse(module.read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    nodes = list(ast.walk(values["EXAMPLES"])) if "EXAMPLES" in values else []
    for name in [node.id for node in nodes if isinstance(node, ast.Name) and node.id in values]:
        nodes += ast.walk(values[name])
    words = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {word for word in words if word.endswith(".sh")}


def test_every_script_is_in_the_index_and_in_the_tests() -> None:
    scripts = {path.name for path in (ROOT / "examples" / "scripts").glob("*.sh") if not path.name.startswith("common")}
    assert scripts == {name for module in (ROOT / "tests" / "e2e").glob("test_*.py") for name in examples_of(module)}
    index = (ROOT / "examples" / "README.md").read_text()
    assert all(f"(scripts/{name})" in index for name in scripts)


def test_every_feature_has_an_example() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    features = rows[rows.index("| feature | example |") + 1 :]
    assert len(features) > 30
    for row in features:
        assert "](examples/" in row.split(" | ")[-1], row


def test_established_flags_in_code_spans_exist() -> None:
    """A flag that a page names in backticks is one of ours (dropped ones are written without dashes)."""
    for page in PAGES:
        for flag in re.findall(r"`--([a-z0-9_]+)", page.read_text()):
            known = any(flag.removeprefix("no_") in config.model_fields for config in CONFIGS) or flag in (
                "config",
                "help",
            )
            assert known, f"{page.name}: --{flag}"
