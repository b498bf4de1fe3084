"""togi export: folders that plain Transformers loads, equal to what the run saved, with a card that tells what was done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.example_scripts import run_script
from tests.offline_world import ROOT, launch_warm, make_world, train, values
from tests.tiny import save_tiny_model
from togi.cli.main import main

EXAMPLES = ("export.sh",)
LORA = ["--lora_rank", "4", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of one process, each with a checkpoint of its last step, the fourth."""
    folder = tmp_path_factory.mktemp("runs")
    train(world, "sft", folder / "sft", "--save_steps", "2", "--save_hf_ckpt", "--bf16")
    train(world, "rm", folder / "rm", "--save_steps", "4", "--value_head_prefix", "head")
    train(world, "sft", folder / "lora", "--save_steps", "4", *LORA)
    return folder


def export(run: Path, out: Path, *more: str) -> None:
    assert main(["export", "--run_dir", str(run), "--output_path", str(out), *more]) == 0


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_a_final_model_is_copied_and_gets_its_card(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(runs / "sft", tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    info["values"]["use_wandb"] = {"value": "a-key-that-is-secret", "source": "command line"}
    info["values"]["dataset"]["value"] += ",some/set,/home/somebody/token-of-mine"
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    monkeypatch.setenv("HF_TOKEN", "token-of-mine")
    out = tmp_path / "out"
    export(tmp_path / "run", out)
    assert same_weights(out, runs / "sft" / "model")
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1])\n"
        "assert m(**t('abc', return_tensors='pt')).logits.isfinite().all() and t.chat_template"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", script, str(out)], cwd="/", env=environment, check=True, timeout=120)
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["togi", "sft"],
        "datasets": ["some/set"],
    }
    last = values(runs / "sft")[-1]
    assert f"| loss | {last['loss']:.6g} | 4 |" in text and f"| eval/loss | {last['eval/loss']:.6g} | 4 |" in text
    assert "| learning_rate | 0.003 |" in text and "| lr_scheduler | constant |" in text and "| l2 |" not in text
    assert "| train | sft.jsonl | 14 | 14 | none |" in text
    assert f"- torch {torch.__version__}" in text
    for hidden in ("a-key-that-is-secret", "token-of-mine", "/home", str(tmp_path), str(runs)):
        assert hidden not in text + head


def test_faulty_rows_are_told_without_their_text(world: Path, tmp_path: Path) -> None:
    rows = (world / "sft.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"a": "private words"}']))
    train(
        world,
        "sft",
        tmp_path / "run",
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--max_bad_rows",
        "0.1",
        evaluate=False,
    )
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Faulty rows in train: 1 of 15" in card and "private words" not in card


def test_a_checkpoint_becomes_the_model_that_the_run_saved(runs: Path, tmp_path: Path) -> None:
    checkpoints = runs / "sft" / "checkpoints"
    export(runs / "sft", tmp_path / "last", "--ckpt", str(checkpoints))
    assert same_weights(tmp_path / "last", runs / "sft" / "model")  # bf16, from float32 masters
    (script,) = EXAMPLES
    run_script(script, "--ckpt", checkpoints / "step_00000002", RUN=runs / "sft", OUT=tmp_path / "second")
    assert same_weights(tmp_path / "second", checkpoints / "step_00000002" / "hf")
    assert not same_weights(tmp_path / "second", tmp_path / "last")
    card = (tmp_path / "second" / "README.md").read_text()
    assert "this is the checkpoint of step 2." in card
    metrics = [line for line in card.split("## Metrics at the end")[1].splitlines() if line.startswith("| ")]
    assert any(line.startswith("| loss |") and line.endswith("| 2 |") for line in metrics)
    assert not any(line.endswith("| 4 |") for line in metrics)
    one, other = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "last", runs / "sft" / "model"))
    assert one.config.to_dict() | {"_name_or_path": ""} == other.config.to_dict() | {"_name_or_path": ""}
    assert AutoTokenizer.from_pretrained(tmp_path / "last").chat_template


def test_a_reward_model_keeps_its_head(runs: Path, tmp_path: Path) -> None:
    export(runs / "rm", tmp_path / "final")
    export(runs / "rm", tmp_path / "converted", "--ckpt", str(runs / "rm" / "checkpoints"))
    assert same_weights(tmp_path / "converted", runs / "rm" / "model")
    assert same_weights(tmp_path / "final", runs / "rm" / "model")
    assert "head.weight" in load_file(tmp_path / "converted" / "model.safetensors")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", key_mapping={r"^head\.": "score."})
    assert plain.config.value_head_prefix == "head" and plain.config.std > 0
    assert "pipeline_tag: text-classification" in (tmp_path / "final" / "README.md").read_text()


def test_an_adapter_is_merged_final_or_from_a_checkpoint(runs: Path, tmp_path: Path) -> None:
    assert (
        main(["merge-lora", "--lora_path", str(runs / "lora" / "model"), "--output_path", str(tmp_path / "merged")])
        == 0
    )
    export(runs / "lora", tmp_path / "final")
    export(runs / "lora", tmp_path / "converted", "--ckpt", str(runs / "lora" / "checkpoints"))
    assert same_weights(tmp_path / "final", tmp_path / "merged")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("converted", "merged"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_the_model_of_another_run_is_refused(
    runs: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        train(world, "sft", Path(name), "--save_path", "model", "--save_steps", "4", evaluate=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # run.json has absolute paths
    export(Path("../two"), tmp_path / "out")
    assert same_weights(tmp_path / "out", tmp_path / "model") and not (tmp_path / "out" / "togi_run.json").exists()
    words = ["export", "--run_dir", "../one", "--output_path", str(tmp_path / "no")]
    for source, more in (
        (tmp_path / "model", []),  # both runs wrote this folder
        (tmp_path / "two" / "checkpoints" / "step_00000004", ["--ckpt", str(tmp_path / "two" / "checkpoints")]),
    ):
        capsys.readouterr()
        assert main([*words, *more]) == 2
        assert capsys.readouterr().err == (
            f"togi: {source} was not written by the run --run_dir ../one: give the folder of the run that wrote it, or a "
            "checkpoint of this run by --ckpt.\n"
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.busy
@pytest.mark.parametrize("flags", [["--zero_stage", "3"], ["--backend", "deepspeed"]], ids=["fsdp2", "deepspeed"])
def test_checkpoints_of_two_ranks(world: Path, tmp_path: Path, flags: list[str]) -> None:
    if "deepspeed" in flags:
        pytest.importorskip("deepspeed")
    launch_warm(world, "sft", tmp_path / "run", 2, "--save_steps", "4", *flags)
    export(tmp_path / "run", tmp_path / "out", "--ckpt", str(tmp_path / "run" / "checkpoints"))
    assert same_weights(tmp_path / "out", tmp_path / "run" / "model")


def test_mistakes_are_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["export", "--output_path", str(tmp_path / "out"), *words]) == 2
        assert not (tmp_path / "out" / "README.md").exists()
        return capsys.readouterr().err

    run = ["--run_dir", str(runs / "sft")]
    assert "--run_dir is required" in refused()
    assert "is not the folder of a run" in refused("--run_dir", str(tmp_path))
    assert "leave it out" in refused(*run, "--role", "critic")
    assert "has no complete checkpoint" in refused(*run, "--ckpt", str(tmp_path))
    save_tiny_model(tmp_path / "wider", hidden_size=96)
    checkpoints = str(runs / "sft" / "checkpoints")
    assert "is of another model" in refused(*run, "--ckpt", checkpoints, "--pretrain", str(tmp_path / "wider"))
    shutil.copytree(runs / "sft", tmp_path / "copy")
    damaged = tmp_path / "copy" / "checkpoints" / "step_00000004"
    (damaged / "learner.json").write_text("{}")
    assert "is damaged (learner.json" in refused("--run_dir", str(tmp_path / "copy"), "--ckpt", str(damaged))
    info = json.loads((tmp_path / "copy" / "run.json").read_text())
    info["values"]["save_path"]["value"] = str(tmp_path / "gone")
    (tmp_path / "copy" / "run.json").write_text(json.dumps(info))
    assert "has no final model" in refused("--run_dir", str(tmp_path / "copy"))


def test_the_command_is_listed() -> None:
    done = subprocess.run([sys.executable, "-m", "togi", "export", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--ckpt" in done.stdout
