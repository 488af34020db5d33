"""Options of `switchkd report` and `switchkd attend`."""

from pathlib import Path

from switchkd.pipelines.options import option, options_class
from switchkd.settings import ModelDtype, StoreLocation


@options_class
class ReportOptions:
    """The options of `switchkd report`."""

    runs: tuple[tuple[str | None, StoreLocation], ...] = option(hidden=True, help="(label or None, folder or URL).")
    out: Path = option(default=Path("report"), help="Folder for report.html and its pictures.")
    samples: int = option(default=8, at_least=0, help="Questions shown with every model's answer.")
    knees: int = option(
        default=0,
        at_least=0,
        help="Run finished students on this many random samples of the store, and show their knees beside the teacher's.",
    )
    knees_store: str | None = option(
        default=None,
        metavar="NAME",
        help="The store of --knees: its name or label in the report.",
        unset="each run's own; of a run that read none, the only store that is given",
    )
    baseline: str | None = option(
        default=None,
        metavar="NAME",
        help="An evaluation, by its name or label in the report: the others are also shown as differences from it.",
        unset="differences that `eval --baseline` recorded",
    )
    device: str = option(default="cpu", help="cpu, cuda, cuda:1, …", unset="cuda if there is one")


@options_class
class AttendOptions:
    """The options of `switchkd attend`."""

    model: Path = option(names="model folder", help="Checkpoint folder of the student.")
    asked: tuple[tuple[Path, str], ...] = option(hidden=True, help="(image, question) of each row of maps.")
    teacher: Path | None = option(
        names="model folder", default=None, help="Checkpoint folder of the teacher, to compare with."
    )
    baseline: Path | None = option(
        names="model folder", default=None, help="Checkpoint folder of another student, to compare with."
    )
    answer: str | None = option(default=None, help="Read the attention of this answer.", unset="each model's own")
    template: str | None = option(
        default=None,
        help="Conversation template of all models: a name, a JSON file, or chat, each checkpoint's own.",
        unset="that of the run that trained a model; else qwen2_base for a LLaVA checkpoint, chat for other families",
    )
    layers: tuple[int, ...] = option(
        default=(),
        flag="--layer",
        multiple=True,
        help="A layer of the language model, from 0, or from the end with -1.",
        unset="all",
    )
    out: Path = option(default=Path("attend"), help="Folder for attend.png and attend.html.")
    max_new_tokens: int = option(default=32, at_least=1, help="An answer is cut there.")
    device: str = option(default="cpu", help="cpu, cuda, cuda:1, …", unset="cuda if there is one")
    dtype: ModelDtype = option(default="auto", help="What the models run in; auto is a checkpoint's own.")
    trust_remote_code: bool = option(default=False, help="Run code that comes with a checkpoint.")
