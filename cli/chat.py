"""`switchkd chat`."""

import sys
from typing import Any

import click

from switchkd.cli.common import PATH, default_device, quiet_libraries


@click.command("chat")
@click.option("--model", type=PATH, required=True, help="Checkpoint folder, or a finished run.")
@click.option("--image", type=PATH, help="What the conversation is about.")
@click.option("--question", help="Ask this alone.  [default: ask what is typed, or each line of standard input]")
@click.option(
    "--template",
    help="Conversation template: a name, a JSON file, or chat.  [default: the run's, else the checkpoint's own]",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="An answer is cut there."
)
@click.option(
    "--max-length", type=click.IntRange(2), default=2048, show_default=True, help="Of the conversation, in tokens."
)
@click.option("--device", help="cpu, cuda, cuda:1, …  [default: cuda if there is one]")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the checkpoint.")
def command(question: str | None, device: str | None, **options: Any) -> None:
    """Talk to a model about an image; answers are greedy and come word by word.

    On a terminal an empty line ends the conversation.
    """
    quiet_libraries()
    from switchkd.pipelines.release.chat import Chat, ChatOptions

    chat = Chat(ChatOptions(device=device or default_device(), **options))

    def ask(words: str) -> None:
        chat.ask(words, lambda piece: click.echo(piece, nl=False))
        click.echo()

    if question is not None:
        ask(question)
    elif sys.stdin.isatty():
        while words := click.prompt("you", default="", show_default=False, prompt_suffix="> ").strip():
            ask(words)
    else:
        for line in sys.stdin:
            if line.strip():
                ask(line.strip())
