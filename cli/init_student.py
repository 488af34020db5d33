"""`switchkd init-student`."""

from typing import Any

import click

from switchkd.cli.common import config_option, echo, quiet_libraries
from switchkd.cli.options import options_of
from switchkd.counting import counted
from switchkd.pipelines.checkpoints.options import InitOptions


@click.command("init-student")
@config_option
@options_of(InitOptions)
def command(**options: Any) -> None:
    """Assemble a student: a vision tower and a language model with their weights, and a projector with random weights.

    The tokenizer gets the token <image> if it has none. Train the projector first: `switchkd train --stage pt`.
    """
    quiet_libraries()
    from switchkd.pipelines.checkpoints.init_student import init_student

    done = init_student(InitOptions(**options))
    parts = ", ".join(f"{name} {count:,}" for name, count in done.parameters.items())
    echo(
        f"{done.out}: {counted(sum(done.parameters.values()), 'parameter')} ({parts}); "
        f"an image becomes {counted(done.image_tokens, 'token')}, <image> has id {done.image_token_id}"
    )
