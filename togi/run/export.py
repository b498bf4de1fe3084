"""``togi export``: write a model that a run left behind as a plain Hugging Face folder with a model card.

A final model is copied as it is; an adapter is merged into its base. A checkpoint holds whole float32 tensors under the
parameter names of the model in training, whatever the backend: they are loaded into that model, which is then written as the
run writes its final model.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from togi.config.shared import ADAPTER_CONFIG, LoRA
from togi.config.tools import ExportConfig, MergeConfig
from togi.data.chat import Tokenizer, load_tokenizer, stop_token_ids
from togi.errors import CheckpointError, ConfigError, DataError, ModelError
from togi.learn.checkpoint import HF_FOLDER, STATE, Checkpoint, CheckpointStore, read_checkpoint
from togi.learn.learner_state import read_masters
from togi.methods import METHODS
from togi.model.checkpoint import RUN_FILE, save_hf, written_aside
from togi.model.loading import ModelSource, dtype_of, load_causal_lm, load_scalar_model
from togi.model.merge import load_merged, named_base, save_proven
from togi.model.policy import PolicyModel, ScalarModel
from togi.obs.model_card import CARD, model_card
from togi.obs.run_dir import RunDirectory
from togi.run.preflight import check_target


class Run:
    """A run's folder, and the settings of its command."""

    def __init__(self, config: ExportConfig) -> None:
        self.directory = RunDirectory(Path(config.run_dir))
        info = self.directory.read_info()
        self.id = info.run_id
        self.values: dict[str, Any] = {name: entry["value"] for name, entry in info.values.items()}
        self.is_rl, self.trust_remote_code = info.command == "rl", config.trust_remote_code
        self.role = config.role
        self.is_critic = config.role == "critic"
        if self.is_critic and not self.is_rl:
            raise ConfigError(
                f"--role critic is of togi rl, but {config.run_dir} is a run of togi {info.command}: leave it out."
            )
        self.pretrain = config.pretrain or self.values["pretrain"]
        # A critic starts from --critic_pretrain, else the first reward model, else the policy, as in the run.
        if self.is_critic and config.pretrain is None:
            models = (self.values["reward_pretrain"] or "").split(",")
            self.pretrain = self.values["critic_pretrain"] or models[0] or self.pretrain
        method = METHODS.get(info.command)
        self.is_scalar = self.is_critic or (method is not None and method.is_scalar)
        # In words, for the model card.
        self.training = "online reinforcement learning" if method is None else method.title
        # The run itself writes its models like this.
        self.dtype = dtype_of(self.values["bf16"])
        self.final_model = Path(self.values["save_path"] + ("_critic" if self.is_critic else ""))

    @property
    def lora(self) -> LoRA | None:
        """The adapter of the run. Its base is not quantised here: the merge is computed in float32, as by merge-lora."""
        v = self.values
        if v["lora_rank"] == 0:
            return None
        return LoRA(v["lora_rank"], v["lora_alpha"], v["lora_dropout"], tuple(v["target_modules"]), load_in_4bit=False)

    def check_own(self, source: Path, writer: str | None) -> None:
        """Raise ConfigError if ``source`` was written by another run than this one. ``writer``: the id of that run."""
        if writer != self.id:
            raise ConfigError(
                f"{source} was not written by the run --run_dir {self.directory.root}: give the folder of the run that wrote it, "
                "or a checkpoint of this run by --ckpt."
            )

    def tokenizer(self, path: str, chat_template: str | None = None) -> Tokenizer:
        return load_tokenizer(path, chat_template=chat_template, trust_remote_code=self.trust_remote_code)

    def convert(self, checkpoint: Checkpoint, aside: Path) -> None:
        """Write the model that a resumable checkpoint holds."""
        folder = checkpoint.path / self.role if self.is_rl else checkpoint.path
        if not folder.is_dir():
            raise CheckpointError(f"The checkpoint {checkpoint.path} has no {self.role}: that run trained none.")
        # The model as before training, in float32. A scalar head may be new here: the checkpoint has the trained one.
        source = ModelSource(self.pretrain, torch.float32, trust_remote_code=self.trust_remote_code, lora=self.lora)
        model: PolicyModel | ScalarModel
        if self.is_scalar:
            model = load_scalar_model(source, init_head=True, value_head_prefix=self.values["value_head_prefix"])
        else:
            model = load_causal_lm(source)
        # The checkpoint holds trained parameters only: frozen ones (the base of an adapter) come from --pretrain.
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        with torch.no_grad():
            for name, master in read_masters(folder, {name: tuple(own.shape) for name, own in trained.items()}):
                trained[name].copy_(master)
        path = self.values["pretrain"] if self.is_critic else self.pretrain
        tokenizer = self.tokenizer(path, self.values["tokenizer_chat_template"])
        if isinstance(model, PolicyModel):
            chat = bool(self.values.get("apply_chat_template"))
            model.end_answers_with(stop_token_ids(tokenizer, self.values["pretrain"], chat=chat))
        if model.is_adapted:
            save_proven(aside, model, tokenizer, self.dtype, trust_remote_code=self.trust_remote_code)
        else:
            save_hf(aside, model, model.named_parameters(), tokenizer, self.dtype)

    def merge(self, adapter: Path, aside: Path) -> None:
        """Write the model that an adapter and its base are together."""
        trust = self.trust_remote_code
        model = load_merged(str(adapter), self.pretrain, scalar=self.is_scalar, trust_remote_code=trust)
        save_proven(aside, model, self.tokenizer(str(adapter)), self.dtype, trust_remote_code=trust)


def export(config: ExportConfig) -> Iterator[str]:
    """Write the folder; yield the lines to print. Raises UserError for a run that cannot be exported."""
    run, checkpoint = Run(config), _checkpoint(config)
    # The source is the model folder inside a checkpoint, or else the final model of the run.
    source = run.final_model
    if checkpoint is not None:
        source = checkpoint.path / HF_FOLDER
        run.check_own(checkpoint.path, checkpoint.state.get("run_id"))
        yield f"from the checkpoint of step {checkpoint.step}: {checkpoint.path}"
    elif not source.is_dir():
        raise ConfigError(
            f"The run {config.run_dir} has no final model in {source}: give one of its checkpoints by --ckpt."
        )
    else:
        file = source / RUN_FILE
        run.check_own(source, json.loads(file.read_text(encoding="utf-8"))["run_id"] if file.is_file() else None)
    sources = [("run_dir", config.run_dir), ("save_path", str(source)), ("pretrain", run.pretrain)]
    check_target("output_path", config.output_path, sources)
    with written_aside(Path(config.output_path)) as aside:
        # A resumable checkpoint holds tensors to convert; without them the source is already a model folder.
        if checkpoint is not None and checkpoint.state["resumable"]:
            run.convert(checkpoint, aside)
            if run.is_scalar and not run.is_critic:
                yield "mean and std of the rewards are measured when a run writes its model; a checkpoint has none"
        elif (source / ADAPTER_CONFIG).is_file():
            run.merge(source, aside)
        else:
            _copy(source, aside)
        step = None if checkpoint is None else checkpoint.step
        card = model_card(
            run.directory, base_model=run.pretrain, training=run.training, is_scalar=run.is_scalar, step=step
        )
        (aside / CARD).write_text(card, encoding="utf-8")


def _checkpoint(config: ExportConfig) -> Checkpoint | None:
    """The checkpoint that ``--ckpt`` names, either itself or the newest in its folder. Raises CheckpointError if incomplete."""
    if config.ckpt is None:
        return None
    path = Path(config.ckpt)
    found = read_checkpoint(path) if (path / STATE).is_file() else CheckpointStore(path).latest()
    if found is None:
        raise CheckpointError(
            f"--ckpt {path} has no complete checkpoint: give the --ckpt_path of a run with --save_steps."
        )
    return found


def _copy(source: Path, aside: Path) -> None:
    """Copy the files of a model folder, without hidden files, training records and the card of another model."""
    if not (source / "config.json").is_file():
        raise ConfigError(f"{source} holds no model: give a checkpoint by --ckpt.")
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(".") and file.name not in (CARD, RUN_FILE):
            shutil.copy(file, aside)


def _check_rows(config: MergeConfig, model: PolicyModel | ScalarModel, tokenizer: Tokenizer) -> None:
    """Check that tokens which were added to the tokenizer have rows in the adapter's embedding. Raises ModelError.

    A tokenizer that is larger than its model is only a fault if the base's tokenizer is not.
    """
    base, largest = str(model.hf.config.name_or_path), max(tokenizer.get_vocab().values())
    rows = int(model.hf.get_input_embeddings().weight.shape[0])
    if largest < rows:
        return
    try:
        known = max(
            load_tokenizer(base, chat_template=None, trust_remote_code=config.trust_remote_code).get_vocab().values()
        )
    except DataError:  # a base without a tokenizer: nothing says that tokens were added
        known = largest
    if known < rows:
        raise ModelError(
            f"the tokenizer of the adapter {config.lora_path} has {largest + 1} tokens and the model {base} has {rows} rows in "
            "its embedding, and the adapter does not hold the others: give the model with the added tokens as --model_path."
        )


def merge(config: MergeConfig) -> None:
    """Write the merged model, with the tokenizer that lies beside the adapter or else the base model's.

    Raises ModelError for an adapter that does not fit.
    """
    base = config.model_path or named_base(config.lora_path)
    check_target("output_path", config.output_path, [("lora_path", config.lora_path), ("model_path", base)])
    trust = config.trust_remote_code
    model = load_merged(config.lora_path, base, scalar=config.is_rm, trust_remote_code=trust)
    beside = (Path(config.lora_path) / "tokenizer_config.json").is_file()
    source = config.lora_path if beside else model.hf.config.name_or_path
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=trust)
    if beside:
        _check_rows(config, model, tokenizer)
    with written_aside(Path(config.output_path)) as aside:
        dtype = dtype_of(config.bf16)
        save_proven(aside, model, tokenizer, dtype, trust_remote_code=trust)
