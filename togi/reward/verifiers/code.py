"""builtin:code: 1 if the program in the response passes all tests of the label, else 0. Standard library only.

The program is the response's last fenced block of Python, or else the whole response. The label is one of

* a list of Python tests, each a text with an assert: ["assert add(1, 2) == 3", ...];
* a list of cases {"input": text, "output": text}: the program runs with the input as standard input and must end by itself, having
  printed the output (white space at the ends of lines and of the whole is ignored);
* {"tests": either list, "setup": Python that runs before Python tests, such as their imports};
* the text of one of these as JSON, or of a single Python test.

Any other label abstains. So does a label whose setup fails, or whose tests pass a function or an object of a class to the program:
only plain values cross (``sandbox.calls``). ``tests_passed``, the share of tests, is logged beside the reward.

Programs run in sandboxes (``sandbox.namespaces``): no network, no files but the system's, no environment; with limits on time,
memory, output and processes (``Limits``). If the machine permits none (``isolated`` is logged as 0), a guard inside
Python replaces it, which stops accidents and simple tricks only.

The verdict is made in another process than the program's: neither the expected output nor the tests enter the program's process.
What remains possible: to know the tests by heart, or to guess the values of a few tests.

A program has 10 seconds, and 4 run at once: give large groups a larger ``--reward_timeout``.
"""

import ast
import json
import logging
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

from togi.reward.sandbox.calls import PASSED, UNUSABLE
from togi.reward.sandbox.run import Limits, run_program, run_tests, walls_are_to_be_had
from togi.reward.verifiers import Labels, Texts

FENCE = re.compile(r"^```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
AT_ONCE = 4
LIMITS = Limits()
NO_WALLS = (
    "builtin:code: this machine does not permit Linux namespaces, so programs run behind a guard inside Python, which is "
    "no sandbox: use it with models you trust, or on a machine that permits them."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Case:
    """The input of a program and the output that it must print."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Checks:
    """``python``: tests to run after ``setup``; or ``cases``. One of them is empty."""

    python: tuple[str, ...] = ()
    setup: str = ""
    cases: tuple[Case, ...] = ()


def reward_func(
    queries: Texts, prompts: Texts, labels: Labels, responses: Texts, **kwargs: object
) -> dict[str, object]:
    """1, 0 or None per query. Raises SandboxError, which is transient, if a sandbox cannot be set up."""
    walls = walls_are_to_be_had()
    if not walls:
        _warn_once()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        shares = list(threads.map(partial(passed_share, walls=walls), responses, labels))
    rewards = [None if share is None else float(share == 1) for share in shares]
    return {"rewards": rewards, "extra_logs": {"tests_passed": shares, "isolated": float(walls)}}


@cache
def _warn_once() -> None:
    logger.warning(NO_WALLS)


def passed_share(response: str, label: object, *, walls: bool) -> float | None:
    """The share of the tests that a response passes; None for an invalid label."""
    tests = read_label(label)
    if tests is None:
        return None
    code = program_of(response)
    deadline = time.monotonic() + LIMITS.wall_seconds
    if tests.cases:
        return sum(prints(code, case, deadline, walls=walls) for case in tests.cases) / len(tests.cases)
    outcomes = run_tests(code, tests.setup, tests.python, LIMITS, deadline, walls=walls)
    return None if UNUSABLE in outcomes else outcomes.count(PASSED) / len(tests.python)


def program_of(response: str) -> str:
    """The program in a response."""
    blocks: list[str] = FENCE.findall(response)
    return blocks[-1] if blocks else response


def prints(code: str, case: Case, deadline: float, *, walls: bool) -> bool:
    """Whether a program prints the expected output and ends by itself with status 0."""
    if time.monotonic() >= deadline:
        return False
    ended = run_program(code, case.input, LIMITS, deadline, walls=walls)
    return ended.ended_well and _lines(ended.output) == _lines(case.output)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]


def read_label(label: object) -> Checks | None:
    """The tests of a label; None if it is invalid."""
    if isinstance(label, str):
        try:
            return read_label(json.loads(label))
        except ValueError:
            return _python([label], "")
    if isinstance(label, dict):
        return _listed(label.get("tests"), label.get("setup", "")) if label.keys() <= {"tests", "setup"} else None
    return _listed(label, "")


def _listed(tests: object, setup: object) -> Checks | None:
    if not isinstance(tests, list) or not tests or not isinstance(setup, str):
        return None
    if all(isinstance(test, str) for test in tests):
        return _python(tests, setup)
    cases = []
    for test in tests:
        match test:
            case {"input": str(given), "output": str(expected), **rest} if not rest:
                cases.append(Case(given, expected))
    return Checks(cases=tuple(cases)) if len(cases) == len(tests) and not setup else None


def _python(tests: Sequence[str], setup: str) -> Checks | None:
    """The label of Python tests; None if they do not compile, or if none has an assert: every program would pass."""
    try:
        for text in (setup, *tests):
            compile(text, "<label>", "exec", dont_inherit=True)
        trees = [ast.parse(test) for test in tests]
    except (SyntaxError, ValueError, RecursionError):
        return None
    asserts = any(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree))
    return Checks(python=tuple(tests), setup=setup) if asserts else None
