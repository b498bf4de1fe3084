"""Where --bf16 helps: what the machine has instructions for, and what happens to the flag."""

from __future__ import annotations

from pathlib import Path

import pytest

from togi.config.parse import Source, parse
from togi.methods.sft import SFT
from togi.plan import machine
from togi.plan.machine import Machine, cpu_has_bf16, this_machine, usable_precision

AVX2 = "flags\t\t: fpu avx avx2 fma\n"
AVX512 = "flags\t\t: fpu avx2 avx512f avx512bw\n"


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        (AVX2, False),
        (AVX512, True),
        ("Features\t: fp asimd bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("", True),
    ],
)
def test_a_processor_tells_what_it_computes(tmp_path: Path, cpuinfo: str, fast: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{cpuinfo}")
    assert cpu_has_bf16(tmp_path / "cpuinfo") is fast


@pytest.mark.parametrize(
    ("visible", "devices", "fast"),
    [
        ("0,1", ["nvidia0"], True),
        ("", ["nvidia0"], False),
        ("0", ["null"], False),
        ("0", ["dxg"], True),
        ("0", ["kfd"], True),
    ],
)
def test_only_a_gpu_that_is_there_computes_for_a_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, devices: list[str], fast: bool
) -> None:
    """DeepSpeed's launcher names GPUs on machines that have none."""
    (tmp_path / "dev").mkdir()
    for name in devices:
        (tmp_path / "dev" / name).touch()
    found = machine._has_gpu_devices
    monkeypatch.setattr(machine, "_has_gpu_devices", lambda: found(tmp_path / "dev"))
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda cpuinfo: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert this_machine().fast_bf16 is fast


def test_the_flag_is_turned_off_and_it_is_said() -> None:
    parsed = parse(SFT, ["--pretrain", "m", "--dataset", "d.jsonl", "--bf16"], "sft")
    slow, fast = (Machine(cpus=2, memory_bytes=0, gpus=0, fast_bf16=is_fast) for is_fast in (False, True))
    ready, notice = usable_precision(parsed, slow)
    assert (ready.config.bf16, ready.sources["bf16"]) == (False, Source.AUTO)
    assert "--bf16: this CPU has no bfloat16 instructions" in notice
    assert usable_precision(parsed, fast) == (parsed, "")
    plain = parse(SFT, ["--pretrain", "m", "--dataset", "d.jsonl"], "sft")
    assert usable_precision(plain, slow) == (plain, "")
