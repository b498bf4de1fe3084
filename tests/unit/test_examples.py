"""Every example script says what it is and gives commands that togi accepts as they are; a large one is a small one in size."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.example_scripts import NAMES, SCRIPTS, commands, header
from tests.offline_world import ROOT
from togi.config.rl import RLConfig
from togi.plan.machine import Machine
from togi.plan.placement import plan_groups, resolve

# Scripts that are programs of their own: their commands depend on each other's results.
CHAINS = ("rlhf_chain.sh",)
SINGLE = [name for name in NAMES if name not in CHAINS]


@pytest.mark.parametrize("name", NAMES)
def test_the_header_tells_data_needs_and_what_to_change(name: str) -> None:
    script = SCRIPTS / name
    lines = header(script)
    assert os.access(script, os.X_OK)
    assert len(lines[0]) > 20 and not lines[0].startswith(("Data:", "Needs:", "Change:"))
    found = [re.match(r"(Data|Needs|Change): \S", line) for line in lines]
    assert [match[1] for match in found if match] == ["Data", "Needs", "Change"]
    assert all(len(line) <= 129 for line in lines)


@pytest.mark.parametrize(
    "path", [*sorted(SCRIPTS.glob("*.sh")), *sorted((ROOT / "examples").glob("[!s]*/*.sh"))], ids=lambda path: path.name
)
def test_a_shell_can_read_it(path: Path) -> None:
    text = path.read_text()
    shell = "bash" if text.startswith("#!/bin/bash") else "sh"
    assert subprocess.run([shell, "-n", path], capture_output=True).returncode == 0
    assert "0.0.0.0" not in text


@pytest.mark.parametrize("name", SINGLE)
def test_its_commands_are_accepted_as_they_are(name: str, tmp_path: Path) -> None:
    """Parsed and checked by togi's own code, with the placement that a machine of 64 GPUs would give them."""
    given = commands(SCRIPTS / name, tmp_path)
    assert given
    for command in given:
        parsed = command.parsed()
        if isinstance(parsed.config, RLConfig):
            groups = plan_groups(resolve(parsed, Machine(cpus=64, memory_bytes=1 << 40, gpus=64)).config)
            assert sum(group.slots for group in groups) <= 64
