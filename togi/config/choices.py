"""The closed sets of names that flags may take. Used by the configuration and by the code that branches on them."""

from enum import StrEnum


class AdvantageEstimator(StrEnum):
    GAE = "gae"
    REINFORCE = "reinforce"
    RLOO = "rloo"
    REINFORCE_BASELINE = "reinforce_baseline"
    GROUP_NORM = "group_norm"
    DR_GRPO = "dr_grpo"

    @property
    def uses_groups(self) -> bool:
        """Whether the baseline comes from the other samples of the same prompt."""
        return self not in (AdvantageEstimator.GAE, AdvantageEstimator.REINFORCE)


class KLEstimator(StrEnum):
    """Estimators of KL(policy || reference) from one sample (Schulman, "Approximating KL Divergence", 2020)."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


class Aggregation(StrEnum):
    """How per-token losses of one optimizer step become one number.

    token_mean: sum over tokens / number of tokens. sequence_mean: mean over sequences of each sequence's token mean.
    constant: sum over tokens / (number of sequences x the generation limit), Dr. GRPO's length-unbiased form.
    """

    TOKEN_MEAN = "token_mean"
    SEQUENCE_MEAN = "sequence_mean"
    CONSTANT = "constant"


class EngineName(StrEnum):
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


class BackendName(StrEnum):
    FSDP2 = "fsdp2"
    DEEPSPEED = "deepspeed"


class Scheduler(StrEnum):
    """Learning-rate schedules by their Transformers names."""

    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"


class Overlong(StrEnum):
    """What becomes of a row of more tokens than ``--max_len``. A row that is cut gets no end token."""

    DROP = "drop"
    TRUNCATE = "truncate"
    ERROR = "error"


class RewardLoss(StrEnum):
    """Pairwise losses of a reward model: -log sigmoid(c - r - margin), or log(1 + exp(r - c))."""

    SIGMOID = "sigmoid"
    LOGEXP = "logexp"


class Divergence(StrEnum):
    """Which way the distance between teacher and student is measured.

    forward: KL(teacher || student), the student covers all that the teacher may say. reverse: KL(student || teacher),
    the student says only what the teacher may say.
    """

    FORWARD = "forward"
    REVERSE = "reverse"


class EvalTask(StrEnum):
    """What ``togi infer`` does: generate with vLLM, generate with Transformers, or score rows with a reward model."""

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
