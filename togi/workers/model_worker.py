"""A model as a worker: one rank of the actor, the critic, the reference or a reward model.

There are two kinds: models in training (``LearnerWorker``) and frozen models (``ScorerWorker``). Samples arrive whole; they are
packed here, next to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from togi.batch import Batch
from togi.config.choices import CorrectionType, PolicyLossType
from togi.config.rl import RLConfig
from togi.data.chat import load_tokenizer, stop_token_ids
from togi.data.packing import in_order, pack_all
from togi.device import default_device
from togi.learn.learner import Learner, Mixed, StepOutcome, UpdateReport
from togi.learn.learner_state import Ema, expected_bytes, load_learner, save_learner
from togi.learn.objective import EngineCorrection, Objective, PolicyObjective, SFTObjective, ValueObjective
from togi.learn.schedule import Schedule
from togi.learn.scorer import Scorer
from togi.model.checkpoint import FullParameters, expected_manifest, save_trained, whole_tensors
from togi.model.layers import clock
from togi.model.loading import ModelSource, dtype_of, load_causal_lm, load_scalar_model
from togi.model.policy import PolicyModel, ScalarModel
from togi.obs import names
from togi.parallel import frozen, reads_parts, trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.groups import Ring
from togi.parallel.optimizer import Parking
from togi.parallel.process import World
from togi.plan.machine import PeakMemory, Released, return_freed
from togi.plan.placement import LEARNERS, Carrier, Role
from togi.sample import Sample
from togi.weights import carriers
from togi.weights.buckets import Manifest

Arrays = list[NDArray[np.float32]]
# Small enough that engines load one bucket while the next is gathered; over gloo two to four times as fast as 256 MB.
BUCKET_BYTES = 64 << 20
EMA_FOLDER = "ema"
PTX = "ptx"
"""The prefix of the metrics of mixed-in rows."""


class ModelWorker:
    """What every rank does: join the process group, load, pack, and report peak memory."""

    def __init__(self) -> None:
        self._world = World.solo(torch.device("cpu"))  # until it joins the others of its role
        self._config: RLConfig
        self._scorer: Scorer
        self._memory = PeakMemory()

    def device_type(self) -> str:
        return self._world.device.type

    def take_peak(self) -> int:
        """Peak memory of the device since the last call, in bytes; on a CPU the peak resident size."""
        return take_peak(self._memory, self._world.device)

    def memory_bytes(self) -> int:
        """The highest resident size that ``take_peak`` has seen, in bytes."""
        return self._memory.highest

    def _join(self, meeting: carriers.Rendezvous, config: RLConfig, tensor_size: int = 1) -> None:
        self._config = config
        torch.manual_seed(config.seed)
        world = World.join(meeting, default_device())
        self._world = world.in_teams(config.ring_attn_size, tensor_size)

    def _load(self, role: Role, path: str) -> PolicyModel | ScalarModel:
        """The model of the role on the CPU, in this rank's ring if there are rings."""
        model = self._read(role, path)
        if self._world.ring_size > 1:
            model.join_ring(Ring(self._world), self._config.ring_head_stride)
        return model

    def _read(self, role: Role, path: str) -> PolicyModel | ScalarModel:
        """Read the model. A critic that starts from the policy gets a new head; other scalar models must have one."""
        config, world, trained = self._config, self._world, role in LEARNERS
        defer = reads_parts(world, BackendOptions.of(config), trained=trained)
        source = ModelSource.of(config, path, world.device, in_ring=world.ring_size > 1, trained=trained, defer=defer)
        if role in (Role.ACTOR, Role.REF):
            return load_causal_lm(source)
        init_head = role is Role.CRITIC and path == config.pretrain
        return load_scalar_model(source, init_head=init_head, value_head_prefix=config.value_head_prefix)

    def logprobs(self, samples: Sequence[Sample], temperature: float | None = None) -> Arrays:
        """Logprobs (nats) at each sample's trained tokens. ``temperature``: divides the logits; default: the sampling
        temperature.
        """
        divisor = self._config.temperature if temperature is None else temperature
        return self._per_sample(samples, lambda batches: self._scorer.logprobs(batches, divisor))

    def _per_sample(
        self, samples: Sequence[Sample], score: Callable[[Sequence[Batch]], Sequence[NDArray[np.float32]]]
    ) -> Arrays:
        """What ``score`` says of each sample, in their order."""
        packs = self._packs(samples, self._config.micro_rollout_batch_size)
        return in_order(packs, score(packs))

    def _packs(self, samples: Sequence[Sample], limit: int | str) -> list[Batch]:
        """Pack this rank's samples by the token budget. A ring has the budget of all its ranks."""
        config = self._config
        most = limit if isinstance(limit, int) else None
        return pack_all(
            samples,
            max_tokens=config.max_tokens_per_gpu * config.ring_attn_size,
            max_sequences=most if config.packing_samples else 1,
            share_prefix=config.share_prompts,
        )


def take_peak(memory: PeakMemory, device: torch.device) -> int:
    """Peak memory of this process on a device since the last call, in bytes; on a CPU the peak resident size, by ``memory``."""
    resident = memory.take()
    if device.type == "cpu":
        return resident
    peak = int(torch.accelerator.max_memory_allocated(device))
    torch.accelerator.reset_peak_memory_stats(device)
    return peak


class ScorerWorker(ModelWorker):
    """One rank of a frozen model."""

    def start(self, meeting: carriers.Rendezvous, config: RLConfig, role: Role, path: str) -> None:
        """Load the frozen model. ``path``: its folder or hub name."""
        self._join(meeting, config)
        self._model = model = self._load(role, path)
        options, world = BackendOptions.of(config), self._world
        # Offloaded weights are in host memory and are copied to the device for each call.
        on_host = config.ref_reward_offload and world.device.type != "cpu"
        self._scorer = Scorer(model, world, frozen(model, world, options, model.read, on_host=on_host))

    def scores(self, samples: Sequence[Sample]) -> Arrays:
        """The scalar head at each sample's last token, as arrays of one element."""
        return self._per_sample(samples, lambda batches: list(self._scorer.scores(batches)[:, None]))

    def reward_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of rewards, as stored in the model's config."""
        assert isinstance(self._model, ScalarModel)
        return self._model.reward_mean, self._model.reward_std


class LearnerWorker(ModelWorker):
    """One rank of a model in training."""

    def start(self, meeting: carriers.Rendezvous, config: RLConfig, role: Role, total: int) -> None:
        """Load the model, its optimizer and schedule. ``total``: planned optimizer steps, for the schedule."""
        # Join, load, shard.
        self._join(meeting, config, config.ds_tensor_parallel_size)
        self._role = role
        self._model = self._load(role, config.pretrain if role is Role.ACTOR else config.critic_source)
        backend = trainable(self._model, self._world, BackendOptions.of(config), self._model.read)
        # Schedule, loss and optimizer step.
        peak = config.actor_learning_rate if role is Role.ACTOR else config.critic_learning_rate
        schedule = Schedule(config, peak, total)
        max_norm = config.max_norm if config.max_norm > 0 else float("inf")
        balance = config.aux_loss_coef if self._model.is_mixture else 0.0  # a critic may be dense
        self._learner = Learner(backend, self._objective(), schedule, max_norm, balance)
        # Memory: what sleeps between updates, and the moving average of the actor.
        self._parking = Parking(backend.at_rest, self._world.device)
        self._scorer = Scorer(backend.module, self._world)
        self._ema: Ema | None = None
        if config.enable_ema and role is Role.ACTOR:
            home = torch.device("cpu") if config.adam_offload else self._world.device
            self._ema = Ema(backend, config.ema_beta, home)
        self._export: carriers.Exporter  # assigned by `prepare_export`: only the actor exports

    def routes(self, samples: Sequence[Sample]) -> Arrays:
        """The experts of each sample's trained tokens (``Scorer.routes``); empty for a dense model."""
        return self._per_sample(samples, self._scorer.routes) if self._model.is_mixture else []

    def reference_logprobs(self, samples: Sequence[Sample]) -> Arrays:
        """``logprobs`` of the frozen base, without the adapter in training."""
        from togi.model.adapters import without_adapter

        with without_adapter(self._model):
            return self.logprobs(samples)

    def values(self, samples: Sequence[Sample]) -> Arrays:
        """Values of the states in which each sample's trained tokens were chosen, one per token."""
        return self._per_sample(samples, self._scorer.values)

    def update(self, steps: Sequence[Sequence[Sample]], mixed: Sequence[Sequence[Sample]]) -> list[UpdateReport]:
        """One optimizer step per element of ``steps``, each this rank's share of the samples of that step.

        ``mixed``: this rank's share of the supervised rows of each step, or empty. Log-probs are in the order of the samples.
        """
        assert not self._parking.is_asleep
        reports = []
        for number, samples in enumerate(steps):
            # Pack, update, then the moving average, which follows real updates only.
            packs = self._packs(samples, self._config.micro_train_batch_size)
            report = self._learner.update(packs, self._mixed(mixed[number]) if mixed else None)
            if self._config.torch_compile and self._role is Role.ACTOR:
                report = replace(report, metrics={**report.metrics, names.COMPILE_SECONDS: clock.take_seconds()})
            if self._ema is not None and report.outcome is StepOutcome.UPDATED:
                self._ema.update()
            reports.append(replace(report, logprobs=in_order(packs, report.logprobs) if report.logprobs else ()))
        if self._world.device.type == "cpu":
            return_freed()  # other workers use this host's memory until the next update
        return reports

    def sleep(self) -> Released:
        """Release what only an optimizer step needs; the working weights stay."""
        return self._parking.sleep()

    def wake(self) -> None:
        """Restore what ``sleep`` released."""
        self._parking.wake()

    def _mixed(self, samples: Sequence[Sample]) -> Mixed:
        rows = self._packs(samples, self._config.micro_train_batch_size)
        return Mixed(PTX, SFTObjective(), rows, self._config.ptx_coef)

    def prepare_export(self, carrier: Carrier, meeting: carriers.Rendezvous | None) -> None:
        """Choose how weights leave this rank. ``meeting``: with the engines, if rank 0 sends over a channel."""
        # A GPU carrier packs on the GPU; the others send host memory.
        device = self._world.device if carrier in (Carrier.NCCL, Carrier.IPC) else torch.device("cpu")
        if meeting is not None:
            self._export = carriers.OverChannel(carriers.Channel.join(meeting, device))
        elif carrier is Carrier.IPC:
            self._export = carriers.SameDevice(sends=True, device=device)
        else:
            self._export = carriers.Exporter(sends=self._world.is_first and carrier is Carrier.HOST)

    def weights(self, version: int) -> tuple[Manifest, Iterator[tuple[str, torch.Tensor]]]:
        """The weights for the engines: all of them in the engine's dtype, or the adapter alone. All ranks gather together.

        Tensors that need no gather, cast or merge are the trained ones themselves, not copies.
        """
        config, full_parameters = self._config, self._learner.backend.full_parameters
        if config.sends_adapter:
            return self._adapter(version)
        dtype = dtype_of(config.bf16)
        specs = expected_manifest(config.pretrain, str(dtype).removeprefix("torch."), config.trust_remote_code)
        return Manifest(version, specs), whole_tensors(self._model, full_parameters, dtype)

    def begin_export(self, version: int) -> Manifest:
        """Start a weight update; ``next_bucket`` then returns it piece by piece. All ranks call together."""
        manifest, tensors = self.weights(version)
        self._export.begin(tensors, BUCKET_BYTES)
        return manifest

    def _adapter(self, version: int) -> tuple[Manifest, Iterator[tuple[str, torch.Tensor]]]:
        from togi.model.adapters import adapter_scale, as_sent, sent_specs
        from togi.weights.adapters import DTYPE

        assert isinstance(self._model, PolicyModel)
        backend = self._learner.backend
        shapes = backend.shapes()
        tensors = as_sent(self._model, shapes, backend.full_parameters(DTYPE, trained_only=True))
        return Manifest(version, sent_specs(self._model, shapes), adapter_scale(self._model)), tensors

    def next_bucket(self) -> tuple[int, carriers.Parcel | None]:
        """(number of tensors, parcel for the engines). All ranks gather together."""
        return self._export.next()

    def end_export(self) -> str:
        """Wait until everything is sent. Returns the checksum of what this rank gathered."""
        return self._export.finish()

    def checkpoint_bytes(self) -> int:
        learner = expected_bytes(self._learner)
        return learner if self._ema is None else learner * 4 // 3  # masters, two moments and the average

    def save(self, folder: Path) -> None:
        """Write the resumable state into ``folder``/<role>."""
        assert not self._parking.is_asleep
        save_learner(self._learner, folder / self._role, {"role": self._role})
        if self._ema is not None:
            self._ema.save(folder / self._role / EMA_FOLDER)

    def load(self, folder: Path) -> None:
        """Resume from a folder that ``save`` wrote."""
        assert not self._parking.is_asleep
        load_learner(self._learner, folder / self._role, {"role": self._role})
        if self._ema is not None:
            self._ema.load(folder / self._role / EMA_FOLDER)

    def save_model(self, folder: Path) -> None:
        """Write the model in plain Hugging Face format, from rank 0."""
        self._write(folder, self._learner.backend.full_parameters)

    def save_average(self, folder: Path) -> None:
        """Write the moving average in plain Hugging Face format."""
        assert self._ema is not None
        self._write(folder, self._ema.full_parameters)

    def _write(self, folder: Path, full_parameters: FullParameters) -> None:
        config = self._config
        tokenizer = load_tokenizer(
            config.pretrain, chat_template=config.tokenizer_chat_template, trust_remote_code=config.trust_remote_code
        )
        # The written generation config stops where the run's engines stopped.
        if isinstance(self._model, PolicyModel):
            stops = stop_token_ids(tokenizer, config.pretrain, chat=config.apply_chat_template)
            self._model.end_answers_with(stops)
        target = folder if self._world.is_first else None
        save_trained(target, self._model, full_parameters, tokenizer, dtype_of(config.bf16))
        self._world.barrier("model written")

    def _objective(self) -> Objective:
        config = self._config
        if self._role is Role.CRITIC:
            return ValueObjective(config.value_clip)
        low, high = config.clip_range
        # GSPO's sequence ratio replaces both the old policy and the engine (Zheng et al., 2025, section 5.4).
        is_coupled = (
            config.policy_loss_type is PolicyLossType.GSPO or config.vllm_is_correction_type is CorrectionType.RATIO
        )
        against_engine = config.enable_vllm_is_correction and is_coupled
        weighted = config.enable_vllm_is_correction and not against_engine
        bounds = config.vllm_is_truncated_threshold
        return PolicyObjective(
            low,
            high,
            config.aggregation,
            kind=config.policy_loss_type,
            dual_clip=config.dual_clip,
            constant=float(config.generate_max_len),
            kl=config.kl_estimator if config.uses_reference and config.use_kl_loss else None,
            entropy_coef=config.entropy_loss_coef,
            correction=EngineCorrection(config.vllm_is_correction_type, *bounds) if weighted else None,
            against_engine=against_engine,
            temperature=config.temperature,
        )
