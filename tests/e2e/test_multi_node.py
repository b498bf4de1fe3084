"""Two Ray nodes on this machine, the second at another address: actor ranks on both, an engine on the second."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rl_world import GRPO, HF, ROOT, command, loads_in_a_plain_script, metrics

pytestmark = [pytest.mark.busy, pytest.mark.large]

RAY = Path(sys.executable).with_name("ray")
SECONDS = 120


@contextmanager
def two_nodes(first_gpus: int, second_gpus: int) -> Iterator[dict[str, str]]:
    """Declared GPUs, which are worker processes here. The environment of a command that joins."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")  # socket paths must be short
    shared = "--block --num-cpus=4 --object-store-memory=100000000 --disable-usage-stats --min-worker-port=0 "
    shared += (
        "--max-worker-port=0 --dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0 --metrics-export-port=0"
    )
    head = f"--head --port={port} --node-ip-address=127.0.0.1 --num-gpus={first_gpus} --include-dashboard=false"
    other = f"--address=127.0.0.1:{port} --node-ip-address=127.0.0.2 --num-gpus={second_gpus}"
    # a token of its own: a head that finds one of the machine asks for it, and who names an address does not send it
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"} | token
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for words in (f"{head} --temp-dir={temporary}", other):
            nodes.append(
                subprocess.Popen(
                    [str(RAY), "start", *shared.split(), *words.split()],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
            wait_for_nodes(port, len(nodes), environment)
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        for node in reversed(nodes):
            end_session(node.pid)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_nodes(port: int, count: int, environment: Mapping[str, str]) -> None:
    script = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)\n"
    script += "sys.exit(sum(node['Alive'] for node in ray.nodes()) != int(sys.argv[2]))"
    words = [sys.executable, "-c", script, f"127.0.0.1:{port}", str(count)]
    deadline = time.monotonic() + SECONDS
    while subprocess.run(words, env=environment, capture_output=True, check=False).returncode != 0:
        assert time.monotonic() < deadline, f"Ray has not got {count} nodes"
        time.sleep(0.5)


def end_session(session: int) -> None:
    """Every process that a node started, whichever group it is in: ``ray stop`` would end those of others too."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(status.read_text().rpartition(")")[2].split()[3]) == session:
                    os.kill(int(status.parent.name), kind)
            except (FileNotFoundError, ProcessLookupError):
                continue
        time.sleep(1)


def test_a_run_over_two_nodes(world: Path, tmp_path: Path) -> None:
    """Ranks of one model on two nodes and weights between them; a third node is refused at once."""
    flags = [*GRPO, *HF, "--max_steps", "2", "--zero_stage", "3", "--actor_num_gpus_per_node", "1"]
    with two_nodes(1, 2) as environment:

        def start(name: str, *more: str, **other: str) -> subprocess.CompletedProcess[str]:
            words, names = command(world, tmp_path / name, *flags, *more), environment | other
            return subprocess.run(words, cwd=ROOT, env=names, capture_output=True, text=True, timeout=400)

        refused = start("three", "--actor_num_nodes", "3", "--vllm_num_engines", "3", "--colocate_all_models")
        unknown = start("unknown", RAY_AUTH_MODE="disabled", RAY_gcs_server_request_timeout_seconds="3")
        done = start("two", "--actor_num_nodes", "2", "--vllm_num_engines", "1")
    assert refused.returncode == 2
    assert "--actor_num_nodes 3 needs 3 nodes, but there are 2" in refused.stderr
    assert unknown.returncode == 2, unknown.stderr
    assert (
        f"RAY_ADDRESS {environment['RAY_ADDRESS']} does not answer: start it, or set RAY_AUTH_MODE=token"
        in unknown.stderr
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    # the first node has the address that Ray finds for this machine
    assert re.search(r"^nodes: engine 127\.0\.0\.2 x 1; actor 127\.0\.0\.2 x 1, [\d.]+ x 1$", done.stdout, re.M), (
        done.stdout
    )
    assert "weights travel by gloo" in done.stdout
    records = [record["values"] for record in metrics(tmp_path / "two")]
    assert len(records) == 2
    for values in records:  # float32 on all sides: the engine has the weights of each step
        assert values["mismatch/probe_mean_abs"] < 1e-4
        assert values["mismatch/max_ratio"] == pytest.approx(1, abs=1e-3)
    assert records[0]["policy/grad_norm"] > 0
    assert json.loads((tmp_path / "two" / "status.json").read_text())["state"] == "finished"
    loads_in_a_plain_script(tmp_path / "two" / "model")
