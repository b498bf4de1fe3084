"""Every command that an example, a page, an image or a docstring names is one: its name, its flags, and the files it mentions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.example_scripts import CHECKS
from tests.offline_world import ROOT
from togi.cli.main import COMMANDS
from togi.config.parse import build_parser

KINDS = {".py", ".sh", ".yaml", ".md", ".Dockerfile", ""}
FOLDERS = ("examples", "docker", "docs", "scripts", "benchmarks", "togi")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in [*(ROOT / folder).rglob("*"), *ROOT.glob("*")]
    if path.is_file() and path.suffix in KINDS and "__pycache__" not in path.parts and path.name != ".git"
)
# The commands by their established names.
MODULES = {
    f"togi.cli.{path.stem}": found[1]
    for path in (ROOT / "togi/cli").glob("*.py")
    if (found := re.search(r'^    launch\("([\w-]+)"\)$', path.read_text(), re.MULTILINE))
}
# Where a command may stand: at the start of a line, behind what runs it, or between backticks; and in words, "flags of togi rl".
STARTED = r"(?:^|docker/run\.sh |exec |!|`|flags? of |\$ )"
COMMAND = re.compile(
    rf"{STARTED}(?:togi|\.venv/bin/togi|\"\$\{{TOGI:-togi\}}\"|\"\$TOGI\") (?P<words>[^`]+)", re.MULTILINE
)
MODULE = re.compile(r"-m (?P<module>togi[\w.]*)(?P<words>[^`]*)")
SUBMITTED = re.compile(r"sbatch [\w./]*slurm_train\.sh (?P<name>\w+)(?P<words>[^`]*)")
MENTIONED = re.compile(
    rf"(?<![\w./$}}-])(?:{'|'.join((*FOLDERS, 'tests', 'requirements'))})/[\w./-]*\w\.(?:py|sh|yaml|md|json|lock)\b"
)


def lines_of(text: str) -> Iterator[str]:
    """Without the marks of comments and lists, continued lines joined."""
    plain = re.sub(r"^[ \t]*(?:#+!?|//)?[ \t]*(?:[-*$] )?", "", text, flags=re.MULTILINE)
    yield from re.sub(r"\\\n\s*", " ", plain).splitlines()


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """The name and the words after it of each command in a text."""
    for line in lines_of(text):
        for found in COMMAND.finditer(line):
            name, *words = words_of(found["words"]) or [""]
            yield name, words
        for found in SUBMITTED.finditer(line):
            yield found["name"], words_of(found["words"])
        for found in MODULE.finditer(line):
            if found["module"] in MODULES:
                yield MODULES[found["module"]], words_of(found["words"])


def words_of(text: str) -> list[str]:
    """The words of one command: what the shell does with its output, and what a sentence goes on with, are none."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # a quote that the next line closes
        words = text.split()
    end = next((i for i, word in enumerate(words) if re.fullmatch(r"[|&;<>]+.*|\.\.\.|after", word)), len(words))
    return [word.rstrip(".,;:`") for word in words[:end]]


def problem(name: str, words: list[str]) -> str:
    """What is wrong with a command; "" if nothing is."""
    if not re.fullmatch("[a-z][a-z_-]*", name):  # --help, COMMAND, a variable of the shell
        return ""
    if name not in COMMANDS:
        return f"no command {name!r}"
    if name == "check" and words:  # togi check COMMAND
        name, words = (f"check {words[0]}" if f"check {words[0]}" in CHECKS else words[0]), words[1:]
    flags = [word for word in words if word.startswith("--") and word != "--help"]
    if name not in CHECKS or not flags:
        return ""
    known = build_parser(CHECKS[name][0], name)._option_string_actions
    unknown = [flag for flag in flags if flag.partition("=")[0] not in known]
    return f"{name} has no {' '.join(unknown)}" if unknown else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_files_exist(path: Path) -> None:
    text = path.read_text()
    found = [(problem(name, words), name, words) for name, words in commands_of(text)]
    assert [each for each in found if each[0]] == []
    assert [
        file for file in MENTIONED.findall(text) if not ((ROOT / file).exists() or (path.parent / file).exists())
    ] == []


def test_the_commands_are_found() -> None:
    """In each kind of file, so that the test above does not pass for want of any."""
    found = {str(path.relative_to(ROOT)): [name for name, _ in commands_of(path.read_text())] for path in FILES}
    for file, name in {
        "examples/rewards/math_reward.py": "rl",
        "examples/rewards/length_penalty.py": "rl",
        "examples/prm_rows.py": "prm",
        "examples/cluster/rayjob.yaml": "rl",
        "examples/cluster/slurm_train.sh": "sft",
        "examples/demo/run.sh": "rl",
        "examples/scripts/rlhf_chain.sh": "infer",
        "docker/run.sh": "rl",
        "README.md": "dpo",
        "docs/results.md": "kto",
        "togi/cli/train_ppo_ray.py": "rl",
    }.items():
        assert name in found[file], (file, found[file])
    assert sum(map(len, found.values())) > 100


def test_what_does_not_exist_is_noticed() -> None:
    text = (
        'togi train_ppo_ray --seed 1\n# togi rl --sede 1 ...\n`togi sft --input_kye x`\n"$TOGI" rl --pretrain M | tee x'
    )
    assert [problem(name, words) for name, words in commands_of(text)] == [
        "no command 'train_ppo_ray'",
        "rl has no --sede",
        "sft has no --input_kye",
        "",
    ]
    assert MENTIONED.findall("see examples/rewards/none.py, and (scripts/setup.py)") == [
        "examples/rewards/none.py",
        "scripts/setup.py",
    ]
