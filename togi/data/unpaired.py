"""Read a row as an answer with a label, desirable or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from togi.data.chat import Tokenizer
from togi.data.faults import Drop, RowError
from togi.data.fields import value_of
from togi.data.masks import Draft
from togi.data.record_spec import RecordSpec
from togi.data.sft import read_sft
from togi.data.tables import Row

# CSV cells are strings: labels as written by hand, by Python and by tables with missing values.
LABELS: Mapping[object, float] = {0: 0.0, 1: 1.0} | {
    text: label for label, texts in ((0.0, ("0", "0.0", "false")), (1.0, ("1", "1.0", "true"))) for text in texts
}


def read_unpaired(row: Row, where: str, spec: RecordSpec, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
    """One draft as for supervised fine-tuning, with values "desirable" (1 or 0) and "mismatched" (0)."""
    label = value_of(row, where, "label_key", spec.label_key)
    known = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(known, str | int | float) or known not in LABELS:
        raise RowError(
            Drop.WRONG_LABELS,
            f"{where}: the field {spec.label_key!r} is {label!r}: a label must be true or 1 (desirable), or false or 0.",
        )
    drafts = read_sft(row, where, spec, tokenizer)
    if isinstance(drafts, Drop):
        return drafts
    values = {"desirable": LABELS[known], "mismatched": 0.0}
    return tuple(replace(draft, values=values) for draft in drafts)
