"""The mathematics of training: tensors in, tensors out. Nothing of models, files and processes."""
