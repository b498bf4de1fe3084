"""Where --bf16 helps: what the processor and the GPUs have, and what becomes of the flag."""

from __future__ import annotations

from pathlib import Path

import pytest

from togi.config.infer import ChatConfig, InferConfig
from togi.config.iterate import IterateConfig
from togi.config.parse import Parsed, Source, parse
from togi.config.rl import RLConfig
from togi.config.tools import ServeRMConfig
from togi.errors import ConfigError
from togi.methods import check_method
from togi.methods.sft import SFT
from togi.plan import machine
from togi.plan.machine import Machine, cpu_has_bf16, this_machine, usable_precision
from togi.run import start
from togi.run.iterate_steps import _flags

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


SLOW, FAST = (Machine(cpus=2, memory_bytes=0, gpus=0, fast_bf16=is_fast) for is_fast in (False, True))
GPU, OLD_GPU = (Machine(cpus=2, memory_bytes=0, gpus=1, bf16_gpus=has) for has in (True, False))


def sft(*flags: str) -> Parsed[SFT]:
    return parse(SFT, ["--pretrain", "m", "--dataset", "d.jsonl", *flags], "sft")


@pytest.mark.parametrize(
    ("flags", "machine", "bf16", "said"),
    [
        (["--bf16"], SLOW, False, "--bf16: this CPU has no bfloat16 instructions"),
        ([], GPU, True, "--bf16 is on: all GPUs of this machine have bfloat16; --no_bf16 computes in float32"),
        (["--bf16"], FAST, True, ""),
        (["--bf16"], GPU, True, ""),
        (["--bf16"], OLD_GPU, True, ""),
        (["--no_bf16"], GPU, False, ""),
        ([], SLOW, False, ""),
        ([], FAST, False, ""),
        ([], OLD_GPU, False, ""),
    ],
)
def test_the_flag_is_turned_on_or_off_and_it_is_said(flags: list[str], machine: Machine, bf16: bool, said: str) -> None:
    parsed = sft(*flags)
    ready, notice = usable_precision(parsed, machine)
    assert ready.config.bf16 is bf16
    if said:
        assert notice is not None and notice.startswith(said)
        assert ready.sources["bf16"] is Source.AUTO
    else:
        assert (ready, notice) == (parsed, None)
    assert usable_precision(ready, machine) == (ready, None)


@pytest.mark.parametrize("settings", [InferConfig, ChatConfig, IterateConfig, ServeRMConfig])
def test_every_command_with_a_model_decides_alike(settings: type[ChatConfig]) -> None:
    assert usable_precision(parse(settings, [], ""), GPU)[0].config.bf16
    assert not usable_precision(parse(settings, ["--bf16"], ""), SLOW)[0].config.bf16


@pytest.mark.parametrize(
    ("script", "have"),
    [
        ('[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] && printf "9.0\\n8.0\\n"', True),
        ("echo 10.0", True),
        ("echo 8.9; echo 7.5", False),
        ("echo 9.0; exit 9", False),
        ("echo No devices were found", False),
        ("true", False),
        (None, True),
    ],
)
def test_the_driver_says_whether_gpus_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, have: bool
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "_has_gpu_devices", lambda: True)
    machine._capabilities.cache_clear()
    for visible, expected in (("0", have), ("", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert this_machine().bf16_gpus is expected
    machine._capabilities.cache_clear()


@pytest.mark.parametrize(("flags", "fits"), [([], True), (["--bf16"], True), (["--no_bf16"], False)])
def test_what_needs_bfloat16_is_checked_when_it_is_known(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], fits: bool
) -> None:
    def check(parsed: Parsed[SFT], *, launched: bool) -> Parsed[SFT]:
        check_method(parsed)
        return parsed

    monkeypatch.setattr(start, "this_machine", lambda: GPU)
    monkeypatch.setattr(start.preflight, "check_offline", check)
    parsed, said = sft("--output_key", "o", "--backend", "deepspeed", "--grad_accum_dtype", "bf16", *flags), list[str]()
    if fits:
        assert start.offline_door(parsed, announce=said.append).config.bf16
        assert len(said) == (0 if flags else 1)
    else:
        with pytest.raises(ConfigError, match="needs gradients in bfloat16, but --bf16 is off"):
            start.offline_door(parsed, announce=said.append)


def test_nothing_is_assumed_of_the_gpus_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that submits a job may have none."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(start.preflight, "check", lambda parsed, machine, *, reward_given: parsed)
    needed = ["--pretrain", "m", "--prompt_data", "d", "--reward_func", "f.py"]
    for flags, gpus, bf16, word in (
        ([], FAST, False, "--bf16 is off: the GPUs of the cluster in RAY_ADDRESS are not known here; add"),
        (["--bf16"], FAST, True, ""),
        (["--no_bf16"], FAST, False, ""),
        ([], GPU, True, "--bf16 is on: all GPUs of this machine"),
    ):
        said = list[str]()
        monkeypatch.setattr(start, "this_machine", lambda gpus=gpus: gpus)
        ready = start.rl_door(parse(RLConfig, [*needed, *flags], "rl"), reward_given=False, announce=said.append)
        assert ready.config.bf16 is bf16
        assert len(said) == bool(word) and all(line.startswith(word) for line in said)


def test_a_round_of_iterate_hands_the_decision_on() -> None:
    """The command of a step would decide for itself otherwise."""
    assert _flags({"bf16": False}) == ["--no_bf16"]
    assert _flags({"bf16": True}) == ["--bf16"]
