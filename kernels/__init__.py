"""Floor 1: the kernels. They know tensors and shapes, and nothing of the package above."""
