"""The scripts of examples/scripts, seen without running anything heavy: their headers, and the commands they really give."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import warm
from tests.offline_world import ROOT
from togi.config.fields import Settings
from togi.config.infer import ChatConfig, InferConfig, check_chat, check_infer
from togi.config.iterate import IterateConfig, check_iterate
from togi.config.parse import Parsed, parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.config.tools import ExportConfig, MergeConfig, RLCheckConfig, ServeRMConfig, check_serve_rm
from togi.methods import METHODS, check_method

SCRIPTS = ROOT / "examples" / "scripts"
BIN = Path(sys.executable).parent
NAMES = sorted(path.name for path in SCRIPTS.glob("*.sh") if not path.name.startswith("common"))
# What the scripts ask the environment for and cannot have a default.
NEEDED = {"RM": "first-rm,second-rm", "RUN": "run", "OUT": "out"}
# In the place of togi and torchrun: notes the words it was given, one NUL after each, and a record separator at the end.
RECORDER = """#!/bin/sh
for word; do printf '%s\\0' "$word"; done >>"$RECORD"
printf '\\036' >>"$RECORD"
"""
# In the place of togi: rounds of togi iterate run in its own process.
ONE_PROCESS = """#!{python}
import sys
from tests.offline_world import call
from togi.cli.main import main
from togi.run.iterate import start_iterate
start_iterate.__kwdefaults__["launch"] = call
sys.exit(main())
"""
CHECKS: dict[str, Any] = {
    "rl": (RLConfig, lambda parsed: check_rl(parsed.config)),
    "check rl": (RLCheckConfig, lambda parsed: check_rl(parsed.config)),
    "infer": (InferConfig, check_infer),
    "iterate": (IterateConfig, check_iterate),
    "chat": (ChatConfig, check_chat),
    "serve-rm": (ServeRMConfig, lambda parsed: check_serve_rm(parsed.config, has_token=False)),
    "merge-lora": (MergeConfig, lambda parsed: None),
    "export": (ExportConfig, lambda parsed: None),
    **{command: (config, check_method) for command, config in METHODS.items()},
}


@dataclass(frozen=True, slots=True)
class Command:
    """One togi command of a script. ``processes``: how many torchrun would start, 1 without it."""

    name: str
    flags: tuple[str, ...]
    processes: int = 1

    def parsed(self) -> Parsed[Settings]:
        """The settings, after the checks of the command. Raises ConfigError."""
        config, check = CHECKS[self.name]
        parsed: Parsed[Settings] = parse(config, self.flags, self.name)
        check(parsed)
        return parsed


def run_script(
    script: str, *flags: object, stdin: str | None = None, **variables: object
) -> subprocess.CompletedProcess[str]:
    """A script as users start it; what it said is shown where it fails."""
    names = {"TOGI": warm.script(), "TORCHRUN": warm.torchrun(), "PYTHONPATH": ROOT, **variables}
    done = subprocess.run(
        [SCRIPTS / script, *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in names.items()},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def commands(script: Path, folder: Path, *flags: str, **variables: object) -> list[Command]:
    """What a script starts, in its order, found by running it with a recorder for togi and torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    recorder, record = folder / "recorder", folder / "record"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    record.unlink(missing_ok=True)
    names = {"TOGI": recorder, "TORCHRUN": recorder, "RECORD": record, **NEEDED, **variables}
    environment = os.environ | {name: str(value) for name, value in names.items()}
    done = subprocess.run([script, *flags], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [command_of(each.split("\0")[:-1]) for each in record.read_text().split("\x1e")[:-1]]


def command_of(words: list[str]) -> Command:
    """Recorded words as a command: ``togi NAME flags``, or torchrun's words and then the flags."""
    if words[0] == "check":
        return Command(f"check {words[1]}", tuple(words[2:]))
    if "-m" not in words:
        return Command(words[0], tuple(words[1:]))
    module = words.index("-m") + 1
    processes = int(words[words.index("--nproc_per_node") + 1])
    assert words[module] == "togi"
    return Command(words[module + 1], tuple(words[module + 2 :]), processes)


def header(script: Path) -> list[str]:
    """The comment lines at the top, without the first line and without the marks."""
    lines = script.read_text().splitlines()[1:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line[1:].strip() for line in lines[:end]]
