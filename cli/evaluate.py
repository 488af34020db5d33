"""`switchkd eval`."""

from typing import Any

import click

from switchkd.cli.common import config_option, default_device, echo, importing, lines_of, quiet_libraries
from switchkd.cli.options import GroupedCommand, GroupedOption, options_of
from switchkd.counting import counted
from switchkd.pipelines.evaluation.options import BENCHMARKS, AnswerOptions, BenchmarkOptions, EvalOptions
from switchkd.pipelines.options import fields_of

EXACT_MATCH = "exact-match"
# Options that only one kind of task has.
_FILE_ONLY = ("data", "images")
_BENCHMARK_ONLY = ("benchmarks", "score_only", "retry_failed")


def _list_benchmarks(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from switchkd.pipelines.evaluation.benchmarks.registry import describe

        echo(describe())
        ctx.exit()


@click.command("eval", cls=GroupedCommand)
@config_option
@options_of(
    EvalOptions,
    leave_out=(*fields_of(AnswerOptions),),
    changes={"model": {"required": False}, "data": {"required": False}},
)
@options_of(BenchmarkOptions, leave_out=(*fields_of(AnswerOptions),), changes={"benchmarks": {"required": False}})
@click.option(
    "--task",
    cls=GroupedOption,
    group=BENCHMARKS,
    multiple=True,
    default=(EXACT_MATCH,),
    show_default=True,
    help="A benchmark as NAME or NAME:SPLIT (repeatable), `all` for the paper's ten, or exact-match on --data.",
)
@click.option(
    "--list",
    cls=GroupedOption,
    group=BENCHMARKS,
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_benchmarks,
    help="List the benchmarks, where their data can be had and which files they need, and exit.",
)
@options_of(AnswerOptions, changes={"max_new_tokens": {"required": False}})
def command(task: tuple[str, ...], **options: Any) -> None:
    """Score a model: on the ten benchmarks of the paper, or by exact match on a data file.

    Decoding is greedy. Answers are stored; after an interruption the same command resumes and repeats no question.
    """
    exact = EXACT_MATCH in task
    if exact and len(task) > 1:
        raise click.UsageError(f"{EXACT_MATCH} is a task of its own: run the benchmarks in another command")
    needed = ("model", "data") if exact else ("benchmarks",) if options["score_only"] else ("model", "benchmarks")
    if missing := [name for name in needed if options[name] is None]:
        raise click.UsageError(f"--task {task[0]} needs --{missing[0]}")
    other = _BENCHMARK_ONLY if exact else _FILE_ONLY
    if given := [name for name in other if options[name]]:
        raise click.UsageError(f"--{given[0].replace('_', '-')} does not go with --task {task[0]}")
    options = {name: value for name, value in options.items() if name not in other}
    if options["max_new_tokens"] is None:
        del options["max_new_tokens"]
    quiet_libraries()
    with importing():
        options["device"] = options["device"] or default_device()
    if exact:
        _exact_match(options)
    else:
        _benchmarks(task, options)


def _exact_match(options: dict[str, Any]) -> None:
    with importing():
        from switchkd.pipelines.evaluation.exact_match import evaluate

    scores = evaluate(EvalOptions(**options))
    sample = "" if scores.limited_to is None else ", a sample"
    echo(
        f"exact match {scores.accuracy:.4f} over {counted(scores.questions, 'question')}{sample}; skipped: "
        f"{lines_of(scores.skipped)}"
    )
    for kind, share in scores.by_type.items():
        echo(f"  {kind:<16} {share:.4f}")
    if scores.baseline is not None:
        found = scores.baseline
        echo(
            f"compared with {found.run}, {found.model}, on the {counted(found.overall.questions, 'question')} that both answered:"
        )
        for kind, row in [("all", found.overall), *found.by_type.items()]:
            low, high = row.interval
            echo(
                f"  {kind:<16} {row.difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}; right only here {row.gained:,}, "
                f"only there {row.lost:,}, of {row.questions:,}"
            )
    echo(f"predictions: {scores.predictions}")


def _benchmarks(tasks: tuple[str, ...], options: dict[str, Any]) -> None:
    with importing():
        from switchkd.pipelines.evaluation.benchmarks.run import run_benchmarks
    from switchkd.pipelines.evaluation.benchmarks.scoreboard import TABLE
    from switchkd.pipelines.run_folder import SCORES

    echo(run_benchmarks(BenchmarkOptions(tasks=tasks, **options)))
    echo(f"scores: {options['output'] / SCORES}, {options['output'] / TABLE}")
