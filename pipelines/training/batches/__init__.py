"""Which samples a step takes, and the tensors that they become."""
