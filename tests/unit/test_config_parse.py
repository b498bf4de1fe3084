"""The settings of togi rl: parsing, files, suggestions, refusals. All without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from togi.config.parse import Parsed, Source, parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.errors import ConfigError

ROOT = Path(__file__).parents[2]
NEEDED = ["--pretrain", "model", "--prompt_data", "data.jsonl", "--reward_func", "reward.py"]
GRPO = ["--advantage_estimator", "group_norm", "--n_samples_per_prompt", "4"]


def rl(*flags: str) -> Parsed[RLConfig]:
    return parse(RLConfig, list(flags), "rl")


def test_values_and_sources(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 7\nadam_betas: [0.8, 0.9]\ntemperature: 0.5\nbf16: true\n")
    parsed = rl(
        "--config",
        str(file),
        "--temperature",
        "0.7",
        "--no_bf16",
        "--max_samples",
        "1e3",
        "--eps_clip_low_high",
        "0.2",
        "0.27",
    )
    config = parsed.config
    assert (config.seed, config.adam_betas, config.temperature, config.bf16) == (7, (0.8, 0.9), 0.7, False)
    assert (config.max_samples, config.clip_range) == (1000, (0.2, 0.27))
    assert parsed.sources["seed"] is Source.FILE
    assert parsed.sources["temperature"] is Source.COMMAND_LINE
    assert parsed.sources["gamma"] is Source.DEFAULT


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        rl().config.seed = 3  # type: ignore[misc]


def test_established_defaults() -> None:
    config = rl().config
    assert (config.train_batch_size, config.rollout_batch_size, config.n_samples_per_prompt) == (128, 1024, 1)
    assert (config.actor_learning_rate, config.critic_learning_rate) == (1e-6, 9e-6)
    assert (config.init_kl_coef, config.kl_estimator, config.eps_clip, config.value_clip) == (0.01, "k1", 0.2, 0.2)
    assert (config.reward_clip_range, config.adam_betas, config.max_norm) == ((-10.0, 10.0), (0.9, 0.95), 1.0)
    assert (config.prompt_max_len, config.generate_max_len, config.zero_stage, config.seed) == (1024, 1024, 2, 42)
    assert (config.vllm_is_correction_type, config.vllm_is_truncated_threshold) == ("tis", (0.5, 5.0))


def test_derived_numbers() -> None:
    config = rl(
        "--rollout_batch_size", "10", "--n_samples_per_prompt", "4", "--train_batch_size", "16", "--max_epochs", "2"
    ).config
    assert config.samples_per_rollout == 40
    assert config.updates_per_rollout == 3 * 2  # ceil(40 / 16) updates, twice
    assert rl("--advantage_estimator", "dr_grpo").config.aggregation == "constant"
    assert rl("--advantage_estimator", "group_norm").config.aggregation == "token_mean"
    assert rl("--advantage_estimator", "dr_grpo", "--policy_loss_type", "gspo").config.aggregation == "sequence_mean"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pretrian", "x"], ["--pretrian", "--pretrain"]),
        (["--colocate_all"], ["--colocate_all", "did you mean"]),
        (["--seed", "abc"], ["--seed abc", "whole number"]),
        (["--seed", "-1"], ["--seed -1: must be at least 0."]),
        (["--seed", str(2**70)], [f"--seed {2**70}: must be at most 4294967295."]),
        (["--actor_learning_rate", "inf"], ["--actor_learning_rate inf: must be a finite number."]),
        (["--max_norm", "nan"], ["--max_norm nan: must be a finite number."]),
        (["--reward_weights", "1", "inf"], ["--reward_weights 1 inf: must be a finite number."]),
        (["--temperature", "0"], ["--temperature 0", "greater than 0"]),
        (["--advantage_estimator", "grpo"], ["--advantage_estimator grpo", "group_norm"]),
        (["--vllm_num_engines", "0"], ["--vllm_num_engines 0", "at least 1 or auto"]),
        (["--loss_aggregation", "mean"], ["--loss_aggregation mean", "token_mean", "auto"]),
        (["--bf16", "true"], ["--bf16 takes no value", "--no_bf16"]),
        (["--bf16=true"], ["--bf16 takes no value", "--no_bf16"]),
        (["--adam_betas", "0.9"], ["--adam_betas", "2 arguments"]),
        (["--train_batch_size"], ["--train_batch_size", "one argument"]),
        (["--local_rank", "0"], ["--local_rank", "not supported yet"]),
        (["word"], ["'word'", "flag"]),
    ],
)
def test_parse_errors_name_flag_and_way_out(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        rl(*flags)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sede: 1\n", ["sede", "seed"]),
        ("- a\n- b\n", ["mapping"]),
        ("a: [1\n", ["not valid YAML", "expected ',' or ']'", "line 2"]),
        ("seed: [1, 2]\n", ["--seed 1 2", "whole number"]),
        ("seed:\n", ["--seed (no value)", "whole number"]),
        ("adam_betas: 0.9\n", ["--adam_betas 0.9", "list"]),
        (
            "eval_dataset: None\n",
            [
                "--eval_dataset None is the text 'None', not the absence of a value; in YAML, write null or leave the line out."
            ],
        ),
        ("seed: 1\nbf16: true\nseed: 2\n", ["sets seed more than once"]),
    ],
)
def test_file_errors(tmp_path: Path, content: str, words: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        rl("--config", str(file))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_none_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        rl("--eval_dataset", "None")
    assert str(error.value) == "--eval_dataset None is the text 'None', not the absence of a value: leave it out."
    (tmp_path / "run.yaml").write_text("eval_dataset: null\nrun_dir: ~\n")
    assert rl("--config", str(tmp_path / "run.yaml")).config.eval_dataset is None


CONTRADICTIONS = [
    (["--ring_attn_size", "2", "--max_tokens_per_gpu", "100"], ["--ring_attn_size 2", "--max_tokens_per_gpu 100"]),
    (["--ring_head_stride", "2"], ["--ring_head_stride 2", "--ring_attn_size"]),
    (["--input_template", "Q: {}", "--apply_chat_template"], ["--input_template", "--apply_chat_template"]),
    (["--input_template", "no hole"], ["--input_template", "{}"]),
    (["--tokenizer_chat_template", "{{x}}"], ["--tokenizer_chat_template", "--apply_chat_template"]),
    (
        ["--tokenizer_chat_template", "{% for m in messages %}\n{{ m['role' }}{% endfor %}", "--apply_chat_template"],
        [
            "--tokenizer_chat_template has a syntax error in line 2 (unexpected '}', expected ']'): correct the template."
        ],
    ),
    (["--lora_alpha", "8"], ["--lora_alpha 8 has no effect without --lora_rank: add it, or leave the first out."]),
    (["--eval_steps", "2"], ["--eval_steps 2 has no effect without --eval_dataset: add it, or leave the first out."]),
    (["--value_head_prefix", "a.b"], ["--value_head_prefix 'a.b' must be a plain name such as score."]),
    (["--tokenizer_chat_template", "chat.jinja", "--apply_chat_template"], ["'chat.jinja' is no Jinja", "cat FILE"]),
    (["--adam_betas", "0.9", "1"], ["--adam_betas 0.9 1", "below 1"]),
    (["--max_len", "100"], ["--max_len", "--prompt_max_len"]),
    (["--remote_rm_url", "localhost:5000"], ["--remote_rm_url localhost:5000", "http://"]),
    (["--remote_rm_url", "reward.py"], ["--reward_func", "reward.py twice"]),
    (["--remote_rm_url", "http://a/x,http://a/x"], ["--remote_rm_url", "http://a/x twice"]),
    (["--remote_rm_url", "http://a/x", "--remote_rm_mode", "ensemble"], ["--remote_rm_mode ensemble", "several"]),
    (["--reward_combine", "mean"], ["--reward_combine mean", "several rewards"]),
    (
        ["--reward_weights", "1", "2"],
        ["--reward_weights has 2 numbers for 1 rewards (0 models, 0 servers, 1 functions)"],
    ),
    (["--reward_pretrain", "m,n", "--reward_weights", "1", "0", "2"], ["--reward_weights", "not 0"]),
    (
        ["--reward_pretrain", "m", "--reward_weights", "1", "-1", "--reward_combine", "mean"],
        ["--reward_weights", "--reward_combine mean"],
    ),
    (["--max_reward_errors", "2"], ["--max_reward_errors 2", "at most 1"]),
    (["--normalize_reward"], ["--normalize_reward", "--reward_pretrain"]),
    (["--reward_clip_range", "5", "-5"], ["--reward_clip_range"]),
    (["--top_p", "0.9"], ["--top_p", "cut distribution"]),
    (["--rollout_engine", "transformers", "--enforce_eager"], ["--enforce_eager", "--rollout_engine transformers"]),
    (["--advantage_estimator", "rloo"], ["rloo", "--n_samples_per_prompt"]),
    ([*GRPO, "--gamma", "0.9"], ["--gamma", "group_norm"]),
    ([*GRPO, "--critic_pretrain", "m"], ["--critic_pretrain", "group_norm"]),
    (["--use_kl_loss"], ["--kl_estimator k1", "--use_kl_loss"]),
    (["--use_kl_loss", "--kl_estimator", "k3", "--init_kl_coef", "0"], ["--use_kl_loss", "--init_kl_coef"]),
    (["--kl_estimator", "k3"], ["--kl_estimator k3", "--use_kl_loss"]),
    (["--kl_target", "1", "--init_kl_coef", "0"], ["--kl_target", "--init_kl_coef"]),
    (["--deepcompile"], ["--deepcompile", "--backend is fsdp2"]),
    (["--deepcompile", "--backend", "deepspeed"], ["--deepcompile", "packed batches"]),
    (["--fsdp_shard_size", "2", "--zero_stage", "0"], ["--fsdp_shard_size 2", "--zero_stage 0"]),
    (["--fsdp_shard_size", "2", "--backend", "deepspeed"], ["--fsdp_shard_size 2", "not --backend deepspeed"]),
    (
        ["--fsdp_shard_size", "2", "--ds_tensor_parallel_size", "2"],
        ["--ds_tensor_parallel_size 2", "--fsdp_shard_size 2"],
    ),
    (["--zpg", "2", "--zero_stage", "3"], ["--zpg 2", "--backend deepspeed", "fsdp2 and 3"]),
    (["--zpg", "2", "--backend", "deepspeed"], ["--zpg 2", "--zero_stage 3", "deepspeed and 2"]),
    (["--grad_accum_dtype", "bf16", "--bf16"], ["--grad_accum_dtype bf16", "--backend deepspeed"]),
    (["--grad_accum_dtype", "bf16", "--backend", "deepspeed"], ["--grad_accum_dtype bf16", "--bf16"]),
    (["--use_ds_universal_ckpt"], ["--use_ds_universal_ckpt", "--load_checkpoint"]),
    (["--train_batch_size", "2048"], ["--train_batch_size", "--rollout_batch_size"]),
    (["--no_packing_samples", "--micro_train_batch_size", "4"], ["--no_packing_samples", "--micro_train_batch_size"]),
    (["--max_tokens_per_gpu", "100"], ["--max_tokens_per_gpu", "--generate_max_len"]),
    (["--eval_at_start"], ["--eval_at_start", "--eval_dataset"]),
    (["--colocate_all_models", "--colocate_critic_reward"], ["--colocate_all_models", "--colocate_critic_reward"]),
    (["--colocate_actor_ref", "--actor_num_nodes", "2"], ["--colocate_actor_ref", "--ref_num_nodes"]),
    (["--save_hf_ckpt"], ["--save_hf_ckpt", "--save_steps"]),
    (["--disable_ds_ckpt"], ["--disable_ds_ckpt", "--save_hf_ckpt"]),
    (["--max_steps", "0"], ["--max_steps"]),
    (["--kl_target", "1", "--kl_horizon", "100"], ["--kl_horizon", "--kl_target"]),
    (["--eps_clip", "1"], ["--eps_clip: the clip range 1 1", "below 1"]),
    (["--policy_loss_type", "cispo", "--eps_clip_low_high", "1.1", "0.3"], ["--eps_clip_low_high", "at most 1"]),
    (["--policy_loss_type", "cispo", "--dual_clip", "3"], ["--dual_clip", "--policy_loss_type cispo"]),
    (
        ["--policy_loss_type", "gspo", "--loss_aggregation", "token_mean"],
        ["--policy_loss_type gspo", "--loss_aggregation token_mean"],
    ),
    (["--vllm_is_correction_type", "icepop"], ["--vllm_is_correction_type icepop", "--enable_vllm_is_correction"]),
    (["--vllm_is_truncated_threshold", "0", "2"], ["threshold 0 2", "--enable_vllm_is_correction"]),
    (
        ["--enable_vllm_is_correction", "--vllm_is_truncated_threshold", "2", "1"],
        ["--vllm_is_truncated_threshold 2 1", "below the second"],
    ),
    (
        ["--policy_loss_type", "gspo", "--enable_vllm_is_correction", "--vllm_is_correction_type", "seq-mask-tis"],
        ["--vllm_is_correction_type seq-mask-tis", "--policy_loss_type gspo"],
    ),
    (["--entropy_loss_coef", "-1"], ["--entropy_loss_coef -1", "at least 0"]),
]


@pytest.mark.parametrize(("flags", "words"), CONTRADICTIONS, ids=[" ".join(flags) for flags, _ in CONTRADICTIONS])
def test_contradictions_name_both_flags(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_rl(rl(*NEEDED, *flags).config)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_sound_configuration_passes() -> None:
    check_rl(rl(*NEEDED).config)
    marked = (
        "{% for m in messages %}{%- generation -%}{% break %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}"
    )
    check_rl(rl(*NEEDED, "--apply_chat_template", "--tokenizer_chat_template", marked).config)
    check_rl(rl(*NEEDED, *GRPO, "--use_kl_loss", "--kl_estimator", "k3", "--bf16", "--packing_samples").config)
    unbounded = ["--policy_loss_type", "cispo", "--eps_clip_low_high", "1", "0.3"]
    check_rl(rl(*NEEDED, *unbounded, "--enable_vllm_is_correction", "--vllm_is_correction_type", "icepop").config)
    check_rl(rl(*NEEDED, *GRPO, "--policy_loss_type", "gspo", "--enable_vllm_is_correction").config)


def test_paths_expand_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = rl("--pretrain", "~/model", "--save_path", "~/out", "--prompt_data", "a~b").config
    assert (config.pretrain, config.save_path, config.prompt_data) == ("/home/me/model", "/home/me/out", "a~b")


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--save_path \(no value\): must be a path, not an empty text"):
        rl(*NEEDED, "--save_path", "")


def test_required_flags() -> None:
    for missing in ("--pretrain", "--prompt_data"):
        index = NEEDED.index(missing)
        with pytest.raises(ConfigError, match=missing):
            check_rl(rl(*NEEDED[:index], *NEEDED[index + 2 :]).config)
    with pytest.raises(ConfigError, match="no reward"):
        check_rl(rl(*NEEDED[:4]).config)
    check_rl(rl(*NEEDED[:4]).config, reward_given=True)
    with pytest.raises(ConfigError, match="A reward function was passed and --reward_func is set too"):
        check_rl(rl(*NEEDED).config, reward_given=True)


def test_help_and_errors_are_fast_and_import_no_torch() -> None:
    script = (
        "import sys\nfrom togi.cli.main import main\ncode = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    for argv, status in ((["--help"], 0), (["rl", "--pretrain"], 2), (["rll"], 2), (["rl", *NEEDED, "--seed", "x"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", script, *argv], check=False, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr


def test_help_lists_every_flag() -> None:
    words = [sys.executable, "-m", "togi", "rl", "--help"]
    done = subprocess.run(words, check=True, cwd=ROOT, capture_output=True, text=True)
    for name in RLConfig.model_fields:
        assert f"--{name}" in done.stdout, name


def test_every_accepted_flag_is_read_somewhere() -> None:
    """A flag that no code reads would be accepted and ignored. Declared and checked does not count as read."""
    read = set()
    for path in (ROOT / "togi").rglob("*.py"):
        if path.name in ("checks.py", "fields.py", "parse.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    extra = {name: field.json_schema_extra for name, field in RLConfig.model_fields.items()}
    accepted = {name for name in RLConfig.model_fields if not extra[name]}
    constant = {"deepcompile", "top_p"}  # refused by the checks unless they have the one value that works
    always_on = {"use_ds_universal_ckpt"}  # as its help says
    assert accepted - read - constant - always_on == set()
