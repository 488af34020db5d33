"""switchkd: distil a small vision-language model from a large one with Switch-KD (arXiv 2604.14629).

The method lives here: samples and their masks, the three-part VLM, the losses, the objective. The teacher cache is
`switchkd.stores`, the two stages are `switchkd.pipelines`, the command line is `switchkd.cli`.
"""

__version__ = "0.1.0"
