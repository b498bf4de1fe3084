"""What an offline run is made of beside its rows: its models and the checkpoint it goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import torch

from togi.config.offline import (
    DPOConfig,
    KDConfig,
    KTOConfig,
    OfflineConfig,
    PRMConfig,
    RMConfig,
    SFTConfig,
)
from togi.data.records import StepExamples
from togi.learn.distill_objective import DistillationObjective
from togi.learn.learner import Learner
from togi.learn.objective import Objective, SFTObjective, StepRewardObjective
from togi.learn.preference_objective import DPOObjective, KTOObjective, PairwiseRewardObjective
from togi.learn.schedule import MeasuredRate, Schedule
from togi.learn.scorer import Scorer
from togi.model.loading import ModelSource, load_causal_lm, load_scalar_model, read_config
from togi.model.policy import PolicyModel, ScalarModel
from togi.parallel.backend import BackendOptions, backend_options
from togi.parallel.build import frozen, frozen_on_host, reads_parts, trainable
from togi.parallel.process import World, be_deterministic
from togi.parallel.ring import Ring
from togi.recipes.offline_data import Data, Task
from togi.recipes.offline_generation import Student, start_engines
from togi.recipes.offline_reference import with_reference
from togi.recipes.offline_steps import Dealer, Preparation, Share, WithKL, WithReference
from togi.run.journal import Journal
from togi.run.plan import EpochPlan

CLASSIFIER = "ForSequenceClassification"
Model = TypeVar("Model", PolicyModel, ScalarModel, PolicyModel | ScalarModel)


class Joining(Protocol):
    def __call__(self, model: Model) -> Model: ...


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


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """A language model that is only read, and the context to run it in."""

    model: PolicyModel
    around: Callable[[], AbstractContextManager[None]]


def load_models(
    config: OfflineConfig, task: Task, data: Data, plan: EpochPlan, world: World, journal: Journal
) -> Models:
    """Load every model and put it on this rank's device. Random numbers start from ``--seed`` on every rank alike."""
    engines = start_engines(config, world)
    if config.full_determinism:
        be_deterministic()
    options = backend_options(config)
    join, dealer = joining(config, world), dealer_of(config, task, world)
    if scores_ahead(config) and not base_is_reference(config, task):
        data = with_reference(
            config, task.reference, data, partial(_own_reference, config, task, join, world, options), dealer, journal
        )
    torch.manual_seed(config.seed)
    model = join(_trained(config, task, world))
    vocabulary = model.vocabulary if isinstance(model, PolicyModel) else 0
    backend = trainable(model, world, options, model.read)
    kind = MeasuredRate if config.lr_scheduler.follows_a_loss else Schedule
    schedule = kind.of(config, config.learning_rate, plan.steps)
    whole = replace(options, zero_stage=0)
    teachers = [_frozen(config, path, join, world, whole) for path in (task.teacher,) if path]
    objective = _objective(config, data, teachers, vocabulary)
    max_norm = config.max_norm if config.max_norm > 0 else math.inf
    learner = Learner(backend, objective, schedule, max_norm, config.aux_loss_coef)
    policy = Scorer(backend.module, world)
    if scores_ahead(config) and base_is_reference(config, task):
        data = with_reference(config, task.reference, data, lambda: _base(policy), dealer, journal)
    if not task.reference or scores_ahead(config):
        students = tuple(Student(config, engine, model, learner, plan, data, dealer) for engine in engines)
        return Models(data, model, learner, policy, dealer, Share(dealer), students)
    inside = base_is_reference(config, task)
    reference = _base(policy) if inside else _own_reference(config, task, join, world, options)
    prepare = WithKL(dealer, reference, policy) if task.mismatched else WithReference(dealer, reference)
    return Models(data, model, learner, policy, dealer, prepare)


def scores_ahead(config: OfflineConfig) -> bool:
    """Whether the reference scores everything before the training."""
    return isinstance(config, DPOConfig) and config.precompute_ref


def base_is_reference(config: OfflineConfig, task: Task) -> bool:
    """Whether the policy has the reference inside: with LoRA, its frozen base. Then no second copy is loaded."""
    return config.lora is not None and task.reference == config.pretrain


def offload_notice(config: OfflineConfig, task: Task, world: World) -> str:
    """Why an offload flag does nothing here, "" if it does something or is not set."""
    flag = offload_flag(config)
    if flag and base_is_reference(config, task):
        return f"{flag}: with --lora_rank the reference is the base inside the policy, there is no second model to move"
    if flag and world.device.type == "cpu":
        return f"{flag}: there is no accelerator here, all weights are in host memory anyway"
    return ""


def moves_weights(config: OfflineConfig, world: World) -> bool:
    """Whether frozen weights lie in host memory and are brought to the device."""
    return offload_flag(config) != "" and world.device.type != "cpu"


def offload_flag(config: OfflineConfig) -> str:
    """The flag that asks for frozen weights in host memory, "" if none does."""
    if isinstance(config, DPOConfig | KTOConfig) and config.ref_offload:
        return "--ref_offload"
    if isinstance(config, KDConfig) and config.teacher_offload:
        return "--teacher_offload"
    return ""


def joining(config: OfflineConfig, world: World) -> Joining:
    """What puts a model into this rank's ring; with ``--ring_attn_size`` 1 nothing does. All ranks call together."""
    if world.ring_size == 1:
        return lambda model: model
    ring = Ring(world)

    def join(model: Model) -> Model:
        model.join_ring(ring, config.ring_head_stride)
        return model

    return join


def dealer_of(config: OfflineConfig, task: Task, world: World) -> Dealer:
    """The micro-batch flags count rows; a pair is two sequences. A ring has the token budget of all its ranks."""
    rows = config.micro_train_batch_size if config.packing_samples else 1
    most = None if rows == "auto" else rows * task.width
    return Dealer(world, config.max_tokens_per_gpu * world.ring_size, most, share_prefix=task.width > 1)


def _trained(config: OfflineConfig, task: Task, world: World) -> PolicyModel | ScalarModel:
    """A reward model that starts from a language model gets a new head; one that is a reward model keeps its own."""
    source = _source(config, config.pretrain, world, backend_options(config), trained=True)
    if not task.scalar:
        return load_causal_lm(source)
    assert isinstance(config, RMConfig)
    kinds = read_config(config.pretrain, config.trust_remote_code).architectures or ()
    init_head = not any(kind.endswith(CLASSIFIER) for kind in kinds)
    return load_scalar_model(source, init_head=init_head, value_head_prefix=config.value_head_prefix)


def _frozen(config: OfflineConfig, path: str, join: Joining, world: World, options: BackendOptions) -> Frozen:
    """A language model that is only read, where the offload flags want it."""
    model = load_causal_lm(_source(config, path, world, options, trained=False))
    join(model)
    if moves_weights(config, world):
        return Frozen(model, frozen_on_host(model, world, options, model.read))
    frozen(model, world, options, model.read)
    return Frozen(model, nullcontext)


def _objective(config: OfflineConfig, data: Data, teachers: Sequence[Frozen], vocabulary: int) -> Objective:
    """The loss of a command. ``vocabulary``: tokens that the model in training predicts."""
    match config:
        case SFTConfig():
            return SFTObjective()
        case RMConfig():
            return PairwiseRewardObjective(config.loss, config.margin_loss)
        case DPOConfig():
            return DPOObjective(config.beta, config.label_smoothing, config.ipo, config.nll_loss_coef)
        case KTOConfig():
            return KTOObjective(config.beta, config.desirable_loss_weight, config.undesirable_loss_weight)
        case PRMConfig():
            return _step_reward(data)
        case KDConfig():
            (teacher,) = teachers
            return DistillationObjective(
                teacher.model, vocabulary, config.kd_coef, config.kd_divergence, around=teacher.around
            )
    raise AssertionError(f"no objective for {type(config).__name__}")


def _step_reward(data: Data) -> Objective:
    """How labels are to be read is found in the data, and is the same in both sets (``check_plan``)."""
    assert isinstance(data.train, StepExamples)
    return StepRewardObjective(data.train.labels.reward_ids, data.train.labels.soft)


def _own_reference(config: OfflineConfig, task: Task, join: Joining, world: World, options: BackendOptions) -> Scorer:
    """The frozen model that the policy is held to, a copy of its own."""
    reference = _frozen(config, task.reference, join, world, options)
    return Scorer(reference.model, world, reference.around)


def _base(policy: Scorer) -> Scorer:
    """The base inside a policy that is trained with LoRA."""
    from togi.model.adapters import without_adapter

    return Scorer(policy.module, policy.world, partial(without_adapter, policy.module))


def _source(config: OfflineConfig, path: str, world: World, options: BackendOptions, *, trained: bool) -> ModelSource:
    defer = reads_parts(world, options, trained=trained)
    return ModelSource.of(config, path, world.device, in_ring=world.ring_size > 1, trained=trained, defer=defer)
