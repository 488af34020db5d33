"""`switchkd eval`."""

from typing import Any

import click

from switchkd.cli.common import PATH, config_option, default_device, lines_of, quiet_libraries


@click.command("eval")
@config_option
@click.option("--model", type=PATH, required=True, help="Checkpoint folder.")
@click.option(
    "--data", type=PATH, required=True, help="LLaVA-style JSON; every answer in it is a question to the model."
)
@click.option("--images", type=PATH, help="Folder that the data file's image paths start from.")
@click.option("--output", type=PATH, required=True, help="Folder for predictions.jsonl and scores.json.")
@click.option(
    "--template", default="qwen2_base", show_default=True, help="Conversation template: a name or a JSON file."
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--max-length", type=click.IntRange(2), default=2048, show_default=True, help="Longer prompts are skipped."
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--device", help="cpu, cuda, cuda:1, …  [default: cuda if there is one]")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the checkpoint.")
def command(device: str | None, **options: Any) -> None:
    """Score a model on a data file: greedy decoding, exact match, by question type."""
    quiet_libraries()
    from switchkd.pipelines.evaluate import EvalOptions, evaluate

    scores = evaluate(EvalOptions(device=device or default_device(), **options))
    click.echo(
        f"exact match {scores.accuracy:.4f} over {scores.questions:,} questions; skipped: {lines_of(scores.skipped)}"
    )
    for kind, share in scores.by_type.items():
        click.echo(f"  {kind:<16} {share:.4f}")
    click.echo(f"predictions: {scores.predictions}")
