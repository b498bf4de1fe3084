"""Compile the C kernels into a shared library, by the machine's own compiler and for its own processor.

That takes two seconds, once. The library is cached in ``$TOGI_CACHE/kernels-UID``. Each user has a folder, because the library is
code that runs in the user's processes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from togi.plan.machine import cache_folder, processor

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("layers.c", "attention.c", "optimizer.c"))
HEADERS = (HERE / "numbers.h",)
# No -ffast-math, because NaN must stay NaN. libgomp is the one that torch has loaded, so both share one thread pool.
_EXACT = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
FLAGS = ("-O3", "-march=native", "-std=c11", *_EXACT, "-fopenmp", "-fPIC", "-shared")


def own_folder(name: str) -> Path:
    """A folder in the cache for executable code of this user alone. Raises OSError if other users can write to it."""
    folder = cache_folder() / f"{name}-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
        raise OSError(f"Others than its user may write to {folder}: remove it.")
    return folder


def processor_mark() -> str:
    """A hash of the processor's name, for caches in a home folder that different machines share."""
    return hashlib.blake2b(processor().encode(), digest_size=8).hexdigest()


def library() -> Path:
    """The path of the library for this source, compiler and processor. Builds it if it is missing.

    Raises OSError if there is no compiler or other users can write to the folder, SubprocessError if compiling fails, and
    ValueError if CC is not a valid command.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("There is none in the PATH.")
    # the name is a hash of all that the library depends on
    sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
    parts = (*sources, str(FLAGS), compiler, torch.__version__, processor())
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    folder = own_folder("kernels")
    path = folder / f"{name}.so"
    if not path.exists():
        start = time.perf_counter()
        # built in a temporary folder and renamed, because other processes may build it at the same time
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / path.name
            words = [*shlex.split(compiler), *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"]
            subprocess.run(words, check=True, capture_output=True, text=True, errors="replace", timeout=120)
            made.replace(path)
        logger.info("Compiled the kernels for the CPU in %.1f s: %s", time.perf_counter() - start, path)
    return path
