"""What an offline run is made of beside its rows: its models and the checkpoint it goes on from."""

from __future__ import annotations

import logging
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from togi.errors import CheckpointError
from togi.learn.checkpoint import HF_FOLDER, Checkpoint, CheckpointStore
from togi.learn.learner import Learner
from togi.learn.learner_state import check_rank
from togi.learn.schedule import MeasuredRate, Schedule
from togi.learn.scorer import Scorer
from togi.methods.method import Method
from togi.methods.training import Dealer, Frozen, Material, Preparation, Share
from togi.model.loading import ModelSource, load_causal_lm, load_scalar_model, read_config
from togi.model.policy import PolicyModel, ScalarModel
from togi.parallel.backend import BackendOptions, backend_options
from togi.parallel.build import frozen, frozen_on_host, reads_parts, trainable
from togi.parallel.process import World
from togi.parallel.ring import Ring
from togi.recipes.offline_data import Data
from togi.recipes.offline_generation import Student, start_engines
from togi.recipes.offline_journal import Journal
from togi.recipes.offline_plan import EpochPlan
from togi.recipes.offline_reference import with_reference

NOT_SET = "not one that follows a loss"
CLASSIFIER = "ForSequenceClassification"
logger = logging.getLogger(__name__)
Model = TypeVar("Model", PolicyModel, ScalarModel, PolicyModel | ScalarModel)


class Joining(Protocol):
    def __call__(self, model: Model) -> Model: ...


def identity(config: Method, command: str, data: Data) -> dict[str, str]:
    """What must be the same for a resumed run to see every row exactly as often as an uninterrupted one."""
    same = {
        "command": f"togi {command}",
        "--dataset": data.train.fingerprint(),
        "--seed": str(config.seed),
        "--train_batch_size": str(config.train_batch_size),
    }
    # What such a schedule has seen is in the checkpoint; the others need only the step.
    return same | ({"--lr_scheduler": config.lr_scheduler.value} if config.lr_scheduler.follows_a_loss else {})


def find_checkpoint(config: Method, command: str, data: Data, world: World) -> Checkpoint | None:
    """With ``--load_checkpoint`` the newest complete checkpoint. The first rank looks, the others are told.

    Raises CheckpointError when it is another run's or holds no resumable state.
    """
    if not config.load_checkpoint:
        return None
    found = CheckpointStore(Path(config.ckpt_path)).latest() if world.is_first else None
    found = world.gather("checkpoint", found)[0]
    if found is None:
        logger.warning("--load_checkpoint: %s has no complete checkpoint, starting anew", config.ckpt_path)
        return None
    if not found.state["resumable"]:
        raise CheckpointError(
            f"The checkpoint {found.path} was written with --disable_ds_ckpt and cannot be resumed: start without "
            f"--load_checkpoint, with --pretrain set to its folder {HF_FOLDER}."
        )
    check_rank(found.path, config.lora_rank)
    saved, now = found.state["identity"], identity(config, command, data)
    if saved != now:
        pairs = {name: (saved.get(name, NOT_SET), now.get(name, NOT_SET)) for name in {**now, **saved}}
        different = "; ".join(f"{name} was {a}, is {b}" for name, (a, b) in pairs.items() if a != b)
        raise CheckpointError(
            f"The checkpoint {found.path} belongs to another run ({different}): resume with the same rows and settings, "
            "or choose another --ckpt_path."
        )
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """The model in training, the rows as they were read or scored ahead, and what prepares the steps.

    ``students``: the model in training as a generator; one with ``--on_policy_share``, else none.
    """

    data: Data
    model: PolicyModel | ScalarModel
    learner: Learner
    policy: Scorer
    dealer: Dealer
    prepare: Preparation
    students: tuple[Student, ...] = ()


def load_models(config: Method, data: Data, plan: EpochPlan, world: World, journal: Journal) -> Models:
    """Load every model and put it on this rank's device. Random numbers start from ``--seed`` on every rank alike."""
    engines = start_engines(config, world)
    if config.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
    options = backend_options(config, bf16=config.bf16)
    join, dealer = joining(config, world), dealer_of(config, world)
    if config.scores_ahead and not base_is_reference(config):
        data = with_reference(
            config, config.reference, data, partial(_own_reference, config, join, world, options), dealer, journal
        )
    torch.manual_seed(config.seed)
    model = join(_trained(config, world))
    vocabulary = model.vocabulary if isinstance(model, PolicyModel) else 0
    backend = trainable(model, world, options, model.read)
    kind = MeasuredRate if config.lr_scheduler.follows_a_loss else Schedule
    schedule = kind.of(config, config.learning_rate, plan.steps)
    whole = replace(options, zero_stage=0)
    teachers = tuple(_frozen(config, path, join, world, whole) for path in (config.teacher,) if path)
    objective = config.objective(Material(data.train, teachers, vocabulary))
    max_norm = config.max_norm if config.max_norm > 0 else math.inf
    learner = Learner(backend, objective, schedule, max_norm, config.aux_loss_coef)
    policy = Scorer(backend.module, world)
    if config.scores_ahead and base_is_reference(config):
        data = with_reference(config, config.reference, data, lambda: _base(policy), dealer, journal)
    if not config.reference or config.scores_ahead:
        students = tuple(Student(config, engine, model, learner, plan, data, dealer) for engine in engines)
        return Models(data, model, learner, policy, dealer, Share(dealer), students)
    inside = base_is_reference(config)
    reference = _base(policy) if inside else _own_reference(config, join, world, options)
    return Models(data, model, learner, policy, dealer, config.preparation(dealer, policy, reference))


def base_is_reference(config: Method) -> bool:
    """Whether the policy has the reference inside: with LoRA, its frozen base. Then no second copy is loaded."""
    return config.lora is not None and config.reference == config.pretrain


def offload_notice(config: Method, world: World) -> str:
    """Why an offload flag does nothing here, "" if it does something or is not set."""
    flag = config.offload_flag
    if flag and base_is_reference(config):
        return f"{flag}: with --lora_rank the reference is the base inside the policy, there is no second model to move"
    if flag and world.device.type == "cpu":
        return f"{flag}: there is no accelerator here, all weights are in host memory anyway"
    return ""


def moves_weights(config: Method, world: World) -> bool:
    """Whether frozen weights lie in host memory and are brought to the device."""
    return config.offload_flag != "" and world.device.type != "cpu"


def joining(config: Method, world: World) -> Joining:
    """What puts a model into this rank's ring; with ``--ring_attn_size`` 1 nothing does. All ranks call together."""
    if world.ring_size == 1:
        return lambda model: model
    ring = Ring(world)

    def join(model: Model) -> Model:
        model.join_ring(ring, config.ring_head_stride)
        return model

    return join


def dealer_of(config: Method, world: World) -> Dealer:
    """The micro-batch flags count rows; a pair is two sequences. A ring has the token budget of all its ranks."""
    rows = config.micro_train_batch_size if config.packing_samples else 1
    most = None if rows == "auto" else rows * config.width
    return Dealer(world, config.max_tokens_per_gpu * world.ring_size, most, share_prefix=config.width > 1)


def _trained(config: Method, world: World) -> PolicyModel | ScalarModel:
    """A reward model that starts from a language model gets a new head; one that is a reward model keeps its own."""
    source = _source(config, config.pretrain, world, backend_options(config, bf16=config.bf16), trained=True)
    if not config.is_scalar:
        return load_causal_lm(source)
    kinds = read_config(config.pretrain, config.trust_remote_code).architectures or ()
    init_head = not any(kind.endswith(CLASSIFIER) for kind in kinds)
    return load_scalar_model(source, init_head=init_head, value_head_prefix=config.head)


def _frozen(config: Method, path: str, join: Joining, world: World, options: BackendOptions) -> Frozen:
    """A language model that is only read, where the offload flags want it."""
    model = load_causal_lm(_source(config, path, world, options, trained=False))
    join(model)
    if moves_weights(config, world):
        return Frozen(model, frozen_on_host(model, world, options, model.read))
    frozen(model, world, options, model.read)
    return Frozen(model, nullcontext)


def _own_reference(config: Method, join: Joining, world: World, options: BackendOptions) -> Scorer:
    """The frozen model that the policy is held to, a copy of its own."""
    reference = _frozen(config, config.reference, join, world, options)
    return Scorer(reference.model, world, reference.around)


def _base(policy: Scorer) -> Scorer:
    """The base inside a policy that is trained with LoRA."""
    from togi.model.adapters import without_adapter

    return Scorer(policy.module, policy.world, partial(without_adapter, policy.module))


def _source(config: Method, path: str, world: World, options: BackendOptions, *, trained: bool) -> ModelSource:
    defer = reads_parts(world, options, trained=trained)
    return ModelSource.of(config, path, world.device, in_ring=world.ring_size > 1, trained=trained, defer=defer)
