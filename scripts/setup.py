"""Make the virtual environment: ``python scripts/setup.py .venv [--cpu | --gpu] [--pip]``. Standard library only.

Without a GPU: the CPU build of torch and the tested versions of requirements/cpu.lock. With a GPU: those of
requirements/gpu.lock, which need NVIDIA's driver and no CUDA toolkit. --cpu and --gpu say which, where it is made on another
machine than it is for (an image). Does nothing when the environment is already made from the same files.

uv installs, which downloads and unpacks several packages at a time; it is told what pip is configured to ask. Where uv cannot
be had, or with --pip, pip does the same.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_LOCK = ROOT / "requirements" / "cpu.lock"
GPU_LOCK = ROOT / "requirements" / "gpu.lock"
TORCH = "2.13.0"
DEEPSPEED = "0.19.8"
# Its kernels are compiled when they are first used, not here; and its set-up does not look for a CUDA toolkit, which it would
# stop without, once torch finds a GPU.
DEEPSPEED_VARIABLES = {"DS_BUILD_OPS": "0", "DS_IGNORE_CUDA_DETECTION": "1"}
# What uv calls the settings of pip: options, of which some take several values, and variables of the environment.
OPTIONS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
VARIABLES = {"cert": "SSL_CERT_FILE", "timeout": "UV_HTTP_TIMEOUT", "default-timeout": "UV_HTTP_TIMEOUT"}


def main() -> int:
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    target = (ROOT / words[0]).resolve() if words else ROOT / ".venv"
    if sys.version_info < (3, 11):
        print(f"togi needs Python 3.11 or newer, this is {sys.version.split()[0]}: make setup PYTHON=python3.11")
        return 2
    gpu = is_for_gpu(sys.argv[1:])
    stamp = target / "togi-setup.sha256"
    wanted = f"{fingerprint()} {'gpu' if gpu else 'cpu'}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0
    start = time.monotonic()
    say(f"making {target.name} for a machine {'with' if gpu else 'without'} a GPU (a few minutes the first time)")
    if not (target / "bin" / "python").exists():
        venv.create(target, with_pip=True)
    installer = Installer(target / "bin" / "python", use_uv="--pip" not in sys.argv)
    if gpu:
        say("installing the tested versions, several GB: CUDA 13, which needs NVIDIA's driver R580 or newer")
        installer.install("--no-deps", "-r", str(GPU_LOCK))
    else:
        install_cpu(installer)
    install_deepspeed(installer)
    installer.install("--no-deps", "--no-build-isolation", "-e", str(ROOT))
    stamp.write_text(wanted)
    say(f"done in {time.monotonic() - start:.0f} s: {target.name}/bin/togi --help")
    return 0


def is_for_gpu(words: list[str]) -> bool:
    """Whether a GPU will be there: as asked for, or as this machine has one."""
    if "--gpu" in words or "--cpu" in words:
        return "--gpu" in words
    return shutil.which("nvidia-smi") is not None


class Installer:
    """Installs into one environment: by uv, found on PATH or taken from the package index, else by pip."""

    def __init__(self, python: Path, *, use_uv: bool) -> None:
        self.python = python
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        self._command = pip
        uv = shutil.which("uv") or str(python.with_name("uv"))
        if use_uv and (Path(uv).exists() or run([*pip, "uv"], check=False)):
            options, variables = as_uv(pip_settings(python))
            os.environ |= {name: value for name, value in variables.items() if name not in os.environ}
            # as pip chooses: the newest version of all indexes, not the first index that has any
            self._command = [uv, "pip", "install", "--python", str(python), "--index-strategy", "unsafe-best-match"]
            # as pip does: where processes may not write bytecode, each would compile some 15 s at its start
            self._command += ["--compile-bytecode", *options]
        elif use_uv:
            say("uv cannot be installed: pip takes a few minutes more")

    @property
    def is_uv(self) -> bool:
        return "--index-strategy" in self._command

    def install(self, *arguments: str, check: bool = True) -> bool:
        """Whether it could be installed; with ``check`` the set-up ends where it cannot."""
        return run([*self._command, *arguments], check=check)


def pip_settings(python: Path) -> dict[str, str]:
    """What pip is configured to do, by its files and the environment: ``pip config list``, of which later lines win."""
    words = [str(python), "-m", "pip", "config", "list"]
    listed = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    found = {"global": {}, "install": {}, ":env:": {}}
    for key, _, value in (line.partition("=") for line in listed):
        section, _, name = key.partition(".")
        if section in found and value:
            found[section][name] = str(ast.literal_eval(value))
    return found["global"] | found["install"] | found[":env:"]


def as_uv(settings: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Settings of pip as options of uv, and as variables of its environment."""
    options = [
        word for name, option in OPTIONS.items() for value in settings.get(name, "").split() for word in (option, value)
    ]
    return options, {VARIABLES[name]: value for name, value in settings.items() if name in VARIABLES}


def install_cpu(installer: Installer) -> None:
    """torch's CPU build, then every other package at its tested version."""
    say(f"installing torch {TORCH} (CPU build)")
    wanted = f"torch=={TORCH}"
    if not installer.install("--no-deps", f"{wanted}+cpu", check=False):
        # The package index that was asked has no CPU build; uv knows where PyTorch publishes it.
        backend = ("--torch-backend", "cpu") if installer.is_uv else ()
        if not (backend and installer.install("--no-deps", *backend, wanted, check=False)):
            say("no CPU build of torch can be reached: taking the default build, which is several GB")
            installer.install(wanted)
    say("installing the tested versions of all other packages")
    installer.install("--no-deps", "-r", str(CPU_LOCK))


def install_deepspeed(installer: Installer) -> None:
    """DeepSpeed comes as source, and its set-up asks the installed torch. All else works without it."""
    os.environ |= DEEPSPEED_VARIABLES
    if not installer.install("--no-deps", "--no-build-isolation", f"deepspeed=={DEEPSPEED}", check=False):
        say(
            f"DeepSpeed {DEEPSPEED} cannot be built: --backend deepspeed is not there; --backend fsdp2, the default, is"
        )


def run(words: list[str], *, check: bool = True) -> bool:
    done = subprocess.run(words, capture_output=not check)
    if check and done.returncode != 0:
        sys.exit(f"set-up failed in: {' '.join(words)}")
    return done.returncode == 0


def fingerprint() -> str:
    digest = hashlib.sha256()
    for path in (CPU_LOCK, GPU_LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
