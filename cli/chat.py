"""`switchkd chat`."""

import sys
from typing import Any

import click

from switchkd.cli.common import default_device, echo, importing, quiet_libraries
from switchkd.cli.options import options_of
from switchkd.pipelines.release.options import ChatOptions


@click.command("chat")
@click.option("--question", help="Ask this alone.  [default: ask what is typed, or each line of standard input]")
@options_of(ChatOptions)
def command(question: str | None, device: str | None, **options: Any) -> None:
    """Ask a model about an image; answers are greedy and printed word by word.

    On a terminal an empty line ends the conversation.
    """
    quiet_libraries()
    with importing():
        from switchkd.pipelines.release.chat import Chat

    chat = Chat(ChatOptions(device=device or default_device(), **options))

    def ask(words: str) -> None:
        chat.ask(words, lambda piece: echo(piece, nl=False))
        echo()

    if question is not None:
        ask(question)
    elif sys.stdin.isatty():
        while words := click.prompt("you", default="", show_default=False, prompt_suffix="> ").strip():
            ask(words)
    else:
        for line in sys.stdin:
            if line.strip():
                ask(line.strip())
