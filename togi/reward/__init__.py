"""Reward sources: a user's function in killable workers, or scalar models, over whole groups.

Imports nothing, so that the worker process (``togi.reward.worker``) starts without NumPy and torch.
"""
