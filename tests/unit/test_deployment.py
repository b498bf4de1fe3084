"""Images, their helpers and the Kubernetes job, as far as they can be judged without Docker and a cluster."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.offline_world import ROOT
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.plan.machine import Machine
from togi.plan.placement import arithmetic, check_fits, plan_groups, resolve

DOCKER = ROOT / "docker"
IMAGES = {"cuda.Dockerfile": "--gpu", "cpu.Dockerfile": "--cpu"}


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their words, comments left out and lines joined."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_made_by_the_projects_own_set_up(name: str) -> None:
    """So that its versions are those of requirements, and are written down once."""
    steps = instructions(name)
    runs = [words for step, words in steps if step == "RUN"]
    assert sum(f"python scripts/setup.py .venv {IMAGES[name]}" in words for words in runs) == 1
    assert not any(re.search(r"pip install|==\d", words) for words in runs), "a version outside the lock"
    for words in runs:
        assert subprocess.run(["bash", "-n", "-c", words], capture_output=True).returncode == 0, words
    base = dict(steps)["FROM"]
    python = re.fullmatch(r"python:(\d+\.\d+)-slim-bookworm", base)
    assert python and f"(Python {python[1]}, Linux)" in (ROOT / "requirements" / "cpu.lock").read_text()


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_nobody_special(name: str) -> None:
    steps = instructions(name)
    users = [i for i, (step, _) in enumerate(steps) if step == "USER"]
    assert [steps[i][1] for i in users] == ["togi"], "one user, and not root"
    assert all(step != "RUN" or "setup.py" not in words for step, words in steps[: users[0]])
    text = (DOCKER / name).read_text()
    assert not re.search(r"passwd|password|secret|token|0\.0\.0\.0|sudo|sshd|\bchmod (-R )?777", text, re.IGNORECASE)


@pytest.mark.parametrize("name", IMAGES)
def test_all_that_the_set_up_reads_is_copied(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", "scripts", "requirements", "togi", project["readme"], *project["license-files"]}
    copied = {
        source
        for step, words in instructions(name)
        if step == "COPY"
        for source in [word for word in words.split() if not word.startswith("--")][:-1]
    }
    assert needed <= copied and all((ROOT / source).exists() for source in copied)
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all(any(fnmatch.fnmatch(source, pattern) for pattern in allowed) for source in copied)


@pytest.mark.parametrize(("words", "gpu"), [(["--gpu"], True), (["--cpu"], False), ([".venv", "--gpu"], True)])
def test_the_set_up_is_told_what_the_image_is_for(words: list[str], gpu: bool) -> None:
    assert set_up()["is_for_gpu"](words) is gpu


def set_up() -> dict[str, Any]:
    """What scripts/setup.py defines."""
    namespace: dict[str, Any] = {"__name__": "setup", "__file__": str(ROOT / "scripts" / "setup.py")}
    exec((ROOT / "scripts" / "setup.py").read_text(), namespace)
    return namespace


PIP = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
    *"config list") echo "global.index-url='https://index.example/simple'"
        echo "install.find-links='/wheels /more'"
        echo ":env:.index-url='https://mine.example/simple'"
        echo ":env:.cert='/etc/mine.pem'" ;;
    *" uv") exit "$NO_UV" ;;
esac
"""


@pytest.mark.parametrize("no_uv", [0, 1])
def test_uv_asks_what_pip_would_ask_and_pip_does_it_without_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_uv: int
) -> None:
    python = tmp_path / "python"
    python.write_text(PIP)
    python.chmod(0o755)
    for name, value in {"CALLS": tmp_path / "calls", "NO_UV": no_uv, "PATH": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("SSL_CERT_FILE", "")
    monkeypatch.delenv("SSL_CERT_FILE")
    installer = set_up()["Installer"](python, use_uv=True)
    if not no_uv:
        (tmp_path / "uv").write_text('#!/bin/sh\necho "uv $*, $SSL_CERT_FILE" >>"$CALLS"\n')
        (tmp_path / "uv").chmod(0o755)
    assert installer.is_uv == (not no_uv)
    assert installer.install("--no-deps", "some==1")
    call = (tmp_path / "calls").read_text().splitlines()[-1]
    if no_uv:
        assert call == "-m pip install --quiet --disable-pip-version-check --no-deps some==1"
    else:
        words = f"uv pip install --python {python} --index-strategy unsafe-best-match --compile-bytecode"
        words += " --index-url https://mine.example/simple --find-links /wheels --find-links /more"
        assert call == f"{words} --no-deps some==1, /etc/mine.pem"


def stand_ins(folder: Path, *names: str) -> dict[str, str]:
    """An environment in which these programs only note how they were called."""
    folder.mkdir()
    for name in names:
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>"$CALLS"\n')
        program.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_the_container_runs_as_the_caller_and_sees_one_folder(tmp_path: Path, kind: str) -> None:
    environment = stand_ins(tmp_path / "bin", "docker") | {"KIND": kind, "DATA": "/some/data"}
    done = subprocess.run([DOCKER / "run.sh", "togi", "rl", "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    build, run = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert build == f"docker build --file {DOCKER}/{kind}.Dockerfile --tag togi:{kind} {ROOT}"
    assert f"--user {os.getuid()}:{os.getgid()}" in run and "--volume /some/data:/data" in run
    assert ("--gpus=all" in run) == (kind == "cuda")
    assert ("--ulimit=memlock=-1" in run) == (kind == "cuda")
    assert run.endswith(f"togi:{kind} togi rl --help") and "--privileged" not in run
    assert "--network bridge" in run and "--device" not in run


@pytest.mark.parametrize("has_infiniband", [True, False])
def test_containers_of_several_nodes_reach_each_other(tmp_path: Path, has_infiniband: bool) -> None:
    card = tmp_path / "infiniband"
    if has_infiniband:
        card.mkdir()
    environment = stand_ins(tmp_path / "bin", "docker") | {"NETWORK": "host", "INFINIBAND": str(card)}
    subprocess.run([DOCKER / "run.sh", "togi", "--help"], env=environment, check=True)
    run = (tmp_path / "bin" / "calls").read_text().splitlines()[1]
    assert "--network host" in run and (f"--device={card}" in run) == has_infiniband


def test_the_container_toolkit_is_installed_from_a_signed_source(tmp_path: Path) -> None:
    programs = ("nvidia-smi", "docker", "curl", "gpg", "apt-get", "sudo")
    done = subprocess.run(
        [DOCKER / "nvidia_setup.sh"], env=stand_ins(tmp_path / "bin", *programs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    calls = [" ".join(call.split()[:3]) for call in (tmp_path / "bin" / "calls").read_text().splitlines()]
    order = ["nvidia-smi", "curl --fail --silent", "gpg --batch --yes", "sudo install -m", "sudo install -m"]
    order += ["sudo apt-get update", "sudo apt-get install", "sudo nvidia-ctk runtime", "sudo systemctl restart"]
    assert calls == [*order, "docker run --rm"]
    assert "signed-by=$key" in (DOCKER / "nvidia_setup.sh").read_text()


def test_the_container_set_up_says_what_is_missing(tmp_path: Path) -> None:
    environment = stand_ins(tmp_path / "bin", "docker") | {"PATH": f"{tmp_path}/bin:/bin:/usr/bin"}
    done = subprocess.run([DOCKER / "nvidia_setup.sh"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "nvidia-smi is missing: install it first\n")


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "cluster" / "rayjob.yaml").read_text())
    return loaded


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_command_of_the_ray_job_is_togis_and_fits_its_workers(job: dict[str, Any]) -> None:
    """Neither more nor fewer GPUs than the workers have."""
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "togi.cli.train_ppo_ray"]
    parsed = parse(RLConfig, words[3:], "rl")
    check_rl(parsed.config)
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = workers["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    groups = plan_groups(resolve(parsed, Machine(cpus=64, memory_bytes=1 << 40, gpus=gpus)).config)
    check_fits(groups, gpus)
    assert sum(group.slots for group in groups) == gpus, arithmetic(groups, "GPUs")
    assert parsed.config.actor_num_nodes == workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    written = (parsed.config.run_dir, parsed.config.save_path, parsed.config.ckpt_path, parsed.config.prompt_data)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/data" in mounts and all(str(path).startswith("/data/") for path in written)


def test_the_pods_of_the_ray_job_are_the_projects_image_without_rights(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    lock = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    assert f"ray=={cluster['rayVersion']}" in lock
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP", "nothing is open outside the cluster"
    for pod in pods(job):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        (container,) = pod["containers"]
        assert container["image"] == "REGISTRY/togi:cuda"
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        paths = {entry["value"] for entry in container["env"]}
        image = dict(
            pair.split("=") for step, rest in instructions("cuda.Dockerfile") if step == "ENV" for pair in rest.split()
        )
        assert paths <= set(image.values())
