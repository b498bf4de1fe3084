"""The entry of every run, for command line and Python: the checks that need no tokenizer, and their notices.

Imports no torch, so that a mistake is reported at once. After it the command imports its loop (``togi.run.rl``,
``togi.run.offline``).

The entry of ``togi infer``: check everything, then import and run. Imports no torch, so mistakes are reported at once.

Run a coroutine to its end from synchronous code, also where an event loop is already running.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from togi.config.choices import PostProcessor
from togi.config.infer import ChatConfig, InferConfig, check_infer
from togi.config.model_facts import check_length
from togi.config.parse import Parsed
from togi.config.presets import describe
from togi.config.rl import RLConfig
from togi.config.shared import ModelSettings
from togi.config.tools import ServeRMConfig
from togi.data.items import Kind, parse_items, split_files
from togi.data.precheck import asked_reward
from togi.errors import ConfigError
from togi.methods.method import Method
from togi.plan.machine import Machine, joins_cluster, this_machine, usable_precision
from togi.run import preflight

if TYPE_CHECKING:
    from togi.run.infer import Written
    from togi.run.rl import Result


ONE_TOKENIZER = "--disable_fast_tokenizer: Transformers has one tokenizer for each model, which is used"
NO_CUDA_FOR_FLASH = "--flash_attn: there is no CUDA device here, attention runs through SDPA segments instead"
NO_CUDA_FOR_LIGER = "--use_liger_kernel: there is no CUDA device here, Transformers' own layers compute instead"
BF16_OF_CLUSTER = (
    "--bf16 is off: the GPUs of the cluster in RAY_ADDRESS are not known here; add --bf16 if they have bfloat16"
)
logger = logging.getLogger(__name__)
Announce = Callable[[str], None]
Config = TypeVar("Config", bound=RLConfig | Method | InferConfig | ChatConfig | ServeRMConfig)


def start_rl(
    parsed: Parsed[RLConfig], *, reward: Callable[..., object] | None = None, announce: Announce = logger.info
) -> Result:
    """Check the settings, then run ``togi rl`` from Python. ``reward`` replaces ``--reward_func`` by a function.

    Raises UserError for the user's mistakes, before a model is loaded where that is possible.
    """
    ready = rl_door(parsed, reward_given=reward is not None, announce=announce)
    from togi.run.rl import run

    return run_to_end(run(ready, reward=reward, announce=announce))


def rl_door(parsed: Parsed[RLConfig], *, reward_given: bool, announce: Announce) -> Parsed[RLConfig]:
    """The settings as ``togi rl`` runs them. Announces those that this machine changes. Raises UserError."""
    # The preset of --algo, then what this machine changes, then the checks.
    if parsed.config.algo is not None:
        bringer, _ = parsed.config.preset({})
        announce(describe(parsed.config.algo, parsed.values_from(bringer)))
    machine = this_machine()
    ready = preflight.check(usable(parsed, machine, announce), machine, reward_given=reward_given)
    if joins_cluster() and "bf16" not in ready.given:
        announce(BF16_OF_CLUSTER)
    on_cpu = machine.gpus == 0 and not joins_cluster()
    if ready.config.ref_reward_offload and on_cpu:
        announce("--ref_reward_offload: there is no GPU, reference and reward models are in host memory already")
    if ready.config.use_liger_kernel and on_cpu:
        announce(NO_CUDA_FOR_LIGER)
    if asks_for_flash(parsed) and on_cpu:
        announce(NO_CUDA_FOR_FLASH)
    return ready


def offline_door(parsed: Parsed[Method], *, announce: Announce, launched: bool = True) -> Parsed[Method]:
    """The settings as a run on fixed data uses them. Announces those that this machine changes. Raises UserError.

    ``launched``: this is one of the processes that train.
    """
    return preflight.check_offline(usable(parsed, this_machine(), announce), launched=launched)


def asks_for_flash(parsed: Parsed[RLConfig] | Parsed[Method]) -> bool:
    """Whether the user asks for what is the default."""
    return parsed.config.flash_attn and "flash_attn" in parsed.given


def usable(parsed: Parsed[Config], machine: Machine, announce: Announce) -> Parsed[Config]:
    """The settings with the precision of this machine. Announces what it changes, and flags without effect."""
    ready, notice = usable_precision(parsed, machine)
    if notice is not None:
        announce(notice)
    say_ignored(ready.config, announce)
    return ready


def say_ignored(config: ModelSettings | InferConfig | ChatConfig | ServeRMConfig, announce: Announce) -> None:
    """Announce flags that are accepted but have no effect, one line each."""
    if config.disable_fast_tokenizer:
        announce(ONE_TOKENIZER)


def start_infer(parsed: Parsed[InferConfig], *, announce: Announce = logger.info) -> Written:
    """Check the settings, then generate or score. Raises UserError."""
    ready = infer_door(usable(parsed, this_machine(), announce))
    if ready.config.zero_stage > 0:
        announce(f"--zero_stage {ready.config.zero_stage}: one process has nothing to shard, and holds the whole model")
    from togi.run.infer import generate, score

    task = ready.config.eval_task
    assert task is not None
    return generate(ready.config, announce) if task.generates else score(ready.config, announce)


def infer_door(parsed: Parsed[InferConfig]) -> Parsed[InferConfig]:
    """The settings with local names. Raises the first UserError. Loads no model and reads only the head of the data."""
    check_infer(parsed)
    parsed = preflight.with_local_names(parsed)
    config = parsed.config
    assert config.eval_task is not None
    # Engine, model and lengths.
    asked, longest = f"--max_len {config.max_len}", config.max_len
    if config.eval_task.generates:
        preflight.check_engine(config.engine, config, config.pretrain, config.bf16, this_machine())
        asked_reward(config.csft_prompt, config.reward_template)
        preflight.check_engine_heads("tp_size", config.tp_size, config.pretrain)
        asked, longest = config.asked_context, config.context_length
    preflight.check_model("pretrain", config.pretrain)
    check_length(asked, longest, config.pretrain, preflight.model_settings(config.pretrain))
    # Data and output file.
    keys = {
        "input_key": config.input_key,
        "label_key": config.label_key,
        "output_key": None if config.eval_task.generates else config.output_key,
    }
    preflight.check_sets("dataset", config.dataset, keys, config.dataset_split, config.dataset_probs)
    check_output(config)
    return parsed


def check_output(config: InferConfig) -> None:
    """Check that the output file can be written and is not an input. Raises ConfigError."""
    target = Path(config.output_path)
    preflight.check_writable("output_path", target.parent)
    if target.is_dir():
        raise ConfigError(f"--output_path {target} is a folder: give the path of a file in it.")
    for item in parse_items(config.dataset):
        real, place = target.resolve(), item.path.resolve()
        is_folder = item.kind is Kind.FOLDER
        read = split_files(item.path, config.dataset_split) if is_folder else [item.path]
        if any(real == file.resolve() for file in read):
            raise ConfigError(f"--output_path {target} is also --dataset: choose another file.")
        if is_folder and place in real.parents:
            raise ConfigError(
                f"--output_path {target} is in --dataset {item.path}, whose files are all read: choose another folder."
            )
    if config.selection is PostProcessor.CSFT and config.apply_chat_template:
        raise ConfigError(
            "--post_processor csft tells the reward in the text of the prompt, which --apply_chat_template would render "
            "again: score the rendered prompts that togi infer wrote, without the template."
        )


T = TypeVar("T")
SECONDS_AT_MOST = 0.5


def run_to_end(work: Coroutine[object, None, T]) -> T:
    """Like ``asyncio.run``. Inside a running loop (a notebook) the work runs on a thread with a loop of its own.

    The running loop blocks meanwhile. Ctrl-C cancels ``work`` there too, and this function returns when it has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    # The work must not start before the interrupt handler below can find its task.
    started = Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]]()
    may_begin = threading.Event()

    async def main() -> T:
        may_begin.wait()
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        return await work

    with _interrupts_raised(), ThreadPoolExecutor(1, "togi") as thread:
        done = None
        try:
            done = thread.submit(asyncio.run, main())
            may_begin.set()  # only now can an interrupt of the work be answered
            # A signal just before a wait does not end that wait, so none may be long.
            while not wait([done], timeout=SECONDS_AT_MOST).done:
                pass
            return done.result()
        except KeyboardInterrupt:
            may_begin.set()
            # The main thread got the Ctrl-C: cancel the task on the other thread and wait for its cleanup.
            if done is not None and not done.done():
                loop, task = started.result()
                loop.call_soon_threadsafe(task.cancel)
                wait([done])
            raise


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the main thread, in place of what a running loop does with it.

    ``asyncio.run`` cancels its own task, which cannot happen while that task waits here. An ignored signal stays ignored.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
