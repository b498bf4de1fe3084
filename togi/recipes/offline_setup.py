"""The models of an offline run."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import torch

from togi.learn.learner import Learner
from togi.learn.schedule import MeasuredRate, Schedule
from togi.learn.scorer import Scorer
from togi.methods.method import Method
from togi.methods.training import Dealer, Frozen, Material, Preparation, Share
from togi.model.loading import ModelSource, load_causal_lm, load_scalar_model, read_config
from togi.model.policy import PolicyModel, ScalarModel
from togi.parallel.backend import BackendOptions, backend_options
from togi.parallel.build import frozen, frozen_on_host, reads_parts, trainable
from togi.parallel.process import World, be_deterministic
from togi.parallel.ring import Ring
from togi.recipes.offline_data import Data
from togi.recipes.offline_generation import Student, start_engines
from togi.recipes.offline_reference import with_reference
from togi.run.journal import Journal
from togi.run.plan import EpochPlan

CLASSIFIER = "ForSequenceClassification"
Model = TypeVar("Model", PolicyModel, ScalarModel, PolicyModel | ScalarModel)


class Joining(Protocol):
    def __call__(self, model: Model) -> Model: ...


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """The model in training, the rows (read or precomputed), and the preparation of the steps.

    ``students``: the model in training as a generator, one with ``--on_policy_share``, else none.
    """

    data: Data
    model: PolicyModel | ScalarModel
    learner: Learner
    policy: Scorer
    dealer: Dealer
    prepare: Preparation
    students: tuple[Student, ...] = ()


def load_models(config: Method, data: Data, plan: EpochPlan, world: World, journal: Journal) -> Models:
    """Load every model onto this rank's device. Random numbers start from ``--seed``, the same on every rank."""
    # Stage 1: engines, before any model takes memory.
    engines = start_engines(config, world)
    if config.full_determinism:
        be_deterministic()
    options = backend_options(config, bf16=config.bf16)
    join, dealer = joining(config, world), dealer_of(config, world)
    # Stage 2: a reference of its own scores all rows and is freed before the policy is loaded.
    if config.scores_ahead and not base_is_reference(config):
        data = with_reference(
            config, config.reference, data, partial(_own_reference, config, join, world, options), dealer, journal
        )
    # Stage 3: the model in training, sharded, with its schedule and loss.
    torch.manual_seed(config.seed)
    model = join(_trained(config, world))
    vocabulary = model.vocabulary if isinstance(model, PolicyModel) else 0
    backend = trainable(model, world, options, model.read)
    kind = MeasuredRate if config.lr_scheduler.follows_a_loss else Schedule
    schedule = kind.of(config, config.learning_rate, plan.steps)
    whole = replace(options, zero_stage=0)
    # Teachers are whole on every rank.
    teachers = tuple(_frozen(config, path, join, world, whole) for path in (config.teacher,) if path)
    objective = config.objective(Material(data.train, teachers, vocabulary))
    max_norm = config.max_norm if config.max_norm > 0 else math.inf
    learner = Learner(backend, objective, schedule, max_norm, config.aux_loss_coef)
    policy = Scorer(backend.module, world)
    # Stage 4: the reference. With LoRA it is the base inside the policy, so it comes after the policy.
    if config.scores_ahead and base_is_reference(config):
        data = with_reference(config, config.reference, data, lambda: _base(policy), dealer, journal)
    if not config.reference or config.scores_ahead:
        students = tuple(Student(config, engine, model, learner, plan, data, dealer) for engine in engines)
        return Models(data, model, learner, policy, dealer, Share(dealer), students)
    inside = base_is_reference(config)
    reference = _base(policy) if inside else _own_reference(config, join, world, options)
    return Models(data, model, learner, policy, dealer, config.preparation(dealer, policy, reference))


def base_is_reference(config: Method) -> bool:
    """Whether the reference is the frozen base inside a LoRA policy. Then no second copy is loaded."""
    return config.lora is not None and config.reference == config.pretrain


def offload_notice(config: Method, world: World) -> str:
    """Why an offload flag has no effect here; "" if it has or is not set."""
    flag = config.offload_flag
    if flag and base_is_reference(config):
        return f"{flag}: with --lora_rank the reference is the base inside the policy, there is no second model to move"
    if flag and world.device.type == "cpu":
        return f"{flag}: there is no accelerator here, all weights are in host memory anyway"
    return ""


def moves_weights(config: Method, world: World) -> bool:
    """Whether frozen weights are in host memory and are copied to the device for use."""
    return config.offload_flag != "" and world.device.type != "cpu"


def joining(config: Method, world: World) -> Joining:
    """A function that puts a model into this rank's ring; the identity for ``--ring_attn_size`` 1. All ranks call together."""
    if world.ring_size == 1:
        return lambda model: model
    ring = Ring(world)

    def join(model: Model) -> Model:
        model.join_ring(ring, config.ring_head_stride)
        return model

    return join


def dealer_of(config: Method, world: World) -> Dealer:
    """The dealer of micro-batches. Its flags count rows; a pair is two sequences. A ring has the token budget of all its ranks."""
    rows = config.micro_train_batch_size if config.packing_samples else 1
    most = None if rows == "auto" else rows * config.width
    return Dealer(world, config.max_tokens_per_gpu * world.ring_size, most, share_prefix=config.width > 1)


def _trained(config: Method, world: World) -> PolicyModel | ScalarModel:
    """The model in training. A reward model from a language model gets a new head; one that has a head keeps it."""
    source = _source(config, config.pretrain, world, backend_options(config, bf16=config.bf16), trained=True)
    if not config.is_scalar:
        return load_causal_lm(source)
    kinds = read_config(config.pretrain, config.trust_remote_code).architectures or ()
    init_head = not any(kind.endswith(CLASSIFIER) for kind in kinds)
    return load_scalar_model(source, init_head=init_head, value_head_prefix=config.head)


def _frozen(config: Method, path: str, join: Joining, world: World, options: BackendOptions) -> Frozen:
    """A frozen language model, in host memory if an offload flag is set."""
    model = load_causal_lm(_source(config, path, world, options, trained=False))
    join(model)
    if moves_weights(config, world):
        return Frozen(model, frozen_on_host(model, world, options, model.read))
    frozen(model, world, options, model.read)
    return Frozen(model, nullcontext)


def _own_reference(config: Method, join: Joining, world: World, options: BackendOptions) -> Scorer:
    """The reference model as a copy of its own, frozen."""
    reference = _frozen(config, config.reference, join, world, options)
    return Scorer(reference.model, world, reference.around)


def _base(policy: Scorer) -> Scorer:
    """The frozen base of a LoRA policy as the reference."""
    from togi.model.adapters import without_adapter

    return Scorer(policy.module, policy.world, partial(without_adapter, policy.module))


def _source(config: Method, path: str, world: World, options: BackendOptions, *, trained: bool) -> ModelSource:
    defer = reads_parts(world, options, trained=trained)
    return ModelSource.of(config, path, world.device, in_ring=world.ring_size > 1, trained=trained, defer=defer)
