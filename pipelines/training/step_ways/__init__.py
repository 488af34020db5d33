"""How a step runs: copies of the weights, and ways that are not confirmed yet."""
