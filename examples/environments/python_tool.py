"""A question, and a Python that computes what is needed for it, in Togi's own sandbox.

    togi rl --environment examples/environments/python_tool.py:Question --prompt_data questions.jsonl --apply_chat_template ...

A row has a ``question`` and its ``answer``: {"question": "How many primes are below 1000?", "answer": "168"}.

Each program starts anew: it knows no variable of the one before. It has no network, no files but the system's and an empty /tmp,
and the limits below (``togi/reward/sandbox/walls.py`` says all). On a machine that permits no namespaces programs run behind a
guard inside Python, which is no sandbox: set WALLS to True to have episodes fail there instead.

The model gives its answer with a tool too, as an environment sees only what its tools are called with.
"""

from __future__ import annotations

import time

from togi.reward.sandbox.run import Limits, run_program, walls_are_to_be_had

LIMITS = Limits(cpu_seconds=5, wall_seconds=10.0)
WALLS = walls_are_to_be_had()
SHOWN = 4000
# Errors are shown to the model, with the lines of its own program, and so is a last line that is an expression, as in a notebook.
RUN = """
import ast, sys, traceback
sys.stderr = sys.stdout
try:
    program = ast.parse(PROGRAM, "program")
    last = program.body.pop() if program.body and isinstance(program.body[-1], ast.Expr) else None
    names = {"__name__": "__main__"}
    exec(compile(program, "program", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "program", "eval"), names)
        if value is not None:
            print(repr(value))
except SyntaxError as error:
    print("".join(traceback.format_exception_only(error)).strip())
except Exception as error:
    traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))
"""


class Question:
    """One question."""

    done = False

    def reset(self, question: str, answer: str, **row: object) -> str:
        """Begin with a row."""
        self._right, self._answer = str(answer).strip(), ""
        return (
            f"{question}\n\nCompute what you need with the tool python, and give the final answer with the tool answer."
        )

    def python(self, code: str) -> str:
        """Run a Python program and get what it prints. It starts without the variables of earlier programs.

        Args:
            code: The program.
        """
        start = time.monotonic()
        # The name is the program's text: a literal, so nothing in it can end the string.
        whole = RUN.replace("PROGRAM", repr(code), 1)
        ended = run_program(whole, "", LIMITS, start + LIMITS.wall_seconds, walls=WALLS)
        output, left_out = ended.output.strip(), max(len(ended.output.strip()) - SHOWN, 0)
        if left_out:
            output = f"{output[: SHOWN // 2]}\n[... {left_out} characters left out ...]\n{output[-SHOWN // 2 :]}"
        if not ended.ended_well:
            late = time.monotonic() - start >= LIMITS.wall_seconds
            why = f"it took longer than {LIMITS.wall_seconds:g} s" if late else "it met a limit or ended itself"
            output += f"\n[The program was not finished: {why}.]"
        return output.strip() or "[The program printed nothing.]"

    def answer(self, text: str) -> str:
        """Give the final answer.

        Args:
            text: The answer alone, without explanation.
        """
        self._answer, self.done = text.strip(), True
        return "Thank you."

    def reward(self) -> float:
        """1 if the answer is the right one, letter by letter."""
        return float(self.done and self._answer == self._right)
