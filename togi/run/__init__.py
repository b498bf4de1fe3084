"""One run from its start to its end: what it tells, which models it keeps, and the loops."""
