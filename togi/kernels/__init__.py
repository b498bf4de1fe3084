"""C kernels for training on a CPU: for layers, the head, attention and AdamW; built by the machine's own compiler."""
