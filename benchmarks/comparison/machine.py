"""What the machine itself can do: matrix products and copying, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping

PROBE = """
import json, time, torch
def best(run, repeats=5):
    times = []
    for _ in range(repeats):
        start = time.perf_counter(); run(); times.append(time.perf_counter() - start)
    return min(times)
n, rates = 1536, {}
for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    rates[f"matmul_{name}_gflops"] = 2 * n**3 / best(lambda: a @ b) / 1e9
x = torch.empty(2**26); y = torch.empty_like(x)
rates["copy_gb_per_second"] = 2 * x.nbytes / best(lambda: y.copy_(x)) / 1e9
rates["threads"] = torch.get_num_threads()
print(json.dumps(rates))
"""


def faster_precision(rates: Mapping[str, float]) -> str:
    """ "bf16", or "fp32" where products in that are faster: a processor without instructions for bfloat16."""
    return "bf16" if rates["matmul_bf16_gflops"] > rates["matmul_fp32_gflops"] else "fp32"


def rates(threads: int | None = None) -> dict[str, float]:
    """GFLOP/s of matrix products in bf16 and fp32, GB/s of a copy (read and written), and the threads that did it."""
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=True, env=os.environ | own)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured
