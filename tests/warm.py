"""Commands of Togi in processes that have imported everything already: forked from a server, which is started once a session.

Importing torch and Transformers takes a command five seconds, and hundreds of commands are run. ``run`` takes the words that
``subprocess.run`` would; ``script`` is what stands for ``togi`` in a shell script. What is about processes themselves (imports,
launchers, signals, kills) starts cold ones, and so are Ray's.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
PRELOADED = [
    "transformers.models.llama.modeling_llama",
    "datasets",
    "peft",
    "togi.cli.commands",
    "togi.model.adapters",
    "togi.rollout.transformers_engine",
    "togi.run.check",
    "togi.run.export",
    "togi.run.infer",
    "togi.run.iterate",
    "togi.run.offline",
    "togi.run.rl",
    "togi.run.serve_rm",
    "togi.workers.local",
]
MESSAGE = 1 << 20
# The client: its words, environment and open files go to the server; its exit status comes back.
CLIENT = """#!{python} -IS
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, {size})
server.connect({address!r})
words = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
files = array.array("i", [0, 1, 2])
server.sendmsg([words], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
os._exit(int(server.recv(16) or b"70"))
"""
# What stands for torchrun --standalone --nproc_per_node N -m togi COMMAND. ``test_launchers`` has the real one.
TORCHRUN = """#!/bin/bash
[[ "$1 $2 $4 $5" == "--standalone --nproc_per_node -m togi" ]] || exit 64
export WORLD_SIZE="$3" LOCAL_WORLD_SIZE="$3" MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
export MASTER_PORT="$({python} -IS -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')"
shift 5
for ((rank = 1; rank < WORLD_SIZE; rank++)); do
  RANK=$rank LOCAL_RANK=$rank {togi} "$@" &
done
RANK=0 LOCAL_RANK=0 {togi} "$@" && wait
"""


def run(words: list[Any], **more: Any) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` of ``[sys.executable, "-m", MODULE, ...]``, in a forked process and with its output captured."""
    assert words[:2] == [sys.executable, "-m"], words[:2]
    asked = [str(word) for word in (script(), *words[1:])]
    return subprocess.run(
        asked, check=False, **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 600, **more}
    )


@cache
def torchrun() -> Path:
    """A program like ``torchrun``, whose processes are forked."""
    program = script().with_name("torchrun")
    program.write_text(TORCHRUN.format(python=sys.executable, togi=script()))
    program.chmod(0o755)
    return program


@cache
def script() -> Path:
    """A program like ``togi`` (or, with ``-m MODULE`` as its first words, like ``python -m MODULE``), for this session."""
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    address, program = str(folder / "socket"), folder / "togi"
    program.write_text(CLIENT.format(python=sys.executable, address=address, size=MESSAGE))
    program.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    words = [sys.executable, "-m", "tests.warm", str(listener.fileno()), str(os.getpid())]
    subprocess.Popen(words, cwd=ROOT, pass_fds=[listener.fileno()], env=os.environ | {"PYTHONPATH": str(ROOT)})
    listener.close()
    return program


def serve(listener: socket.socket, owner: int) -> list[str]:
    """Fork a process for each client. Returns, with its words, only in the forked ones; ends with the session."""
    for module in PRELOADED:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with open_process(owner) as session:
        while True:
            ready, _, _ = select.select([listener, session], [], [])
            if session in ready:
                os._exit(0)
            client, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                return attend(client)
            client.close()


def attend(client: socket.socket) -> list[str]:
    """Fork once more, wait for that process and say how it ended. Returns in it."""
    files = array.array("i")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MESSAGE)
    text, sent, _, _ = client.recvmsg(MESSAGE, socket.CMSG_LEN(3 * files.itemsize))
    files.frombytes(sent[0][2])
    if (child := os.fork()) == 0:
        client.close()
        words, environment, folder = json.loads(text)
        for place, file in enumerate(files):
            os.dup2(file, place)
            os.close(file)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        return words
    for file in files:
        os.close(file)
    with open_process(child) as process:
        # a client that is gone takes its process with it
        if client in select.select([client, process], [], [])[0]:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    client.send(str(os.waitstatus_to_exitcode(status) % 256).encode())
    os._exit(0)


def open_process(number: int) -> TextIO:
    """A file that can be read once the process has ended."""
    return os.fdopen(os.pidfd_open(number))


def main() -> None:
    words = serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        from togi.cli.main import main as run_togi

        sys.argv = ["togi", *words]
        sys.exit(run_togi())


if __name__ == "__main__":
    main()
