"""Transformers' own Trainer on supervised rows: ``python transformers_trainer.py JOB.json``, in the peers' virtual environment.

Rows are padded to the longest of a micro-batch, and the loss of the model itself is used (its whole logits), as in most scripts.
"""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from job import IGNORED, Job, Recorder, example


def main() -> None:
    job, recorder = Job.read(), Recorder()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**job.arguments()),
        train_dataset=[example(row, tokenizer) for row in job.rows()],
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        callbacks=[recorder],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        recorder.write(job.out)


if __name__ == "__main__":
    main()
