"""Make the virtual environment: ``python scripts/setup.py .venv [--cpu | --gpu]``. Standard library only.

Without a GPU: the CPU build of torch and the tested versions of requirements/cpu.lock. With a GPU: the project with its vLLM
extra from the package index. --cpu and --gpu say which, where it is made on another machine than it is for (an image). Does
nothing when the environment is already made from the same files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "cpu.lock"
TORCH = "2.13.0"
DEEPSPEED = "0.19.8"


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
    python = target / "bin" / "python"
    if gpu:
        pip(python, "-e", f"{ROOT}[vllm,cluster,lora,trackers,rewards,dev]")
        install_deepspeed(python)
    else:
        install_cpu(python)
    stamp.write_text(wanted)
    say(f"done in {time.monotonic() - start:.0f} s: {target.name}/bin/togi --help")
    return 0


def is_for_gpu(words: list[str]) -> bool:
    """Whether a GPU will be there: as asked for, or as this machine has one."""
    if "--gpu" in words or "--cpu" in words:
        return "--gpu" in words
    return shutil.which("nvidia-smi") is not None


def install_cpu(python: Path) -> None:
    """torch's CPU build, then every other package at its tested version, then this project."""
    say(f"installing torch {TORCH} (CPU build)")
    wanted = f"torch=={TORCH}"
    if not pip(python, "--no-deps", f"{wanted}+cpu", check=False):
        # The package index that pip asks has no CPU build; uv knows where PyTorch publishes it.
        pip(python, "uv")
        uv = ("-m", "uv", "pip", "install", "--no-deps", "--torch-backend", "cpu", "--python", str(python), wanted)
        if not run(python, *uv, check=False):
            say("no CPU build of torch can be reached: taking the default build, which is several GB")
            pip(python, wanted)
    say("installing the tested versions of all other packages")
    pip(python, "--no-deps", "-r", str(LOCK))
    install_deepspeed(python, "--no-deps")
    pip(python, "--no-deps", "--no-build-isolation", "-e", str(ROOT))


def install_deepspeed(python: Path, *arguments: str) -> None:
    """DeepSpeed comes as source. Its kernels are compiled when they are first used, not here, and it asks the installed torch."""
    os.environ["DS_BUILD_OPS"] = "0"
    pip(python, *arguments, "--no-build-isolation", f"deepspeed=={DEEPSPEED}")


def pip(python: Path, *arguments: str, check: bool = True) -> bool:
    return run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments, check=check)


def run(python: Path, *arguments: str, check: bool = True) -> bool:
    done = subprocess.run([str(python), *arguments], capture_output=not check)
    if check and done.returncode != 0:
        sys.exit(f"set-up failed in: python {' '.join(arguments)}")
    return done.returncode == 0


def fingerprint() -> str:
    digest = hashlib.sha256()
    for path in (LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
