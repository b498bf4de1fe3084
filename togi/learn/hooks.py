"""The user's own advantage estimators and policy losses: their arguments, loading and checking.

An advantage estimator (``--advantage_estimator FILE.py:name``) is called once a step, with all samples of the step::

    def estimator(rewards_N, groups_N, sequences_K, penalties_K) -> advantages_K

A policy loss (``--policy_loss_type FILE.py:name``) is called on each micro-batch::

    def loss(logprobs_K, old_logprobs_K, advantages_K, sequences_K, clip_low, clip_high) -> loss_K

Shape letters: K tokens in the loss, flat, in order; N sequences. ``rewards_N`` (float64) are the raw scores of the reward.
``groups_N`` (int64) is the prompt of each sequence: samples of one prompt share a number, and groups may have any size.
``sequences_K`` (int64) is the sequence of each token, in ascending runs. ``penalties_K`` (float64) is the KL coefficient x the
estimated KL of each token to the reference, in nats, to subtract from the reward; zeros if the reward has no KL. The result of an
estimator is used unchanged: no clip and no normalisation follow. ``logprobs_K`` has the gradient; old log-probs and advantages are
constants. A loss function returns a loss for each token. Togi sums them, divides by the count of the whole step
(``--loss_aggregation``), and adds the engine correction, KL and entropy. A function gets only the arguments that it names. It must
be pure: equal arguments give equal results, and no argument is changed. ``togi.algo`` has the parts of the built-in functions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from togi.config.fields import Hook
from togi.errors import ConfigError, RunError

ESTIMATOR = ("rewards_N", "groups_N", "sequences_K", "penalties_K")
LOSS = ("logprobs_K", "old_logprobs_K", "advantages_K", "sequences_K", "clip_low", "clip_high")
# Two sequences must have the same losses alone and together, up to rounding.
TOLERANCE = 1e-5


def load(hook: Hook, flag: str, known: tuple[str, ...], *, trial: bool) -> Callable[..., Tensor]:
    """Load the function. Call the result with all arguments of ``known`` by name. Raises ConfigError naming ``--flag``.

    ``trial``: before a run, on a made-up batch. The call raises ConfigError then and RunError in a run, naming ``--flag``,
    if the function fails or does not return one finite number a token.
    """
    function = hook.function if hook.function is not None else _from_file(hook, flag, trial=trial)
    shown = f"--{flag} {hook}"
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"{shown} is not a plain function: give one that takes {', '.join(known)}.")
    # a wrong parameter name is reported here, before the run starts
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if unknown := [name for name in required if name not in known]:
        raise ConfigError(f"{shown} asks for {unknown[0]}, which it cannot have: it may take {', '.join(known)}.")
    wanted = frozenset(known if takes_all else named)

    kind, where = (ConfigError, " on a made-up batch") if trial else (RunError, "")

    # the caller passes everything; the function gets only what its signature names
    def call(**arguments: object) -> Tensor:
        try:
            result = function(**{name: value for name, value in arguments.items() if name in wanted})
        except Exception as error:  # the user's code may raise anything: report it unchanged
            raise kind(f"{shown} failed{where} ({type(error).__name__}: {error}).") from error
        if problem := _problem(result, where, arguments):
            raise kind(f"{shown} {problem}.")
        assert isinstance(result, Tensor)
        return result

    return call


def _problem(result: object, where: str, arguments: Mapping[str, object]) -> str:
    """What is wrong with the result of a function that must return one finite number a token; "" if nothing is."""
    sequences_K = arguments["sequences_K"]
    assert isinstance(sequences_K, Tensor)
    tokens = len(sequences_K)
    if not isinstance(result, Tensor):
        return f"returned {type(result).__name__}, not a tensor"
    if result.shape != (tokens,):
        return (
            f"returned a tensor of shape {tuple(result.shape)} for {tokens} tokens: it must return one number a token, "
            f"shape ({tokens},); a number a sequence becomes that by x_N[sequences_K]"
        )
    if not result.is_floating_point():
        return f"returned {result.dtype}{where}: it must return floating-point numbers, as x_K.double() makes them"
    bad = int((~result.isfinite()).sum())
    # what a diverged model brings along is no fault of the function
    if bad > 0 and all(bool(value.isfinite().all()) for value in arguments.values() if isinstance(value, Tensor)):
        also = ", also for one sample alone or equal rewards, which have no deviation" * ("rewards_N" in arguments)
        return f"returned {bad} of {tokens} numbers that are not finite{where}: every number must be finite{also}"
    return ""


def load_estimator(hook: Hook, *, trial: bool = False) -> Callable[..., Tensor]:
    """Load the estimator. Call it with the arguments of ``ESTIMATOR`` by name. Raises ConfigError."""
    return load(hook, "advantage_estimator", ESTIMATOR, trial=trial)


def load_policy_loss(hook: Hook, *, trial: bool = False) -> Callable[..., Tensor]:
    """Load the policy loss. Call it with the arguments of ``LOSS`` by name. Raises ConfigError."""
    return load(hook, "policy_loss_type", LOSS, trial=trial)


def check_estimator(hook: Hook, *, penalised: bool) -> None:
    """Test the estimator on seven made-up sequences of four prompts: one has a single sample, one equal rewards.

    ``penalised``: a KL is in the reward.

    Raises ConfigError if the result is invalid, or ignores the KL.
    """
    function, shown = load_estimator(hook, trial=True), f"--advantage_estimator {hook}"
    arguments = {
        "rewards_N": torch.tensor([1.0, 0.0, 0.5, 0.25, -1.0, 0.5, 0.5], dtype=torch.float64),
        "groups_N": torch.tensor([0, 0, 1, 1, 2, 3, 3]),
        "sequences_K": torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]),
        "penalties_K": torch.zeros(14, dtype=torch.float64),
    }
    result_K = _tried(function, shown, arguments)
    if not penalised:
        return
    penalties_K = torch.linspace(0.1, 1.4, 14, dtype=torch.float64)
    if torch.equal(result_K, _tried(function, shown, {**arguments, "penalties_K": penalties_K})):
        raise ConfigError(
            f"{shown} does not use penalties_K, so the KL that --init_kl_coef puts into the reward would have no effect: use it, "
            "add --use_kl_loss, or set --init_kl_coef 0."
        )


def check_policy_loss(hook: Hook, clip_low: float, clip_high: float, *, clips: bool) -> None:
    """Test the loss on two made-up sequences, together and alone. ``clips``: the user set the clip range.

    Raises ConfigError if the result is invalid, depends on packing, or ignores the clip range.
    """
    function, shown = load_policy_loss(hook, trial=True), f"--policy_loss_type {hook}"

    def loss(first: int, end: int, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Losses and their gradient on tokens ``first`` to ``end``."""
        logprobs_K = torch.tensor([-0.1, -2.0, -0.5, -1.0, -3.0])[first:end].requires_grad_()
        streams = {
            "logprobs_K": logprobs_K,
            "old_logprobs_K": torch.tensor([-0.1, -1.5, -1.5, -1.1, -0.5])[first:end],
            "advantages_K": torch.tensor([1.0, 1.0, 1.0, -0.5, -0.5])[first:end],
            "sequences_K": torch.tensor([0, 0, 0, 1, 1])[first:end] - int(first > 0),
        }
        loss_K = _tried(function, shown, {**streams, "clip_low": low, "clip_high": high})
        if not loss_K.requires_grad:
            raise ConfigError(f"{shown} has no gradient: its result must be computed from logprobs_K.")
        (gradient_K,) = torch.autograd.grad(loss_K.sum(), logprobs_K)
        if not bool(gradient_K.isfinite().all()):
            raise ConfigError(f"{shown} has a gradient that is not finite ({gradient_K.tolist()}).")
        return loss_K.detach(), gradient_K

    # packing must not matter: both sequences in one call, and each in a call of its own
    whole = loss(0, 5, clip_low, clip_high)
    alone = [
        torch.cat(parts) for parts in zip(loss(0, 3, clip_low, clip_high), loss(3, 5, clip_low, clip_high), strict=True)
    ]
    if not all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in zip(whole, alone, strict=True)):
        raise ConfigError(
            f"{shown} gives a sequence another loss when other sequences are beside it, so the result would depend on how tokens "
            "are packed: use only tokens of a token's own sequence (sequences_K), and return no mean over tokens."
        )
    # a clip range eight times as narrow must change some loss or gradient
    if clips and all(torch.equal(a, b) for a, b in zip(whole, loss(0, 5, clip_low / 8, clip_high / 8), strict=True)):
        raise ConfigError(
            f"{shown} does not use clip_low and clip_high, so the clip range has no effect: use them, or leave --eps_clip and "
            "--eps_clip_low_high out."
        )


def _tried(function: Callable[..., Tensor], shown: str, arguments: Mapping[str, object]) -> Tensor:
    """Call the function once. Raises ConfigError unless its result is in order and it changes no argument."""
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    result_K = function(**given)
    for name, before in arguments.items():
        after = given[name]
        if isinstance(before, Tensor) and isinstance(after, Tensor) and not torch.equal(before, after):
            raise ConfigError(f"{shown} changes its argument {name}: work on a copy, {name}.clone().")
    return result_K


# The module of each file as the last trial of this process found it.
_current: dict[Path, str] = {}


def _from_file(hook: Hook, flag: str, *, trial: bool) -> object:
    """Import the file under a module name of its own, with its folder on ``sys.path`` during the import.

    A trial reads a file that was edited since; what follows in the same run has the functions that were tried.
    """
    path, shown = Path(hook.path).expanduser().absolute(), f"--{flag} {hook}"
    if trial or path not in _current:
        source = path.read_bytes()
        name = f"togi_hook_{hashlib.sha256(str(path).encode() + source).hexdigest()[:16]}"
        if name not in sys.modules:
            _import(path, source, name, shown)
        _current[path] = name
    found = vars(sys.modules[_current[path]])
    if hook.name not in found:
        raise ConfigError(f"{shown}: the file defines no {hook.name} when it is loaded.")
    return found[hook.name]


def _import(path: Path, source: bytes, name: str, shown: str) -> None:
    """Run ``source`` as the module ``name``. Python's own loader may run stale bytecode of a file edited within a second."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the file look up their module
    sys.path.insert(0, str(path.parent))
    try:
        exec(compile(source, str(path), "exec"), vars(module))  # noqa: S102 - the file of the user, as an import runs it
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{shown} cannot be loaded ({type(error).__name__}: {error}).") from error
    finally:
        sys.path.remove(str(path.parent))
