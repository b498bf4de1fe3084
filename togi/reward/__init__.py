"""Where rewards come from: a user's function in killable workers, or scalar models, over whole groups.

Nothing is imported here, so that the worker process (``togi.reward.worker``) starts without NumPy and torch.
"""
