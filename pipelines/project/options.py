"""Options of `switchkd new`."""

from pathlib import Path

from switchkd.pipelines.options import option, options_class


@options_class
class NewOptions:
    """The options of `switchkd new`."""

    out: Path = option(hidden=True, help="A new folder.")
    teacher: Path = option(names="checkpoint", help="Checkpoint folder of the teacher.")
    student: Path = option(names="checkpoint", help="Checkpoint folder of the student, before training.")
    data: Path = option(names="data", help="Data file to train on, or a mixture (YAML).")
    images: Path | None = option(
        names="images", default=None, help="Folder that the data file's image paths start from."
    )
    eval_data: Path | None = option(
        names="data",
        default=None,
        help="Held-out data file on which the students are scored by exact match.",
        unset="no scores",
    )
    eval_images: Path | None = option(
        names="images", default=None, help="Folder that its image paths start from.", unset="--images"
    )
    template: str | None = option(
        default=None,
        help="Conversation template: a name, a JSON file, or chat, the checkpoint's own.",
        unset="qwen2_base for a LLaVA checkpoint, chat for other families",
    )
    global_batch: int = option(default=128, at_least=1, help="Samples per optimizer step over all devices.")
    nodes: int = option(default=1, at_least=1, help="Nodes of the Slurm job that trains.")
    gpus: int = option(default=8, at_least=1, help="GPUs of each node.")
    trust_remote_code: bool = option(default=False, help="Run code that comes with a checkpoint.")
