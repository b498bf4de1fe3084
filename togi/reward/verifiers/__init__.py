"""Reward functions that come with Togi (``--reward_func builtin:NAME``), run like a user's: in killable processes.

Nothing is imported here. Each module needs the standard library and at most one package, and no torch.
"""
