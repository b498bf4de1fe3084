"""Built-in reward functions (``--reward_func builtin:NAME``), run like a user's: in killable processes.

Imports nothing. Each module needs the standard library and at most one package, and no torch.
"""
