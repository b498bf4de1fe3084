"""The C kernels for CPUs as a library, built by the machine's own compiler for the processor at hand.

That takes two seconds, once; the library stays in ``$TOGI_CACHE/kernels-UID``, a folder for each user: it is code that they run.
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
# NaN must stay NaN: no -ffast-math. libgomp is the one that torch has loaded, so both share one pool of threads.
_EXACT = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
FLAGS = ("-O3", "-march=native", "-std=c11", *_EXACT, "-fopenmp", "-fPIC", "-shared")


def own_folder(name: str) -> Path:
    """A folder in the cache for code that is run, of this user alone. Raises OSError where others could have written it."""
    folder = cache_folder() / f"{name}-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
        raise OSError(f"Others than its user may write to {folder}: remove it.")
    return folder


def processor_mark() -> str:
    """A name for the processor: one home may be shared by machines that differ."""
    return hashlib.blake2b(processor().encode(), digest_size=8).hexdigest()


def library() -> Path:
    """The library for this source, compiler and processor, built if it is not there.

    Raises OSError, SubprocessError, or ValueError for a CC that is no command; OSError too where others could have written it.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("There is none in the PATH.")
    sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
    parts = (*sources, str(FLAGS), compiler, torch.__version__, processor())
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    folder = own_folder("kernels")
    path = folder / f"{name}.so"
    if not path.exists():
        start = time.perf_counter()
        # aside and renamed: other processes build it at the same time
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / path.name
            words = [*shlex.split(compiler), *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"]
            subprocess.run(words, check=True, capture_output=True, text=True, errors="replace", timeout=120)
            made.replace(path)
        logger.info("Compiled the kernels for the CPU in %.1f s: %s", time.perf_counter() - start, path)
    return path
