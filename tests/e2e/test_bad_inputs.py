"""Whatever a user can get wrong in `togi rl` ends in one sentence, status 2, and nothing left behind.

Three ways to run a command, cheapest first: mistakes in flags, files and folders share one process that never imports torch;
mistakes that need a tokenizer or a call of the reward function run in this process, which has torch already; and a
selection of both runs as users start it, one process each.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
from transformers import Gemma3Config

from tests.tiny import save_tiny_model, tiny_config, tiny_tokenizer
from togi.cli.main import main
from togi.errors import ConfigError
from togi.run.journal import claimed

ROOT = Path(__file__).parents[2]
GOOD = """
    --pretrain @model --prompt_data @good.jsonl --input_key prompt --label_key answer --reward_func @good.py
    --rollout_engine transformers --advantage_estimator group_norm --n_samples_per_prompt 2 --rollout_batch_size 4
    --train_batch_size 8 --prompt_max_len 64 --generate_max_len 8 --init_kl_coef 0
"""
ONE_OF_ONE = (
    " (the first of 1 faulty rows among 1, more than --max_bad_rows 0.05 allows: correct them, or raise the limit to "
    "leave them out)."
)
ROWS = [{"prompt": f"write number {i}", "answer": str(i)} for i in range(40)]
FUNCTION = "def reward_func(queries, prompts, labels):\n"
REWARDS = {
    "good": FUNCTION + "    return [0.0] * len(queries)\n",
    "syntax": "x = 1\ndef reward_func(queries, prompts, labels)\n    return []\n",
    "renamed": "def score(queries, prompts, labels):\n    return [0.0] * len(queries)\n",
    "import": "x = 1\ny = x / 0\n" + FUNCTION + "    return [0.0] * len(queries)\n",
    "raises": FUNCTION + "    data = {}\n    return [data[label] for label in labels]\n",
    "few": FUNCTION + "    return [0.0] * (len(queries) - 1)\n",
    "many": FUNCTION + "    return [0.0] * (len(queries) + 1)\n",
    "one": FUNCTION + "    return 0.5\n",
    "nan": FUNCTION + "    return [float('nan')] * len(queries)\n",
    "text": FUNCTION + "    return ['good'] * len(queries)\n",
    "nothing": FUNCTION + "    pass\n",
    "penalty": FUNCTION + "    return {'rewards': [0.0] * len(queries), 'extra_logs': {'overlong_penalty': 1.0}}\n",
    "metric": FUNCTION + "    return {'rewards': [0.0] * len(queries), 'extra_logs': {'mean': 1.0}}\n",
    "hangs": "import time\n" + FUNCTION + "    time.sleep(1000)\n",
    "dies": "import os\n" + FUNCTION + "    os.kill(os.getpid(), 9)\n",
    "signature": "def reward_func(text):\n    return 0.0\n",
}


@dataclass(frozen=True)
class Case:
    """``flags`` follow the good ones, of which the last wins; @ is the folder of the files. ``words`` are in the sentence."""

    name: str
    flags: str
    words: tuple[str, ...]


LIGHT = [
    Case(
        "missing prompt file", "--prompt_data @none.jsonl", ("--prompt_data: There is no file or folder @none.jsonl",)
    ),
    Case(
        "missing eval file", "--eval_dataset @none.jsonl", ("--eval_dataset: There is no file or folder @none.jsonl",)
    ),
    Case("malformed JSONL line", "--prompt_data @line3.jsonl", ("Line 3 of @line3.jsonl is not valid JSON",)),
    Case("malformed CSV line", "--prompt_data @cells.csv", ("Line 3 of @cells.csv has 3 cells",)),
    Case(
        "wrong input_key", "--input_key promt", ("@good.jsonl has no field 'promt'", "did you mean --input_key prompt?")
    ),
    Case("wrong label_key", "--label_key zzz", ("has no field 'zzz'", "set --label_key to one of these")),
    Case("empty file", "--prompt_data @empty.jsonl", ("@empty.jsonl has no rows",)),
    Case("unknown extension", "--prompt_data @notes.txt", ("@notes.txt has the unknown extension .txt", ".jsonl")),
    Case("no extension", "--prompt_data @plain", ("@plain has no extension", ".jsonl")),
    Case("folder without data", "--prompt_data @nothing", ("The folder @nothing has no data files",)),
    Case(
        "comma in a path",
        "--prompt_data @a,b/good.jsonl",
        (
            "--prompt_data: @a,b/good.jsonl has a comma in its name, and commas separate data sets: rename it, or give a",
        ),
    ),
    Case(
        "a part of a list is missing",
        "--prompt_data @good.jsonl,@none.jsonl",
        ("There is no file or folder @none.jsonl: check the path, and the commas in '@good.jsonl,@none.jsonl', which",),
    ),
    Case(
        "semicolons",
        "--prompt_data @semicolons.csv",
        (
            "--prompt_data: @semicolons.csv separates its columns by semicolons, not by commas: write it with commas "
            "(pandas: `to_csv(path, index=False)`), or as .jsonl.",
        ),
    ),
    Case(
        "columns",
        "--eval_dataset @columns.json",
        (
            "--eval_dataset: @columns.json is one object that holds a whole table: write one object a line (pandas: "
            "`to_json(path, orient='records', lines=True)`).",
        ),
    ),
    Case(
        "rows in an object",
        "--prompt_data @inside.json",
        (
            "--prompt_data: @inside.json is one object with rows in 'data': make a list of rows the whole file, or write "
            "one row a line.",
        ),
    ),
    Case(
        "None in YAML",
        "--config @none_word.yaml",
        (
            "--eval_dataset None is the text 'None', not the absence of a value; in YAML, write null or leave the line out.",
        ),
    ),
    Case("extra comma", "--prompt_data @good.jsonl,", ("empty entry",)),
    Case(
        "too few probabilities",
        "--prompt_data_probs 0.5,0.5",
        ("--prompt_data_probs 0.5,0.5 has 2 numbers for 1 data",),
    ),
    Case("probabilities sum", "--prompt_data @good.jsonl,@good.jsonl --prompt_data_probs 0.5,0.6", ("sum to 1.1",)),
    Case("missing model", "--pretrain @none/model", ("--pretrain @none/model is not a folder",)),
    Case("missing reward model", "--reward_pretrain @none/model", ("--reward_pretrain @none/model is not a folder",)),
    Case("model without config", "--pretrain @nothing", ("--pretrain @nothing is a folder without config.json",)),
    Case("model without weights", "--pretrain @weightless", ("--pretrain @weightless has no weights", "*.safetensors")),
    Case("broken config.json", "--pretrain @brokencfg", ("--pretrain: @brokencfg/config.json cannot be read",)),
    Case("more tokens than positions", "--generate_max_len 5000", ("--generate_max_len 5000", "512 positions")),
    Case("missing reward file", "--reward_func @none.py", ("@none.py cannot be read (No such file", "--reward_func")),
    Case("reward syntax error", "--reward_func @syntax.py", ("@syntax.py has a syntax error in line 2: expected ':'",)),
    Case("no reward_func", "--reward_func @renamed.py", ("must define reward_func(queries", "defines 'score'")),
    Case("reward is no Python file", "--reward_func @notes.txt", ("--reward_func @notes.txt must be a Python file",)),
    Case("template without a hole", "--input_template Q:", ("--input_template must contain {} exactly once", "'Q:'")),
    Case("template is a path", "--apply_chat_template --tokenizer_chat_template @x.jinja", ("no Jinja template",)),
    Case(
        "typo in a flag", "--advantage_estimater rloo", ("--advantage_estimater", "did you mean --advantage_estimator?")
    ),
    Case("value after a switch", "--bf16 true", ("--bf16 takes no value", "--no_bf16")),
    Case(
        "typo in a YAML key",
        "--config @typo.yaml",
        ("@typo.yaml", "rollout_batchsize", "did you mean rollout_batch_size?"),
    ),
    Case(
        "invalid YAML", "--config @invalid.yaml", ("@invalid.yaml is not valid YAML: expected ',' or ']'", "in line 3")
    ),
    Case("missing YAML file", "--config @none.yaml", ("--config @none.yaml cannot be read",)),
    Case("unknown estimator", "--advantage_estimator grpo", ("--advantage_estimator grpo: must be gae", "group_norm")),
    Case("not supported yet", "--local_rank 0", ("--local_rank is not supported yet",)),
    Case(
        "templates exclude",
        "--input_template {} --apply_chat_template",
        ("--input_template and --apply_chat_template",),
    ),
    Case(
        "groups of one", "--n_samples_per_prompt 1", ("--advantage_estimator group_norm", "--n_samples_per_prompt to 2")
    ),
    Case("KL loss without KL", "--use_kl_loss", ("--use_kl_loss needs a reference model but --init_kl_coef is 0",)),
    Case("batch too large", "--train_batch_size 64", ("--train_batch_size 64 is more than the 8 samples",)),
    Case(
        "colocation",
        "--colocate_all_models --vllm_num_engines 2 --actor_num_gpus_per_node 1",
        ("--vllm_num_engines 2 x --vllm_tensor_parallel_size 1 is 2", "make them equal"),
    ),
    Case("below a file", "--save_path @notes.txt/model", ("--save_path @notes.txt/model: @notes.txt is a file",)),
    Case(
        "more tokens than learned positions",
        "--pretrain @gpt2",
        ("--prompt_max_len 64 + --generate_max_len 8 is more than the 64 positions of @gpt2: lower it.",),
    ),
    Case(
        "reward model with fewer positions",
        "--reward_pretrain @gpt2",
        ("--prompt_max_len 64 + --generate_max_len 8 is more than the 64 positions of @gpt2: lower it.",),
    ),
    Case(
        "dropout of the adapter",
        "--lora_rank 4 --lora_dropout 0.1",
        (
            "--lora_dropout 0.1 would put noise into log-probs that are compared with those of a reference or of earlier weights: "
            "leave it out.",
        ),
    ),
    Case("run folder in use", "--run_dir @used", ("--run_dir @used already holds a run", "--load_checkpoint")),
]
HEAVY = [
    Case(
        "all prompts too long", "--prompt_max_len 3", ("No prompt of @good.jsonl", "40 too long", "--prompt_max_len 3")
    ),
    Case(
        "line far down", "--prompt_data @line30.jsonl --max_bad_rows 0", ("Line 30 of @line30.jsonl is not valid JSON",)
    ),
    Case(
        "field far down",
        "--prompt_data @row30.jsonl --max_bad_rows 0.02",
        ("Line 31 of @row30.jsonl has no field 'prompt'", "more than --max_bad_rows 0.02 allows"),
    ),
    Case(
        "prompt is a number",
        "--prompt_data @number.jsonl",
        (
            f"Line 1 of @number.jsonl: the field 'prompt' is the number 3, not a string: correct or remove the row{ONE_OF_ONE}",
        ),
    ),
    Case(
        "half a character in a label",
        "--prompt_data @label.jsonl",
        (
            f"Line 1 of @label.jsonl: the field 'answer' has half a character (\\ud83d) in its text: correct or "
            f"remove the row{ONE_OF_ONE}",
        ),
    ),
    Case(
        "a role that nobody has",
        "--prompt_data @role.jsonl --apply_chat_template",
        (
            "Line 1 of @role.jsonl: the field 'prompt' has the unknown role 'usr' in its message 0: write "
            "system, user, assistant or "
            f"tool, or use a chat template that names this role{ONE_OF_ONE}",
        ),
    ),
    Case(
        "a picture",
        "--prompt_data @picture.jsonl --apply_chat_template",
        (
            "Line 1 of @picture.jsonl: the field 'prompt' has a part of type 'image_url' in the content in its "
            "message 0: only text "
            f"can be trained on, as {{'type': 'text', 'text': ...}}{ONE_OF_ONE}",
        ),
    ),
    Case(
        "tools of another sort",
        "--prompt_data @hammer.jsonl --apply_chat_template",
        (
            "Line 1 of @hammer.jsonl: the field 'tools' has the entry 0 'hammer', but the field 'tools' goes to "
            "the chat template: "
            "write a list of {'type': 'function', 'function': {'name': ..., 'description': ..., 'parameters': "
            "...}}, or rename the "
            f"field if it means something else{ONE_OF_ONE}",
        ),
    ),
    Case(
        "NaN",
        "--prompt_data @nan.jsonl",
        ("Line 2 of @nan.jsonl: the field 'prompt' is NaN, a missing value: fill it in or remove the row",),
    ),
    Case(
        "labels of another kind further down",
        "--prompt_data @kinds.jsonl --reward_func builtin:exact",
        (
            "togi: Line 3 of @kinds.jsonl: builtin:exact cannot use the label [1]: it is no text and no number; point "
            "--label_key at the answer field, or correct or remove the row.",
        ),
    ),
    Case(
        "one label of no use among good ones",
        "--prompt_data @one_empty.jsonl --reward_func @good.py,builtin:exact",
        ("togi: Line 40 of @one_empty.jsonl: builtin:exact cannot use the label ' ': it is empty; point --label_key",),
    ),
    Case(
        "one label of no use among held-out ones",
        "--eval_dataset @one_empty.jsonl --eval_steps 1 --reward_func builtin:exact",
        ("togi: Line 40 of @one_empty.jsonl: builtin:exact cannot use the label ' ': it is empty; point --label_key",),
    ),
    Case(
        "labels that say nothing to a built-in function",
        "--prompt_data @numbers.jsonl --reward_func builtin:code",
        (
            "builtin:code can use no label of those tried (the first: 4 of prompt '0:0'): point --label_key at the field "
            "that it is made for.",
        ),
    ),
    Case(
        "no chat template", "--pretrain @bare --apply_chat_template", ("--apply_chat_template needs a chat template",)
    ),
    Case("no tokenizer", "--pretrain @notokenizer", ("No tokenizer can be loaded from @notokenizer",)),
    Case("broken tokenizer", "--pretrain @broken", ("No tokenizer can be loaded from @broken",)),
    Case("unknown architecture", "--pretrain @strange", ("@strange", "model type `strange`")),
    Case("eval prompts too long", "--eval_dataset @long.jsonl", ("No prompt of @long.jsonl", "1 too long")),
    Case(
        "prompts of tokens without a row",
        "--pretrain @larger --prompt_data @added.jsonl",
        (
            "The tokenizer has 303 tokens and the embedding of @larger has 300 rows, none for '<42>' (302): use the tokenizer "
            "that the model was made with, or enlarge the embedding (model.resize_token_embeddings(303) in Transformers) "
            "and save the model.",
        ),
    ),
    Case(
        "reward model with fewer rows",
        "--reward_pretrain @fewer",
        (
            "The tokenizer has 260 tokens and the embedding of @fewer has 256 rows, none for '<pad>' (259): use the tokenizer "
            "that the model was made with, or enlarge the embedding (model.resize_token_embeddings(260) in Transformers) "
            "and save the model.",
        ),
    ),
    Case(
        "a model that also sees",
        "--pretrain @sees",
        (
            "gemma3 models take more than text, and Togi trains language models: give one without the other parts, with the "
            "model_type gemma3_text in its config.json.",
        ),
    ),
    Case(
        "no such layer",
        "--lora_rank 4 --target_modules c_attn",
        (
            "--target_modules c_attn: LlamaForCausalLM has no such linear layer in its decoder: choose from down_proj, gate_proj, "
            "k_proj, o_proj, q_proj, up_proj, v_proj, or all-linear alone.",
        ),
    ),
    Case(
        "four bits of Conv1D layers",
        "--pretrain @gpt2 --prompt_max_len 40 --lora_rank 4 --load_in_4bit",
        (
            "--load_in_4bit: GPT2LMHeadModel keeps its weights as [in, out], which cannot be quantised and merged: leave it out.",
        ),
    ),
    Case("reward raises at import", "--reward_func @import.py", ("cannot be imported: ZeroDivisionError", "at line 2")),
    Case("reward raises", "--reward_func @raises.py", ("reward_func in @raises.py raised KeyError", "at line 3")),
    Case("too few scores", "--reward_func @few.py", ("@few.py returned 1 rewards for 2 queries",)),
    Case("too many scores", "--reward_func @many.py", ("@many.py returned 3 rewards for 2 queries",)),
    Case("one score for all", "--reward_func @one.py", ("@one.py returned a single number as rewards for 2 queries",)),
    Case("NaN", "--reward_func @nan.py", ("@nan.py returned nan in rewards for sample 0",)),
    Case("a string", "--reward_func @text.py", ("@text.py returned the string 'good' in rewards for sample 0",)),
    Case("no return", "--reward_func @nothing.py", ("@nothing.py returned None as rewards",)),
    Case(
        "a log named as a length penalty",
        "--reward_func @penalty.py --overlong_buffer_len 4",
        ("The reward has a part named 'overlong_penalty', as a length penalty is: use another name.",),
    ),
    Case("a log named as a metric", "--reward_func @metric.py", ("a part named 'mean', as a metric of Togi's own is",)),
    Case(
        "signature", "--reward_func @signature.py", ("@signature.py cannot be called with queries, prompts and labels",)
    ),
]
ALONE_HEAVY = [
    Case("reward hangs", "--reward_func @hangs.py --reward_timeout 1", ("@hangs.py ran longer than the limit of 1 s",)),
    Case(
        "no server", "--remote_rm_url http://127.0.0.1:9/r", ("http://127.0.0.1:9/r does not answer", "--remote_rm_url")
    ),
    Case("reward kills itself", "--reward_func @dies.py", ("@dies.py ended its process (killed by SIGKILL)",)),
]
ALONE = [
    case for case in LIGHT if case.name in ("missing prompt file", "typo in a flag", "below a file", "no reward_func")
]
ONE_PROCESS = """
import contextlib, io, json, sys
from togi.cli.main import main
results = {}
for name, argv in json.load(sys.stdin).items():
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        status = main(argv)
    results[name] = [status, stderr.getvalue(), [m for m in ("torch", "transformers", "ray") if m in sys.modules]]
json.dump(results, sys.stdout)
"""
WITHOUT_VLLM = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "vllm" else find(name, *rest)
from togi.cli.main import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(status)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good model, good prompts and a good reward, and everything that is wrong."""
    folder = tmp_path_factory.mktemp("world")
    with contextlib.redirect_stderr(io.StringIO()):
        make_models(folder)
    for name, code in REWARDS.items():
        (folder / f"{name}.py").write_text(code)
    lines = [json.dumps(row) for row in ROWS]
    files = {
        "good.jsonl": lines,
        "line3.jsonl": [*lines[:2], '{"prompt": '],
        "line30.jsonl": [*lines[:29], "{'prompt'}"],
        "row30.jsonl": [*lines[:30], '{"question": "?", "answer": ""}'],
        "number.jsonl": ['{"prompt": 3, "answer": ""}'],
        "nan.jsonl": [lines[0], '{"prompt": NaN, "answer": ""}'],
        "kinds.jsonl": [*lines[:2], '{"prompt": "x", "answer": [1]}', *lines[2:]],
        "one_empty.jsonl": [*lines[:39], '{"prompt": "x", "answer": " "}'],
        "numbers.jsonl": ['{"prompt": "2+2", "answer": 4}'] * 4,
        "semicolons.csv": ["prompt;answer", "1+1, then?;2"],
        "columns.json": ['{"prompt": {"0": "1+1", "1": "1+2"}, "answer": {"0": "2", "1": "3"}}'],
        "inside.json": [json.dumps({"data": ROWS})],
        "none_word.yaml": ["eval_dataset: None"],
        "a,b/good.jsonl": lines,
        "added.jsonl": ['{"prompt": "say <42>", "answer": ""}'],
        "long.jsonl": [json.dumps({"prompt": "x" * 100, "answer": ""})],
        "label.jsonl": ['{"prompt": "p", "answer": "a \\ud83d"}'],
        "role.jsonl": ['{"prompt": [{"role": "usr", "content": "p"}], "answer": ""}'],
        "picture.jsonl": ['{"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "answer": ""}'],
        "hammer.jsonl": ['{"prompt": "p", "answer": "", "tools": ["hammer"]}'],
        "empty.jsonl": [],
        "cells.csv": ["prompt,answer", "a,b", "a,b,c"],
        "notes.txt": ["text"],
        "plain": ["text"],
        "typo.yaml": ["rollout_batchsize: 4"],
        "invalid.yaml": ["seed: 1", "bf16: [true"],
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(line + "\n" for line in content))
    (folder / "nothing").mkdir()
    (folder / "used").mkdir()
    (folder / "used" / "metrics.jsonl").touch()
    return folder


def make_models(folder: Path) -> None:
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "gpt2", "gpt2", max_position_embeddings=64)
    for name in ("weightless", "brokencfg", "bare", "notokenizer", "broken", "strange", "larger", "fewer", "sees"):
        (folder / name).mkdir()
        for file in (folder / "model").iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "weightless" / "model.safetensors").unlink()
    (folder / "brokencfg" / "config.json").write_text('{"model_type"')
    for file in (folder / "notokenizer").glob("*token*"):
        file.unlink()
    (folder / "broken" / "tokenizer.json").write_text('{"a": 1}')
    (folder / "strange" / "config.json").write_text('{"model_type": "strange"}')
    tiny_config(vocab_size=256).save_pretrained(folder / "fewer")
    Gemma3Config().save_pretrained(folder / "sees")
    larger = tiny_tokenizer()
    larger.add_tokens([f"<{i}>" for i in range(43)], special_tokens=True)
    larger.save_pretrained(folder / "larger")
    (folder / "bare" / "chat_template.jinja").unlink()
    bare = tiny_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(folder / "bare")


def argv(world: Path, case: Case) -> list[str]:
    return ["rl", *(word.replace("@", f"{world}/") for word in f"{GOOD} {case.flags}".split())]


def check_sentence(world: Path, case: Case, text: str) -> None:
    """The last line is the only sentence of ours, and it names what it should."""
    assert "Traceback" not in text
    assert "starting engines" not in text
    *before, last = text.removesuffix("\n").split("\n")
    assert last.startswith("togi: "), text
    assert not any(line.startswith("togi: ") for line in before), text
    assert last.endswith((".", "?")), last
    for word in case.words:
        assert word.replace("@", f"{world}/") in last, last


def check_alone(world: Path, case: Case, cwd: Path, start: list[str], **environment: str) -> str:
    """Run a process as a user does; returns its stderr."""
    mark = uuid.uuid4().hex
    variables = os.environ | {"PYTHONPATH": str(ROOT), "TOGI_TEST_MARK": mark} | environment
    done = subprocess.run(
        [sys.executable, *start, *argv(world, case)],
        check=False,
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    check_sentence(world, case, done.stderr)
    assert list(cwd.iterdir()) == []
    assert [process.cmdline() for process in marked(mark)] == []
    return done.stderr


def marked(mark: str) -> Iterator[psutil.Process]:
    """Processes, of whatever parent by now, that inherited our environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TOGI_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process


@pytest.fixture(scope="module")
def light(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Status, stderr and heavy modules of every light case, all in one process in an empty folder."""
    cwd = tmp_path_factory.mktemp("cwd")
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS],
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=json.dumps({case.name: argv(world, case) for case in LIGHT}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    results: dict[str, list] = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, (status, _, _) in results.items() if status != 2] == [], "accepted, and run"
    assert list(cwd.iterdir()) == []
    return results


@pytest.mark.parametrize("case", LIGHT, ids=lambda case: case.name)
def test_flags_files_and_folders_without_torch(world: Path, light: dict[str, list], case: Case) -> None:
    status, stderr, heavy = light[case.name]
    check_sentence(world, case, stderr)
    assert stderr.count("\n") == 1, "one line and nothing else"
    assert (status, heavy) == (2, [])


@pytest.mark.parametrize("case", HEAVY, ids=lambda case: case.name)
def test_prompts_and_rewards_before_a_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], case: Case
) -> None:
    monkeypatch.chdir(tmp_path)
    before = psutil.Process().children(recursive=True)
    assert main(argv(world, case)) == 2
    check_sentence(world, case, capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children(recursive=True) == before
    assert not ray.is_initialized()


@pytest.mark.parametrize("flag", ["save_path", "ckpt_path"])
def test_a_folder_that_another_run_writes_into(
    world: Path, flag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = Case(
        "",
        f"--{flag} one --run_dir run --save_steps 1",
        (f"Another run is writing into --{flag} one: wait for its end",),
    )
    # the other run is a process that is killed: nothing of its hold is left
    hold = "import sys, time; from togi.run.journal import claimed\nwith claimed('x', 'one'): print(flush=True); time.sleep(600)"
    other = subprocess.Popen(
        [sys.executable, "-c", hold], stdout=subprocess.PIPE, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert other.stdout is not None and other.stdout.readline() == b"\n"
    assert main(argv(world, case)) == 2
    check_sentence(world, case, capfd.readouterr().err)
    assert not (tmp_path / "run").exists()
    other.kill()
    other.wait()
    with claimed(flag, "one"), pytest.raises(ConfigError, match="wait for its end"), claimed(flag, "one"):
        pass
    with claimed(flag, "one"):
        pass


@pytest.mark.parametrize("case", [*ALONE, *ALONE_HEAVY], ids=lambda case: case.name)
def test_as_users_start_it(world: Path, tmp_path: Path, case: Case) -> None:
    stderr = check_alone(world, case, tmp_path, ["-m", "togi"])
    assert case in ALONE_HEAVY or stderr.count("\n") == 1


def test_a_hub_name_while_the_hub_is_off(world: Path, tmp_path: Path) -> None:
    case = Case("", "--pretrain nobody/nothing", ("--pretrain nobody/nothing", "HF_HUB_OFFLINE"))
    stderr = check_alone(world, case, tmp_path, ["-m", "togi"], HF_HUB_OFFLINE="1")
    assert stderr.count("\n") == 1


def test_more_gpus_than_there_are(world: Path, tmp_path: Path) -> None:
    case = Case("", "--actor_num_gpus_per_node 8", ("engine 1 + actor 8 = 9 GPUs but the cluster has 2",))
    stderr = check_alone(world, case, tmp_path, ["-m", "togi"], CUDA_VISIBLE_DEVICES="0,1", RAY_ADDRESS="local")
    assert stderr.count("\n") == 1


def test_vllm_is_not_installed(world: Path, tmp_path: Path) -> None:
    case = Case("", "--rollout_engine vllm", ("pip install '.[vllm]'", "--rollout_engine transformers"))
    stderr = check_alone(world, case, tmp_path, ["-c", WITHOUT_VLLM])
    assert stderr.count("\n") == 1
