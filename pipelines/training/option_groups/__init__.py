"""Groups of the options of `switchkd train` that belong together: each is a class, which `TrainOptions` inherits."""
