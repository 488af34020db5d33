"""Options of `switchkd export` and `switchkd chat`."""

from pathlib import Path

from switchkd.pipelines.options import option, options_class
from switchkd.settings import ModelDtype


@options_class
class ExportOptions:
    """The options of `switchkd export`."""

    run: Path = option(names="model folder", hidden=True, help="A finished run.")
    out: Path = option(hidden=True, help="A new folder.")
    scores: tuple[Path, ...] = option(
        names="folder",
        default=(),
        multiple=True,
        help="Folder of `switchkd eval` for the card (repeatable).",
        unset="those in RUN",
    )
    template: str | None = option(
        default=None, help="What the student was trained with: a name or a JSON file.", unset="the run's"
    )
    dtype: ModelDtype = option(default="auto", help="Of the weights; auto keeps the run's.")
    push_to: str | None = option(
        default=None, metavar="REPO", help="Upload the folder to this repository of the Hugging Face hub."
    )
    best: bool = option(default=False, help="The best student (`train --keep-best`) instead of the last one.")
    private: bool = option(default=False, help="Make that repository private if it is new.")
    trust_remote_code: bool = option(default=False, help="Run code that comes with the checkpoint.")


@options_class
class ChatOptions:
    """The options of `switchkd chat`."""

    model: Path = option(names="model folder", help="Checkpoint folder, or a finished run.")
    image: Path | None = option(names="image", default=None, help="What the conversation is about.")
    template: str | None = option(
        default=None,
        help="Conversation template: a name, a JSON file, or chat.",
        unset="the run's, else the checkpoint's own",
    )
    max_new_tokens: int = option(default=512, at_least=1, help="An answer is cut there.")
    max_length: int = option(default=2048, at_least=2, help="Of the conversation, in tokens.")
    device: str = option(default="cpu", help="cpu, cuda, cuda:1, …", unset="cuda if there is one")
    dtype: ModelDtype = option(default="auto", help="The dtype that the model runs in.")
    trust_remote_code: bool = option(default=False, help="Run code that comes with the checkpoint.")
