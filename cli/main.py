"""The command line: parse options, run a pipeline, print. Commands are imported only when used, so that help is fast."""

import importlib
import signal
from typing import Any, NoReturn

import click

import switchkd
from switchkd.errors import SwitchKDError, original_message
from switchkd.printable import printable

# name → (module of switchkd.cli, short help)
COMMANDS = {
    "new": ("new", "Write a project folder for a pair of models: configurations and commands."),
    "data": ("data", "Check a data file, or print samples, before a model is run over it."),
    "cache-teacher": ("cache_teacher", "Store a teacher's output at every supervised position."),
    "train": ("train", "Train a student from a teacher store."),
    "eval": ("evaluate", "Score a model on the paper's benchmarks or on a data file."),
    "convert": ("convert", "Rewrite a checkpoint in another project's layout."),
    "models": ("models", "List the model families that can teach and learn."),
    "init-student": ("init_student", "Assemble a student from a vision tower and a language model."),
    "ablate": ("ablate", "Train and judge a matrix of students from one recipe."),
    "store": ("store", "Describe, verify, repair or audit a teacher store."),
    "report": ("report", "Write a page about runs, evaluations and stores."),
    "export": ("export", "Write a finished run as a folder for transformers, vLLM or a hub."),
    "chat": ("chat", "Talk to a model about an image."),
    "doctor": ("doctor", "Report what this machine has and what is missing for which command."),
    "attend": ("attend", "Show where in an image models attend while they answer."),
    "demo": ("demo", "See the whole method work on easy-VQA, on a laptop."),
}
INTERRUPTED = 130  # 128 + SIGINT, the shell's convention


def _failure(message: str, exit_code: int) -> click.ClickException:
    """Return the message of an error for the user; the command line ends with its exit code."""
    error = click.ClickException(printable(message))
    error.exit_code = exit_code  # type: ignore[misc]
    return error


class Commands(click.Group):
    """The group of all commands; converts every expected error to a message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"switchkd.cli.{COMMANDS[name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(ctx)
        except SwitchKDError as error:
            raise _failure(original_message(error), error.exit_code) from error
        except KeyboardInterrupt:
            raise _failure("interrupted; run the same command again to go on where it stopped", INTERRUPTED) from None
        except OSError as error:
            raise _failure(f"{error}; what was finished is safe, run the same command again to go on", 1) from error
        except MemoryError as error:
            advice = "free memory, or use fewer --workers, and run the same command again; what was finished is safe"
            raise _failure(f"out of memory: {advice}", 1) from error
        except RuntimeError as error:
            raise _failure(_out_of_memory(error), 1) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(switchkd.__version__, prog_name="switchkd")
def main() -> None:
    """Distil a small vision-language model from a large one with Switch-KD, paying for the large one once.

    First `cache-teacher` on an inference node, then `train` on a training node; `demo` shows both on this machine.
    """


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _out_of_memory(error: RuntimeError) -> str:
    """Return advice if the device's memory ran out; any other RuntimeError is a bug of switchkd and keeps its traceback."""
    if "out of memory" in str(error) or "can't allocate memory" in str(error):
        advice = "lower --batch-size; training also has --student-checkpointing and --teacher-checkpointing"
        return f"out of memory: {advice} ({str(error).splitlines()[0]})"
    raise error
