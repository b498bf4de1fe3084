"""Named algorithms: what each is, and the numbers it was published with.

A preset fills in settings that were not given. Batch sizes, lengths and the model are left to the user: they depend on
the task and the machine. A given value always wins, except for the setting that defines the algorithm: another advantage
estimator is another algorithm. If a given value makes a value of the preset meaningless (``--init_kl_coef 0`` the form
of its KL), that value is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from togi.config.choices import AdvantageEstimator, Algo, CorrectionType, KLEstimator, PolicyLossType, Scheduler
from togi.config.fields import as_flag
from togi.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Preset:
    """``settings``: by their flat names. ``source``: where they were published."""

    estimator: AdvantageEstimator
    settings: Mapping[str, object]
    source: str


def _in_reward(coef: float) -> dict[str, object]:
    """The settings of a KL in the reward."""
    return {"init_kl_coef": coef, "use_kl_loss": False, "kl_estimator": KLEstimator.K1}


def _in_loss(coef: float, estimator: KLEstimator) -> dict[str, object]:
    """The settings of a KL in the loss."""
    return {"init_kl_coef": coef, "use_kl_loss": True, "kl_estimator": estimator}


# DAPO penalises responses that reach into the last 4,096 of 20,480 tokens.
DAPO_BUFFER = 4096 / 20480
# GRPO's paper gives no clip; 0.2 is PPO's. RLOO's paper does not clip: with one update per rollout nothing is clipped.
PRESETS: Mapping[Algo, Preset] = {
    Algo.PPO: Preset(
        AdvantageEstimator.GAE,
        {
            "gamma": 1.0,
            "lambd": 0.95,
            "eps_clip": 0.2,
            "value_clip": 0.2,
            **_in_reward(0.02),
            "critic_learning_rate": 9e-6,
        },
        "Ouyang et al. 2022, arXiv 2203.02155, appendix C.4; lambda: Stiennon et al. 2020, arXiv 2009.01325",
    ),
    Algo.REINFORCE_PP: Preset(
        AdvantageEstimator.REINFORCE,
        {
            "gamma": 1.0,
            "eps_clip": 0.2,
            **_in_reward(0.01),
            "actor_learning_rate": 5e-7,
        },
        "Hu et al. 2025, arXiv 2501.03262",
    ),
    Algo.REINFORCE_PP_BASELINE: Preset(
        AdvantageEstimator.REINFORCE_BASELINE,
        {
            "n_samples_per_prompt": 8,
            "eps_clip": 0.2,
            **_in_loss(1e-5, KLEstimator.K2),
        },
        "Hu et al. 2025, arXiv 2501.03262; numbers of its authors' example",
    ),
    Algo.GRPO: Preset(
        AdvantageEstimator.GROUP_NORM,
        {
            "n_samples_per_prompt": 64,
            "eps_clip": 0.2,
            "loss_aggregation": "sequence_mean",
            **_in_loss(0.04, KLEstimator.K3),
            "actor_learning_rate": 1e-6,
        },
        "Shao et al. 2024, arXiv 2402.03300, section 4.2",
    ),
    Algo.RLOO: Preset(
        AdvantageEstimator.RLOO,
        {
            "n_samples_per_prompt": 4,
            **_in_reward(0.03),
            "actor_learning_rate": 1e-6,
        },
        "Ahmadian et al. 2024, arXiv 2402.14740, appendix C",
    ),
    Algo.DR_GRPO: Preset(
        AdvantageEstimator.DR_GRPO,
        {
            "n_samples_per_prompt": 8,
            "eps_clip": 0.2,
            "loss_aggregation": "constant",
            "init_kl_coef": 0.0,
            "actor_learning_rate": 1e-6,
        },
        "Liu et al. 2025, arXiv 2503.20783, table 6",
    ),
    Algo.DAPO: Preset(
        AdvantageEstimator.GROUP_NORM,
        {
            "n_samples_per_prompt": 16,
            "eps_clip_low_high": (0.2, 0.28),
            "loss_aggregation": "token_mean",
            "init_kl_coef": 0.0,
            "dynamic_filtering": True,
            "actor_learning_rate": 1e-6,
            "lr_scheduler": Scheduler.CONSTANT_WITH_WARMUP,
        },
        "Yu et al. 2025, arXiv 2503.14476, section 4.1",
    ),
    Algo.PRORL: Preset(
        AdvantageEstimator.REINFORCE_BASELINE,
        {
            "n_samples_per_prompt": 16,
            "eps_clip_low_high": (0.2, 0.27),
            **_in_loss(1e-4, KLEstimator.K2),
            "dynamic_filtering": True,
            "stop_properly_penalty_coef": 0.0,
            "enable_vllm_is_correction": True,
            "vllm_is_correction_type": CorrectionType.ICEPOP,
            "actor_learning_rate": 1e-6,
        },
        "Hu et al. 2025, ProRL V2, which builds on arXiv 2505.24864; numbers of its authors' example",
    ),
}


def preset_values(algo: Algo, given: Mapping[str, object], generate_max_len: int) -> dict[str, object]:
    """The settings that ``--algo`` adds to those ``given``, by flat name.

    ``generate_max_len``: in tokens; DAPO's length penalty covers a share of it. Raises ConfigError if the given
    advantage estimator is not the algorithm's.
    """
    preset = PRESETS[algo]
    estimator = given.get("advantage_estimator", preset.estimator)
    if estimator != preset.estimator:
        raise ConfigError(
            f"--advantage_estimator {estimator} contradicts --algo {algo}, which is {preset.estimator}: leave one of them out."
        )
    brought: dict[str, object] = {"advantage_estimator": preset.estimator, **preset.settings}
    if algo is Algo.DAPO:
        brought["overlong_buffer_len"] = max(1, round(DAPO_BUFFER * generate_max_len))
    # A value without effect would be refused by the checks as the user's mistake.
    moot = _moot(brought, given)
    return {name: value for name, value in brought.items() if name not in given and name not in moot}


def _moot(brought: Mapping[str, object], given: Mapping[str, object]) -> set[str]:
    """Names whose preset value would have no effect with the given values, or contradict them."""
    off = "enable_vllm_is_correction" in given and not given["enable_vllm_is_correction"]
    is_gspo = given.get("policy_loss_type") is PolicyLossType.GSPO
    other_kl = "use_kl_loss" in given and given["use_kl_loss"] != brought.get("use_kl_loss")
    moot = {
        "use_kl_loss": given.get("init_kl_coef") == 0,
        "kl_estimator": given.get("init_kl_coef") == 0 or other_kl,
        "eps_clip_low_high": "eps_clip" in given,
        "eps_clip": "eps_clip_low_high" in given,
        "loss_aggregation": is_gspo,
        "vllm_is_correction_type": is_gspo or off,
    }
    return {name for name, is_moot in moot.items() if is_moot}


def describe(algo: Algo, settings: Mapping[str, object]) -> str:
    """One line: what the preset set, as flags, and where it was published."""
    flags = " ".join(as_flag(name, value) for name, value in settings.items())
    return f"--algo {algo} sets {flags} ({PRESETS[algo].source})"
