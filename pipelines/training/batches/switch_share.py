"""Which image samples pass the switch pathway where only a share of them does."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SwitchShare:
    """Draws each image sample by itself, in each epoch anew, with probability `share`.

    The draw is a function of seed, epoch and sample: it depends neither on batches, processes and workers nor on interruptions.
    With VSD divided by `share`, its mean over draws, and that of its gradient, is VSD of all samples. If sample i adds v_i to the
    gradient, the variance that drawing adds is (1 / share - 1) · Σ v_i², a sum over all of them (a Horvitz-Thompson estimate under
    Poisson sampling).

    Args:
        share: above 0, at most 1. seed: of the run. file: number of the data file in a mixture. A sample that an epoch of a mixture
            holds more than once is drawn once for all.
    """

    share: float
    seed: int
    file: int = 0

    def takes(self, epoch: int, sample: int) -> bool:
        """Return whether a sample, by its number among the usable ones, passes the switch pathway in an epoch."""
        return bool(np.random.default_rng([self.seed % (1 << 63), self.file, epoch, sample]).random() < self.share)
