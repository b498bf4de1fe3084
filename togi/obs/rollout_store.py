"""Every rollout of every step on disk: ``rollouts/step_000012.parquet`` (training) and ``eval_000012.parquet``.

One row per rollout, zstd. A file is written aside and renamed, so an existing file is complete. Per-token numbers are float32, as
engines and trainer compute them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from togi.errors import DataError
from togi.obs.way_out import advice, replacing


class Split(StrEnum):
    TRAIN = "train"
    EVAL = "eval"


Row = dict[str, Any]
"""One stored rollout: a value for each name of ``SCHEMA``."""


_FLOATS, _TOKENS = pa.list_(pa.float32()), pa.list_(pa.int32())
# ``response_*``, ``*_logprobs`` and ``advantages`` have one entry per response token. Logprobs are in nats at the sampling
# temperature: ``rollout_logprobs`` of the engine, ``trainer_logprobs`` of the trainer. All but the engine's are empty if not
# computed. ``label`` is JSON text. ``reward`` is NaN unless ``outcome`` is "score". ``group_id`` is shared by the samples of one
# prompt in one step; ``sample_index`` counts within it. ``filtered``: dynamic filtering dropped the group from training.
# Of episodes with an environment: ``forks`` as (start, parent), ``turn_rewards`` as (place, reward), ``messages`` as JSON text.
SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "group_id": pa.string(),
        "prompt_id": pa.string(),
        "sample_index": pa.int32(),
        "datasource": pa.string(),
        "prompt_text": pa.string(),
        "response_text": pa.string(),
        "label": pa.string(),
        "prompt_tokens": _TOKENS,
        "response_tokens": _TOKENS,
        "response_mask": pa.list_(pa.bool_()),
        "rollout_logprobs": _FLOATS,
        "trainer_logprobs": _FLOATS,
        "ref_logprobs": _FLOATS,
        "advantages": _FLOATS,
        "reward": pa.float64(),
        "components": pa.map_(pa.string(), pa.float64()),
        "outcome": pa.string(),
        "finish_reason": pa.string(),
        "policy_version": pa.int64(),
        "versions": pa.list_(pa.int32()),
        "forks": pa.list_(pa.list_(pa.int32())),
        "turn_rewards": pa.list_(pa.list_(pa.float64())),
        "messages": pa.string(),
        "counts": pa.map_(pa.string(), pa.float64()),
        "split": pa.string(),
        "filtered": pa.bool_(),
    }
)


@dataclass(frozen=True, slots=True)
class RolloutFile:
    path: Path
    step: int
    split: Split

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True, slots=True)
class RolloutStore:
    """The folder ``rollouts/`` of a run."""

    folder: Path

    def write(self, step: int, split: Split, rows: Sequence[Row]) -> int:
        """Write all rollouts of one step and split at once: all columns but these two. Returns the size of the file in bytes.

        Raises ``DataError`` naming the folder if it cannot be written (disk full, for example).
        """
        records = [{"step": step, "split": split, **row} for row in rows]
        assert all(record.keys() == set(SCHEMA.names) for record in records), "rows with other columns"
        table = pa.Table.from_pylist(records, schema=SCHEMA)
        target = self.path(step, split)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(target) as aside:
                pq.write_table(table, aside, compression="zstd")
        except OSError as error:
            raise DataError(
                f"The rollouts of step {step} cannot be written to {self.folder} ({error}): {advice(error)}."
            ) from error
        return target.stat().st_size

    def path(self, step: int, split: Split) -> Path:
        """The file of a step."""
        return self.folder / f"{'eval' if split is Split.EVAL else 'step'}_{step:06d}.parquet"

    def files(self) -> list[RolloutFile]:
        """The stored files, by step, training before evaluation."""
        found = []
        for path in self.folder.glob("*.parquet"):
            if name := re.fullmatch(r"(step|eval)_(\d+)", path.stem):
                split = Split.EVAL if name[1] == "eval" else Split.TRAIN
                found.append(RolloutFile(path, int(name[2]), split))
        return sorted(found, key=lambda file: (file.step, file.split is Split.EVAL))

    def steps(self) -> list[int]:
        return sorted({file.step for file in self.files()})

    @property
    def nbytes(self) -> int:
        """The size of all files in bytes."""
        return sum(file.nbytes for file in self.files())

    def read_step(self, step: int) -> list[Row]:
        """All rollouts of one step: training, then evaluation. Raises ``DataError`` if there are none."""
        files = [file for file in self.files() if file.step == step]
        if not files:
            steps = self.steps()
            there = f"steps {steps[0]} to {steps[-1]}" if steps else "none at all"
            raise DataError(f"{self.folder} holds no rollouts of step {step}; it has {there}")
        return [row for file in files for row in self.read_columns(file, SCHEMA.names)]

    def read_columns(self, file: RolloutFile, columns: Sequence[str], limit: int | None = None) -> list[Row]:
        """Some columns of the first ``limit`` rows; cheap, because other columns are not read. Raises ``DataError``."""
        try:
            table = pq.read_table(file.path, columns=list(columns))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file.path} cannot be read as rollouts: {error}") from error
        rows: list[Row] = table.slice(0, limit).to_pylist(maps_as_pydicts="strict")
        return rows

    def count(self, file: RolloutFile) -> int:
        """The number of rollouts in one file, from its footer."""
        return int(pq.read_metadata(file.path).num_rows)
