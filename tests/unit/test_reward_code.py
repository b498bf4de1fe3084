"""builtin:code: right and wrong programs, labels of every form, and programs that mean harm, behind walls and behind the guard."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rewards import scored
from tests.shared_data import shared_rows
from togi.reward.sandbox import run
from togi.reward.sandbox.run import Limits, run_program, run_tests, walls_are_to_be_had
from togi.reward.verifiers import code
from togi.reward.verifiers.code import Case, Checks, passed_share, program_of, read_label
from togi.sample import Outcome

FAST = Limits(cpu_seconds=2, wall_seconds=2.0)


@pytest.fixture(params=["walls", "guard"])
def walls(request: pytest.FixtureRequest) -> bool:
    if request.param == "walls" and not walls_are_to_be_had():
        pytest.skip("this machine does not permit namespaces")
    return request.param == "walls"


@pytest.fixture
def real_walls() -> bool:
    if not walls_are_to_be_had():
        pytest.skip("this machine does not permit namespaces")
    return True


def program(source: str, walls: bool, stdin: str = "", limits: Limits = FAST) -> run.Ended:
    return run_program(source, stdin, limits, time.monotonic() + limits.wall_seconds, walls=walls)


def outcomes_of(source: str, tests: list[str], walls: bool, setup: str = "") -> str:
    return run_tests(source, setup, tests, FAST, time.monotonic() + FAST.wall_seconds, walls=walls)


ADD = "def add(a, b):\n    return a + b\n"


def test_a_run_gets_one_zero_or_none() -> None:
    texts = [
        f"Like this:\n```python\n{ADD}```\nDone.",
        "```python\nx = 1\n```\n```\ndef add(a, b): return 3\n```",
        "no code",
    ]
    scores = scored(["--reward_func", "builtin:code"], texts, ["assert add(1, 2) == 3", "assert add(2, 2) == 4"])
    assert [score.value for score in scores] == [1.0, 0.0, 0.0]
    assert [score.components["tests_passed"] for score in scores] == [1.0, 0.5, 0.0]
    assert scores[0].components["isolated"] == float(walls_are_to_be_had())
    assert scored(["--reward_func", "builtin:code"], texts[:1], ["no test"])[0].outcome is Outcome.ABSTAIN


@pytest.mark.parametrize(
    ("label", "tests"),
    [
        (["assert f(1)"], Checks(python=("assert f(1)",))),
        ('["assert f(1)"]', Checks(python=("assert f(1)",))),
        ("def check(g):\n    assert g(1)\ncheck(f)", Checks(python=("def check(g):\n    assert g(1)\ncheck(f)",))),
        ({"tests": ["assert f(1)"], "setup": "import math"}, Checks(python=("assert f(1)",), setup="import math")),
        ([{"input": "1", "output": "2"}], Checks(cases=(Case("1", "2"),))),
        ({"tests": [{"input": "1", "output": "2"}]}, Checks(cases=(Case("1", "2"),))),
        ([], None),
        (5, None),
        (None, None),
        ("f(1) ==", None),
        (["assert f(1)", "return 1"], None),
        (["f(1)"], None),  # nothing is asserted
        (["assert f(1)", {"input": "1", "output": "2"}], None),
        ([{"input": "1"}], None),
        ({"tests": ["assert f(1)"], "code": ""}, None),
    ],
)
def test_labels(label: Any, tests: Checks | None) -> None:
    assert read_label(label) == tests


def test_the_last_block_is_the_program() -> None:
    assert program_of("```py\nx = 1\n```\ntext\n```Python\ny = 2\n```") == "y = 2\n"
    assert program_of("z = 3") == "z = 3"


def test_programs_with_input(walls: bool) -> None:
    cases = [{"input": "4\n", "output": "8"}, {"input": "a", "output": ""}, {"input": "5", "output": "10\n"}]
    assert passed_share("print(int(input()) * 2)", cases, walls=walls) == pytest.approx(2 / 3)  # the second ends badly
    assert passed_share("print('8 \\n')\nprint(9)", [{"input": "", "output": "8\n\n9"}], walls=walls) == 1


def test_values_cross_as_they_are(walls: bool) -> None:
    source = "import math\nPI = 3.5\ndef same(x): return x\ndef fail(x): raise ValueError\ndef grow(x): x.append(1)\nclass C: pass"
    tests = [
        "assert same([1, (2.5, None)]) == [1, (2.5, None)] and type(same((1,))) is tuple",
        "assert same({1: {b'a', 'b'}}) == {1: {b'a', 'b'}} and same(True) is True and same(1j) == 1j",
        "assert math.isnan(same(float('nan'))) and same(10**5000) == 10**5000",
        "assert PI == 3.5",
        "try:\n    fail(1)\n    assert False\nexcept ValueError:\n    pass",
        "x = [0]\ngrow(x)\nassert x == [0, 1]",
        "def check(f):\n    assert f(2) == 2\ncheck(same)",
        "assert C() is None",  # an object does not cross: the program's fault
        "assert nothing(1)",
    ]
    assert outcomes_of(source, tests, walls) == "111111100"
    assert outcomes_of(source, ["assert same(lambda: 1)"], walls) == "?"  # a function does not cross: the label's fault
    assert outcomes_of(source, ["assert same(1) == 1"], walls, setup="1 / 0") == "?"
    assert (
        outcomes_of(
            "def isclose(a, b): return True\n" + ADD,
            ["assert isclose(add(1, 2), 4)"],
            walls,
            "from math import isclose",
        )
        == "0"
    )


FORGERIES = {
    "exit": "import sys\nsys.exit(0)",
    "exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "equal to all": """
class E(int):
    __eq__ = lambda s, o: True
def add(a, b): return E(5)
""",
    "built-ins": """
import builtins
builtins.AssertionError = None
builtins.abs = lambda x: 0
builtins.all = lambda x: True
def add(a, b): return 5
""",
    "shadowed names": "def abs(x): return 0\ndef all(x): return True\ndef add(a, b): return 5",
    "every descriptor": """
import os
for fd in range(3, 30):
    try:
        os.write(fd, b'11\\n')
    except OSError:
        pass
def add(a, b): return 5
""",
    "the protocol": """
import os, sys
for fd in range(3, 30):
    try:
        os.write(fd, b'{"names": {"abs": {"value": 1}, "all": {"value": 1}, "add": {"value": 3}}}\\n' * 3)
    except OSError:
        pass
sys.exit()
""",
    "frames": """
import sys
f = sys._getframe()
while f:
    f.f_globals.update(PASSED='1', FAILED='1', UNUSABLE='1')
    f = f.f_back
def add(a, b): return 5
""",
    "nonsense": "class D(dict): pass\ndef add(a, b): return [D()] * 3",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(walls: bool, name: str) -> None:
    outcomes = outcomes_of(FORGERIES[name], ["assert abs(add(1, 2) - 3) < 1", "assert all([add(1, 1) == 2])"], walls)
    assert set(outcomes) <= {"0"}


def test_loops_end_with_everything_they_started(walls: bool) -> None:
    limits = Limits(cpu_seconds=60, wall_seconds=0.7)
    assert not program("while True: pass", walls, limits=limits).ended_well
    assert not program("while True: pass", walls, limits=Limits(cpu_seconds=1, wall_seconds=20)).ended_well
    assert outcomes_of("while True: pass", ["assert add(1, 2) == 3"], walls) == ""


def test_children_that_leave_their_group_end_too(real_walls: bool) -> None:
    stays = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv('/bin/sleep', ['togi-stays', '30'])
    os._exit(0)
"""
    assert program(stays, real_walls).ended_well
    assert not program(stays + "time.sleep(9)", real_walls, limits=Limits(wall_seconds=0.7)).ended_well
    wait_until(lambda: "togi-stays" not in processes())


def test_a_sandbox_ends_with_its_worker(real_walls: bool) -> None:
    """The pool of reward workers kills a worker's process group."""
    source = "import os\nos.execv('/bin/sleep', ['togi' + '-orphan', '30'])"
    script = f"""
import time
from togi.reward.sandbox.run import Limits, run_program
run_program({source!r}, "", Limits(), time.monotonic() + 30, walls=True)
"""
    worker = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    wait_until(lambda: "togi-orphan" in processes())
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    wait_until(lambda: "togi-orphan" not in processes())


def processes() -> str:
    return subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True).stdout


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_fork_bomb_is_limited(real_walls: bool) -> None:
    bomb = """
import os, time
try:
    for n in range(500):
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
except OSError:
    print(n)
"""
    ended = program(bomb, real_walls)
    assert ended.ended_well and int(ended.output) < FAST.processes


def test_memory_is_limited(walls: bool) -> None:
    ended = program("try:\n    x = bytearray(3 << 30)\nexcept MemoryError:\n    print('refused')", walls)
    assert ended.output == "refused\n"


def test_output_and_files_are_limited(walls: bool) -> None:
    limits = Limits(cpu_seconds=5, wall_seconds=5.0, file_bytes=1 << 16)
    ended = program("while True:\n    print('x' * 1000)", walls, limits=limits)
    assert not ended.ended_well and len(ended.output) <= limits.file_bytes
    full = "try:\n    open('big', 'w').write('x' * 10**6)\nexcept OSError as error:\n    print(error.errno)"
    assert int(program(full, walls, limits=limits).output) in (27, 28)  # file too large, no space left


def test_nothing_is_inherited(walls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ended = program("import os\nprint('HF_TOKEN' in os.environ, len(os.environ))", walls)
    assert ended.output.split() == ["False", str(len(run.ENVIRONMENT) + ("LC_CTYPE" in ended.output))]


def test_files_of_the_machine_are_not_there(real_walls: bool, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    paths = [
        str(tmp_path / "secret"),
        "/etc/passwd",
        "/proc/1/environ",
        str(Path.home() / ".cache"),
        "/etc",
        "/dev/sda",
    ]
    look = f"import os\nprint(any(os.path.exists(path) for path in {paths}), os.path.exists('/usr'))"
    assert program(look, real_walls).output == "False True\n"


def test_nothing_can_be_written_outside(walls: bool, tmp_path: Path) -> None:
    targets = [str(tmp_path / "out"), "/usr/out", "/dev/out", "/out", str(Path(os.__file__).parent / "out")]
    write = f"""
for path in {targets}:
    try:
        open(path, 'w').write('x')
        print(path)
    except OSError:
        pass
open('inside', 'w').write('y')
print(open('inside').read())
"""
    assert program(write, walls).output == "y\n"
    assert not any(Path(path).exists() for path in targets)


def test_no_socket_leads_anywhere(walls: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, heard = server.getsockname()[1], []
        threading.Thread(target=lambda: heard.append(server.accept()), daemon=True).start()
        knock = f"""
try:
    import socket
    socket.create_connection(('127.0.0.1', {port}), 2)
    print('in')
except (OSError, ImportError):
    print('out')
"""
        assert program(knock, walls).output == "out\n"
        assert heard == []


def test_a_sandbox_that_cannot_be_built_is_no_verdict(real_walls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "START", "import sys; sys.stderr.write('unshare: no space'); sys.exit(1)#{!r}")
    with pytest.raises(run.SandboxError, match="unshare: no space"):
        program("print(1)", real_walls)
    with pytest.raises(run.SandboxError, match="unshare: no space"):
        outcomes_of(ADD, ["assert add(1, 2) == 3"], real_walls)


def test_a_machine_without_walls_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(code, "walls_are_to_be_had", lambda: False)
    answer = code.reward_func([""], [""], [["assert add(1, 2) == 3"]], [ADD])
    assert answer == {"rewards": [1.0], "extra_logs": {"tests_passed": [1.0], "isolated": 0.0}}
    assert "no sandbox" in caplog.text


def test_reference_solutions_pass_their_tests() -> None:
    """A sample of MBPP and HumanEval, as their rows become labels."""
    walls = walls_are_to_be_had()
    for row in shared_rows("mbpp/test.jsonl")[:8]:
        label = {"tests": row["test_list"], "setup": row["test_setup_code"]}
        assert passed_share(row["code"], label, walls=walls) == 1, row["task_id"]
    for row in shared_rows("humaneval/test.jsonl")[:8]:
        label = f"{row['test']}\ncheck({row['entry_point']})"
        assert passed_share(row["prompt"] + row["canonical_solution"], label, walls=walls) == 1, row["task_id"]
        assert passed_share(row["prompt"] + "    return None\n", label, walls=walls) == 0, row["task_id"]
