"""`switchkd init-student`."""

from typing import Any

import click

from switchkd.cli.common import PATH, config_option, quiet_libraries


@click.command("init-student")
@config_option
@click.option(
    "--vision",
    type=PATH,
    required=True,
    help="Folder of a vision tower (SigLIP, SigLIP2 of fixed resolution, CLIP), alone or with its text tower, or of a Llava "
    "whose tower is taken.",
)
@click.option(
    "--language", type=PATH, required=True, help="Folder of a causal language model (Qwen, Llama, SmolLM, …)."
)
@click.option("--out", type=PATH, required=True, help="The student; a new folder.")
@click.option(
    "--projector",
    type=click.Choice(["mlp", "ldpv2"]),
    default="mlp",
    show_default=True,
    help="mlp: two layers with GELU, a token per feature. ldpv2: MobileVLM V2's, which pools to --grid² tokens.",
)
@click.option("--grid", type=click.IntRange(1), default=12, show_default=True, help="Side of ldpv2's grid of tokens.")
@click.option(
    "--tokenizer",
    type=PATH,
    help="Folder of the tokenizer to take, such as the teacher's; it must hold the LLM's with the same ids.  [default: the LLM's]",
)
@click.option(
    "--feature-layer", type=int, default=-2, show_default=True, help="Which layer's output of the tower is projected."
)
@click.option(
    "--strategy",
    type=click.Choice(["default", "full"]),
    help="default drops the first token, full keeps all.  [default: drop it if it is a class token]",
)
@click.option(
    "--image-mode",
    type=click.Choice(["own", "square", "pad"]),
    default="own",
    show_default=True,
    help="own: the tower's image processor. square: images are stretched. pad: filled up with the mean colour first.",
)
@click.option("--seed", type=int, default=42, show_default=True, help="Of the projector's weights.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a checkpoint.")
def command(**options: Any) -> None:
    """Assemble a student: a vision tower and a language model with their weights, a projector without.

    The tokenizer gets the token <image> if it has none. Train the projector first: `switchkd train --stage pt`.
    """
    quiet_libraries()
    from switchkd.pipelines.checkpoints.init_student import InitOptions, init_student

    done = init_student(InitOptions(**options))
    parts = ", ".join(f"{name} {count:,}" for name, count in done.parameters.items())
    click.echo(
        f"{done.out}: {sum(done.parameters.values()):,} parameters ({parts}); "
        f"an image becomes {done.image_tokens} tokens, <image> has id {done.image_token_id}"
    )
