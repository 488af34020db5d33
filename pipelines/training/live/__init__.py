"""A teacher that runs in every step: the reference of a cached run, and other methods of distillation."""
