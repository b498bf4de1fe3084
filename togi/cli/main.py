"""The ``togi`` command. It knows the names of the commands; the rest is imported when a command runs."""

import os
import select
import sys
from collections.abc import Sequence
from functools import partial

import togi
from togi.config.parse import nearest
from togi.errors import RunError, UserError
from togi.methods import METHODS
from togi.obs.way_out import advice, disk_reason

COMMANDS = {
    "rl": "online RL: PPO, GRPO, RLOO, REINFORCE++, Dr. GRPO",
    **{name: method.summary for name, method in METHODS.items()},
    "infer": "outputs for a file of prompts, scores for a file of outputs",
    "iterate": "rounds of generate, score, select, train: best-of-n, iterative DPO, conditional SFT",
    "check": "everything a command does before its first step, in seconds; rl: would it learn?",
    "doctor": "what this machine has, which fast paths run here, what to do; whether a run can start",
    "chat": "talk to a model in the terminal",
    "serve-rm": "serve a reward model or function over HTTP",
    "merge-lora": "merge a LoRA adapter into its base model",
    "export": "a run's model or checkpoint as a Hugging Face folder with a model card",
    "report": "write report.html of a run folder again",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status, 141 if nobody reads the output any more (``togi ... | head``)."""
    try:
        try:
            words = list(sys.argv[1:] if argv is None else argv)
            if not words or words[0] in ("-h", "--help", "-V", "--version"):
                print(f"togi {togi.__version__}" if words and words[0] in ("-V", "--version") else _usage())
                return 0
            name, *rest = words
            if name not in COMMANDS:
                near = nearest(name, COMMANDS)
                hint = f"; did you mean {near}?" if near else f". Commands: {', '.join(COMMANDS)}."
                print(f"togi: unknown command {name}{hint}", file=sys.stderr)
                return 2
            # Expected errors become one sentence and an exit status; any other is a bug and keeps its traceback.
            status, why = 0, ""
            try:
                from togi.cli import commands

                method = partial(commands.offline, name) if name in METHODS else None
                (method or vars(commands)[name.replace("-", "_")])(rest)
            except UserError as error:
                status, why = 2, str(error)
            except RunError as error:
                status, why = 1, f"the run failed: {error}"
            except Exception as error:
                if not disk_reason(error):
                    raise
                status, why = 1, f"the run failed: a file cannot be written ({error}): {advice(error)}."
            except KeyboardInterrupt:
                status, why = 130, "interrupted"
            if status != 0:
                print(f"{_speaker()}: {why}", file=sys.stderr)
            return status
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def launch(command: str) -> None:
    """Run ``togi COMMAND`` with the flags of this process, and end it: the command under an established module name."""
    sys.exit(main([command, *sys.argv[1:]]))


def _nobody_reads() -> bool:
    """Whether it was the output that broke, and not a pipe to a process that died."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return bool(output.poll(0))


def _speaker() -> str:
    """The name before an error; with several launched processes it includes the rank."""
    rank = os.environ.get("RANK", "0")
    return "togi" if rank == "0" else f"togi (rank {rank})"


def _usage() -> str:
    lines = [f"togi {togi.__version__}: {(togi.__doc__ or '').splitlines()[0]}", "", "usage: togi COMMAND [flags]", ""]
    lines += [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "togi COMMAND --help lists every flag of a command."])
