"""switchkd: distil a small vision-language model from a large one with Switch-KD (arXiv 2604.14629).

This package implements the method: samples and their supervised masks, the three components of a VLM, the losses, the objective.
The teacher store is `switchkd.stores`, the two stages are `switchkd.pipelines`, the command line is `switchkd.cli`.
"""

__version__ = "0.1.0"
