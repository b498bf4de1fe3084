"""The closed sets of names that flags may take, for the configuration and for the code that branches on them."""

from enum import StrEnum

# The prefix of a built-in --reward_func.
BUILTIN = "builtin:"


class AdvantageEstimator(StrEnum):
    GAE = "gae"
    REINFORCE = "reinforce"
    RLOO = "rloo"
    REINFORCE_BASELINE = "reinforce_baseline"
    GROUP_NORM = "group_norm"
    DR_GRPO = "dr_grpo"

    @property
    def uses_groups(self) -> bool:
        """Whether the baseline comes from other samples of the same prompt."""
        return self not in (AdvantageEstimator.GAE, AdvantageEstimator.REINFORCE)


class Algo(StrEnum):
    """Named algorithms with their published settings (``togi.config.presets``)."""

    PPO = "ppo"
    REINFORCE_PP = "reinforce++"
    REINFORCE_PP_BASELINE = "reinforce++-baseline"
    GRPO = "grpo"
    RLOO = "rloo"
    DR_GRPO = "dr_grpo"
    DAPO = "dapo"
    PRORL = "prorl"


class KLEstimator(StrEnum):
    """Estimators of KL(policy || reference) from one sample (Schulman, "Approximating KL Divergence", 2020)."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


class Aggregation(StrEnum):
    """How the token losses of one optimizer step become one number.

    token_mean: sum over tokens / number of tokens. sequence_mean: mean over sequences of each sequence's token mean.
    constant: sum over tokens / (number of sequences x the generation limit), Dr. GRPO's length-unbiased form.
    """

    TOKEN_MEAN = "token_mean"
    SEQUENCE_MEAN = "sequence_mean"
    CONSTANT = "constant"


class PolicyLossType(StrEnum):
    """Policy objectives: PPO's clipped token ratio, GSPO's clipped sequence ratio, CISPO's clipped and detached weight."""

    PPO = "ppo"
    GSPO = "gspo"
    CISPO = "cispo"


class CorrectionType(StrEnum):
    """How tokens with different probabilities in engine and trainer are corrected (``togi.algo.policy``)."""

    TIS = "tis"
    ICEPOP = "icepop"
    SEQ_MASK_TIS = "seq-mask-tis"
    RATIO = "ratio"
    """The ratio of the policy loss itself is to the engine: coupled PPO, whose clip bounds old policy and engine together."""


class OnStale(StrEnum):
    """What happens to tokens that are more than ``--max_token_lag`` versions older than the weights they train.

    mask: such tokens are taken out of the loss; rewards, baselines and groups stay whole. wait: there are none, because a step
    waits for the old groups. drop: their whole group is dropped, which favours short responses.
    """

    MASK = "mask"
    WAIT = "wait"
    DROP = "drop"


class EngineName(StrEnum):
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


class BackendName(StrEnum):
    FSDP2 = "fsdp2"
    DEEPSPEED = "deepspeed"


class Layers(StrEnum):
    """The implementation of a model's layers; standard: Transformers, on a CPU with Togi's kernels for norms and gates."""

    STANDARD = "standard"
    LIGER = "liger"
    COMPILED = "compiled"


class WorkersKind(StrEnum):
    """Where models and engines run: in this process, or each in its own process under Ray."""

    AUTO = "auto"
    LOCAL = "local"
    RAY = "ray"


class SyncBackend(StrEnum):
    """The carrier of weights to the engines; auto: nccl on GPUs (CUDA IPC where they are shared), else host memory or gloo."""

    AUTO = "auto"
    NCCL = "nccl"
    GLOO = "gloo"


class GradAccumDtype(StrEnum):
    """The dtype in which gradients of several micro-batches are summed."""

    BF16 = "bf16"
    FP32 = "fp32"


class Scheduler(StrEnum):
    """Learning-rate schedules by their Transformers names."""

    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    COSINE_WARMUP_WITH_MIN_LR = "cosine_warmup_with_min_lr"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    LINEAR = "linear"
    POLYNOMIAL = "polynomial"
    INVERSE_SQRT = "inverse_sqrt"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    REDUCE_LR_ON_PLATEAU = "reduce_lr_on_plateau"
    GREEDY = "greedy"

    @property
    def follows_a_loss(self) -> bool:
        """Whether the rate depends on measured losses instead of the step alone."""
        return self in (Scheduler.REDUCE_LR_ON_PLATEAU, Scheduler.GREEDY)


class LoraSync(StrEnum):
    """What engines receive when the policy trains an adapter: the adapter alone, or whole weights with it merged in."""

    AUTO = "auto"
    ADAPTERS = "adapters"
    MERGED = "merged"


class Overlong(StrEnum):
    """The treatment of a row of more than ``--max_len`` tokens. A truncated row gets no end token."""

    DROP = "drop"
    TRUNCATE = "truncate"
    ERROR = "error"


class RewardLoss(StrEnum):
    """Pairwise losses of a reward model: -log sigmoid(c - r - margin), or log(1 + exp(r - c))."""

    SIGMOID = "sigmoid"
    LOGEXP = "logexp"


class Divergence(StrEnum):
    """The direction of the KL divergence between teacher and student.

    forward: KL(teacher || student), the student covers everything the teacher may say. reverse: KL(student || teacher),
    the student says only what the teacher may say.
    """

    FORWARD = "forward"
    REVERSE = "reverse"


class RemoteMode(StrEnum):
    """The role of several reward servers: copies that share the samples, or different rewards of every sample."""

    BALANCE = "balance"
    ENSEMBLE = "ensemble"


class RewardCombination(StrEnum):
    """How several rewards r with weights w become one: sum(w r), or sum(w r) / sum(w)."""

    SUM = "sum"
    MEAN = "mean"


class OnRewardError(StrEnum):
    """The treatment of a sample whose reward failed.

    drop_group: drop the whole group, since the failed rewards may not be a random part of it. drop_sample: compare the rest of the
    group.
    """

    DROP_GROUP = "drop_group"
    DROP_SAMPLE = "drop_sample"
    STOP = "stop"


class Verifier(StrEnum):
    """Built-in reward functions: each a module of ``togi.reward.verifiers``, or a function of its module ``text``."""

    CODE = "code"
    EXACT = "exact"
    FORMAT = "format"
    JSON_SCHEMA = "json_schema"
    LENGTH = "length"
    MATH = "math"
    REASONING_GYM = "reasoning_gym"

    @property
    def is_of_text(self) -> bool:
        return self in (Verifier.EXACT, Verifier.FORMAT, Verifier.LENGTH)

    @property
    def checks_labels(self) -> bool:
        """Whether the function, called without responses, checks its labels: those that raise at a label."""
        return self in (Verifier.EXACT, Verifier.JSON_SCHEMA, Verifier.MATH, Verifier.REASONING_GYM)

    @property
    def package(self) -> str:
        """The package that the function needs besides the standard library; "" for none."""
        packages = {"json_schema": "jsonschema", "math": "math_verify", "reasoning_gym": "reasoning_gym"}
        return packages.get(self.value, "")


class LengthShape(StrEnum):
    """How builtin:length falls from 1 at the target length to 0 at length 0 and at twice the target."""

    LINEAR = "linear"
    COSINE = "cosine"


class EvalTask(StrEnum):
    """The work of ``togi infer``: generate with vLLM, generate with Transformers, or score rows with a reward model."""

    GENERATE_VLLM = "generate_vllm"
    GENERATE = "generate"
    RM = "rm"

    @property
    def generates(self) -> bool:
        return self is not EvalTask.RM


class PostProcessor(StrEnum):
    """What scored rows become: the best output (rs), reward text in the prompt (csft), best and worst (iter_dpo)."""

    RS = "rs"
    CSFT = "csft"
    ITER_DPO = "iter_dpo"


class IterateMethod(StrEnum):
    """Best-of-n loops: rejection sampling, iterative DPO, conditional SFT."""

    RS = "rs"
    DPO = "dpo"
    CSFT = "csft"
