"""The life of a training run around its steps: its checkpoints on disk, its lock, and the signals that end it."""
