"""The mathematics of training as pure functions: tensors and numbers in, tensors and numbers out.

No ranks, no flags, no models. Each module can be read beside the paper that its docstrings name.
"""
