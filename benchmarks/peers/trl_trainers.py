"""TRL's trainers on a job: ``python trl_trainers.py JOB.json``, in the peers' virtual environment.

Each is used as its documentation says. Where TRL has a choice that costs nothing, the faster one is taken for it: gradient
checkpointing is off and rows come sorted by length. A reference model is as TRL makes it, in float32 under autocast: rounded to
bfloat16 it would not be what the policy is at first, and the losses would differ.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from job import Job, Recorder
from letters import share_of_e


class StoredGRPOTrainer(GRPOTrainer):
    """GRPO whose responses are there already: ``stored`` maps the tokens of a prompt to those of its answers."""

    stored: dict[tuple[int, ...], list[list[int]]]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[Any, None]:
        answers = {tokens: iter(found) for tokens, found in self.stored.items()}
        return [next(answers[tuple(tokens)]) for tokens in prompt_ids], None


def main() -> None:
    job, recorder = Job.read(), Recorder()
    makers = {"sft": sft, "dpo": dpo, "rm": rm, "replayed": replayed, "generated": generated}
    trainer = makers[job.kind](job, recorder)
    trainer.add_callback(recorder)
    trainer.train()
    if trainer.is_world_process_zero():
        recorder.write(job.out)


def sft(job: Job, recorder: Recorder) -> Any:
    more = {"padding_free": True, "max_length": None} if job.options.get("padding_free") else {"max_length": 4096}
    arguments = SFTConfig(**job.arguments(), **more, model_init_kwargs={"dtype": job.dtype})
    return SFTTrainer(job.model, arguments, train_dataset=Dataset.from_list(job.rows()))


def dpo(job: Job, recorder: Recorder) -> Any:
    arguments = DPOConfig(**job.arguments(), max_length=4096, beta=0.1, model_init_kwargs={"dtype": job.dtype})
    return DPOTrainer(job.model, args=arguments, train_dataset=Dataset.from_list(job.rows()))


def rm(job: Job, recorder: Recorder) -> Any:
    arguments = RewardConfig(**job.arguments(), max_length=4096, model_init_kwargs={"dtype": job.dtype})
    return RewardTrainer(job.model, args=arguments, train_dataset=Dataset.from_list(job.rows()))


def replayed(job: Job, recorder: Recorder) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    stored, rewards = {}, {}
    for row in job.rows():
        answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(row["answers"])["input_ids"]]
        stored[tuple(tokenizer(row["prompt"])["input_ids"])] = answers
        rewards.update(zip(map(tuple, answers), row["rewards"], strict=True))

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [rewards[tuple(ids)] for ids in completion_ids]

    trainer = StoredGRPOTrainer(**grpo_settings(job), reward_funcs=reward)
    trainer.stored = stored
    return trainer


def generated(job: Job, recorder: Recorder) -> Any:
    prompts = {row["prompt"]: 0 for row in job.rows()}

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        recorder.lengths.append(
            [lengths[prompt] + len(ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]
        )
        return [share_of_e(completion) for completion in completions]

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    lengths = {prompt: len(tokenizer(prompt)["input_ids"]) for prompt in prompts}
    return GRPOTrainer(**grpo_settings(job), reward_funcs=reward)


def grpo_settings(job: Job) -> dict[str, Any]:
    """GRPO with a reference, one update on each rollout, the mean over all tokens of the step."""
    arguments = GRPOConfig(
        **job.arguments(),
        num_generations=job.answers,
        max_completion_length=job.answer_tokens,
        beta=job.kl,
        shuffle_dataset=False,
        use_transformers_continuous_batching=job.options.get("continuous_batching", False),
        model_init_kwargs={"dtype": job.dtype},
    )
    rows = [{"prompt": row["prompt"]} for row in job.rows()]
    return {"model": job.model, "args": arguments, "train_dataset": Dataset.from_list(rows)}


if __name__ == "__main__":
    main()
