"""Runs untrusted programs. ``run`` is the outside; ``launcher`` and ``calls`` run inside.

Imports nothing: the inside starts with the standard library alone, within hundredths of a second.
"""
