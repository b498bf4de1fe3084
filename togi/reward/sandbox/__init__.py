"""Runs programs that nobody trusts. ``run`` is the outside, ``launcher`` and ``calls`` are what runs inside.

Nothing is imported here: the inside starts with the standard library alone, in hundredths of a second.
"""
