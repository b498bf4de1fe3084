"""The parts of ``benchmarks/compare.py``: cases, rows, processes, both sides' commands, and the table."""
