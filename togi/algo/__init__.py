"""The mathematics of training as pure functions: tensors and numbers in, tensors and numbers out.

No ranks, no flags, no models. The docstrings name the papers that the formulas come from.
"""
