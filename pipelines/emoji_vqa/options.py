"""Options of `switchkd data emoji-vqa`."""

from pathlib import Path

from switchkd.pipelines.options import option, options_class

SEED = 0
# Split → images. `style` and `combo`, on which methods are compared, have more than 8,000 questions together.
IMAGES = {"train": 12_000, "val": 700, "iid": 1000, "style": 2000, "combo": 3000, "concept": 700, "degraded": 1000}


@options_class
class EmojiVQAOptions:
    """The options of `switchkd data emoji-vqa`."""

    out: Path = option(
        default=Path("emoji-vqa"), help="Folder to make: images, a data file for each split, report and licences."
    )
    packages: Path | None = option(
        default=None,
        help="Folder of the packages that the drawings come from (26 MB); what is missing is fetched with npm.",
        unset="packages, beside the folder to make",
    )
    size: int = option(default=96, at_least=48, at_most=512, help="Width and height of an image in pixels.")
    share: float = option(
        default=1.0, above=0, at_most=10, help="Images of every split, as a share of the published numbers."
    )
    seed: int = option(default=SEED, at_least=0, help="Of everything that is drawn at random.")
    workers: int | None = option(
        default=None,
        at_least=0,
        help="Processes that draw, 0: this one; the images do not depend on their number.",
        unset="as many as there are cores",
    )
