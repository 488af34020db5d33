"""Options of `switchkd data check` and `switchkd data show`."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from switchkd.pipelines.mixture import MixtureEntry
from switchkd.pipelines.options import option, options_class
from switchkd.settings import MAX_IMAGE_PIXELS


@options_class
class CheckOptions:
    """The options of `switchkd data check`."""

    data: Path = option(names="data", hidden=True, help="The data file, or a mixture (YAML).")
    images: Path | None = option(
        names="images", default=None, help="Folder that the data file's image paths start from; each image is decoded."
    )
    model: Path | None = option(
        names="checkpoint",
        default=None,
        help="Checkpoint folder: its tokenizer tells lengths.",
        unset="words are counted",
    )
    template: str | None = option(
        default=None,
        help="Conversation template: a name, a JSON file, or chat, the checkpoint's own.",
        unset="qwen2_base for a LLaVA checkpoint, chat for other families",
    )
    max_length: int = option(default=2048, at_least=2, help="In tokens with image tokens.")
    max_image_pixels: int = option(default=MAX_IMAGE_PIXELS, at_least=1, help="Larger images are skipped.")
    workers: int | None = option(
        default=None,
        at_least=0,
        help="Processes that inspect samples.",
        unset="from the cores there are: one each, at most 16; 0 for up to 1,024 rows",
    )
    report: Path | None = option(default=None, help="Write a JSON line for each row that would be skipped.")
    visual_advantage: int = option(
        default=0,
        at_least=0,
        metavar="N",
        help="Also run the model over N random samples with an image, and tell by how much it looks: log p(answer | image) - "
        "log p(answer | blurred image), by kind of question.",
    )
    batch_size: int = option(default=8, at_least=1, help="Samples per forward pass, with --visual-advantage.")
    device: str = option(default="cpu", help="cpu, cuda, cuda:1, …", unset="cuda if there is one")
    trust_remote_code: bool = option(default=False, help="Run code that comes with a checkpoint.")


@options_class
class ShowOptions:
    """The options of `switchkd data show`."""

    data: Path = option(names="data", hidden=True, help="The data file, or a mixture (YAML).")
    model: Path = option(names="checkpoint", help="Checkpoint folder, for its tokenizer.")
    images: Path | None = option(
        names="images",
        default=None,
        help="Folder that the data file's image paths start from: shows as many tokens as each image has.",
        unset="images are not read",
    )
    template: str | None = option(
        default=None,
        help="Conversation template: a name, a JSON file, or chat, the checkpoint's own.",
        unset="qwen2_base for a LLaVA checkpoint, chat for other families",
    )
    n: int = option(default=3, at_least=1, flag="-n, --n", help="Samples.")
    start: int = option(default=0, at_least=0, help="The first one's row.")
    max_length: int = option(default=2048, at_least=2, help="In tokens with image tokens.")
    trust_remote_code: bool = option(default=False, help="Run code that comes with a checkpoint.")


Options = TypeVar("Options", CheckOptions, ShowOptions)


def of_entry(entry: MixtureEntry, options: Options) -> Options:
    """Return the options for one data file of a mixture, with its own images and template."""
    return replace(
        options,
        data=entry.data,
        images=entry.images or options.images,
        template=entry.template or options.template,
    )
