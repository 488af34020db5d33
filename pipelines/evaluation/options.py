"""Options of `switchkd eval`."""

from pathlib import Path

from switchkd.pipelines.options import keyword_options_class, option
from switchkd.settings import ModelDtype

# Options that may differ when an evaluation is resumed, since they do not change any answer.
RESUMABLE_CHANGES = {"output", "batch_size", "workers", "limit", "baseline"}
# Headings of the help, in its order.
FIRST = "Needed first"
BENCHMARKS = "Benchmarks"
GENERATION = "Generation"
COMPARISON = "Comparison"
SCALE = "Scale"


@keyword_options_class
class AnswerOptions:
    """How a model is prompted; the options that all tasks of `switchkd eval` share."""

    template: str | None = option(
        default=None,
        group=GENERATION,
        help="Conversation template: a name, a JSON file, or chat, the checkpoint's own.",
        unset="that of the run that trained the model; else qwen2_base for a LLaVA checkpoint, chat for other families",
    )
    max_new_tokens: int = option(
        at_least=1, group=GENERATION, help="Answers are cut there.", unset="32; benchmarks 128"
    )
    max_length: int = option(
        default=2048, at_least=2, group=GENERATION, help="Longer prompts are left out and counted; in tokens."
    )
    limit: int | None = option(
        default=None,
        at_least=1,
        group=SCALE,
        help="Ask a fixed random sample of this size, of every benchmark; its scores are labelled and in no average.",
        unset="all questions",
    )
    baseline: Path | None = option(
        names="folder",
        default=None,
        group=COMPARISON,
        help="--output of another model on the same questions: the differences from it, with their intervals.",
    )
    batch_size: int = option(default=64, at_least=1, group=SCALE, help="Prompts per forward pass.")
    workers: int | None = option(
        default=None,
        at_least=0,
        group=SCALE,
        help="Processes that prepare images beside the model.",
        unset="from the cores there are: 0 of fewer than 4, at most 8",
    )
    device: str = option(default="cpu", group=SCALE, help="cpu, cuda, cuda:1, …", unset="cuda if there is one")
    dtype: ModelDtype = option(default="auto", group=SCALE, help="The dtype that the model runs in.")
    trust_remote_code: bool = option(default=False, group=GENERATION, help="Run code that comes with the checkpoint.")


@keyword_options_class
class EvalOptions(AnswerOptions):
    """The options of `switchkd eval --task exact-match`."""

    model: Path = option(names="checkpoint", group=FIRST, help="Checkpoint folder.")
    data: Path = option(
        names="data", group=FIRST, help="exact-match: LLaVA-style JSON; every answer in it is a question to the model."
    )
    output: Path = option(group=FIRST, help="Folder for predictions and scores.")
    images: Path | None = option(
        names="images",
        default=None,
        group=FIRST,
        help="exact-match: folder that the data file's image paths start from.",
    )
    max_new_tokens: int = option(default=32, at_least=1, hidden=True)


@keyword_options_class
class BenchmarkOptions(AnswerOptions):
    """The options of `switchkd eval --task …`."""

    tasks: tuple[str, ...] = option(hidden=True, help="NAME, NAME:SPLIT or all.")
    benchmarks: Path = option(
        names="folder", group=FIRST, help="Folder with one folder for each benchmark, as --list shows them."
    )
    output: Path = option(hidden=True, help="Folder for answers and scores.")
    model: Path | None = option(
        names="checkpoint", default=None, hidden=True, help="Not needed to score what was answered before."
    )
    max_new_tokens: int = option(default=128, at_least=1, hidden=True)
    score_only: bool = option(
        default=False, group=BENCHMARKS, help="Benchmarks: score the answers in --output again, without a model."
    )
    retry_failed: bool = option(
        default=False, group=BENCHMARKS, help="Benchmarks: ask questions again that failed before."
    )
