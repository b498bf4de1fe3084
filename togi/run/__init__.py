"""One run from start to end: its journal, the checkpoints that it keeps, and the training loops."""
