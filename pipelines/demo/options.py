"""Options of `switchkd demo`."""

from pathlib import Path

from switchkd.pipelines.options import option, options_class


@options_class
class DemoOptions:
    """The options of `switchkd demo`."""

    workdir: Path = option(
        default=Path("demo-run"), help="Where everything goes; a demo that was interrupted goes on there."
    )
    train_teacher: bool = option(default=False, help="Train the teacher here instead of taking the weights that ship.")
    seed: int = option(default=0, help="Of the students' first weights and data order.")
    student_steps: int = option(default=600, at_least=1, hidden=True, help="Optimizer steps of each student.")
    student_samples: int = option(
        default=12_800, at_least=1, hidden=True, help="Training samples that are cached and learned from."
    )
