"""What tests ask about processes."""

from __future__ import annotations

import time

import psutil


def gone(pid: int) -> bool:
    """Whether a process has ended within 5 s (a zombie of another parent counts as ended)."""
    for _ in range(500):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False
