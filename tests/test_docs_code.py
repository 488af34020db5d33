"""Every code block of README and docs is run, or says why it cannot be; every command they name exists. See docs_pages.py.

The folder in which a page's blocks run holds two tiny checkpoints, TEACHER and STUDENT, images/ with 000.png …, and one data file
under the names that the pages use. `switchkd` and `python` are answered by a warm server (warm_switchkd.py), all else is bash's.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import tiny
import yaml
from docs_pages import LANGUAGES, PAGES, ROOT, blocks, code_spans, commands
from warm_programs import warm_programs

pytest.importorskip("matplotlib", reason="the documents draw pictures: extra `viz`")

from switchkd.cli.main import main

DATA_FILES = ("data.json", "llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json")
# Placeholders of documents: an option with such a value is not held against its type.
_PLACEHOLDER = re.compile(r"[$…<>\[\]]|\.\.\.|^[A-Z_/]+$")
# Options in backticks that belong to other programs.
FOREIGN_OPTIONS = {"--gres", "--nnodes", "--no-deps", "--headless", "--signals-to-handle"}
SECONDS = 120  # for one block


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher, student):
    """A folder as a page's reader has it, to be copied for every page."""
    folder = tmp_path_factory.mktemp("docs") / "place"
    shutil.copytree(teacher, folder / "TEACHER")
    shutil.copytree(student, folder / "STUDENT")
    data = tiny.data(folder, tiny.rows(6, text_only=(1,), two_turns=(2,)))
    for name in DATA_FILES:
        if name != data.name:
            shutil.copy(data, folder / name)
    return folder


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory):
    """A folder for PATH with a `switchkd` and a `python` that start at once."""
    with warm_programs(tmp_path_factory.mktemp("bin")) as folder:
        yield folder


def run_page(page: Path, folder: Path, bin_folder: Path, slow: bool) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    for block in blocks(page):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.content)
        if block.language not in ("bash", "python") or block.directive == "not run" or (block.directive and not slow):
            continue
        program = ["bash", "-euo", "pipefail", "-s"] if block.language == "bash" else ["python", "-"]
        done = subprocess.run(
            program,
            input=block.content,
            cwd=folder,
            env=environment,
            executable=None if block.language == "bash" else bin_folder / "python",
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if done.returncode:
            told = f"{done.stdout}\n{done.stderr}"[-3000:]
            pytest.fail(
                f"{block} ends with {done.returncode}:\n\n{block.content}\n{told}\n"
                "Mend the block, or mark it: <!-- not run: REASON --> before its fence (tests/helpers/docs_pages.py)",
                pytrace=False,
            )


@each_page
def test_the_blocks_run(page, place, bin_folder, tmp_path):
    run_page(page, shutil.copytree(place, tmp_path / "reader"), bin_folder, slow=False)


SLOW_PAGES = [page for page in PAGES if any(block.directive == "slow" for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_PAGES, ids=name_of)
def test_the_slow_blocks_run(page, place, bin_folder, tmp_path):
    run_page(page, shutil.copytree(place, tmp_path / "reader"), bin_folder, slow=True)


@each_page
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        assert not block.language or block.language in LANGUAGES, f"{block}: language {block.language!r}"
        if not block.language:  # an indented block, such as a tree of files, or a fence that was left bare
            calls = [
                line for line in block.content.splitlines() if re.match(r"\s*(switchkd|make|pip|python|\$) ", line)
            ]
            assert not calls, f"{block}: put commands into a ```bash block, so that they are run: {calls[0]}"
        if block.directive:
            assert block.reason and block.language in ("bash", "python"), f"{block}: {block.directive} says no reason"
        if block.language == "yaml":
            yaml.safe_load(block.content)
        if block.language == "json":
            json.loads(block.content)


@each_page
def test_every_command_exists(page):
    wrong = []
    for block in blocks(page):
        if block.language in ("bash", "console"):
            wrong += [f"{block}: {p}" for words in commands(block.content, "switchkd") for p in problems(words)]
            wrong += [f"{block}: {p}" for words in commands(block.content, "make") for p in make_problems(words)]
    for span in code_spans(page):
        if span.startswith("switchkd "):
            wrong += [f"`{span}`: {problem}" for problem in problems(span.split()[1:], whole=False)]
        elif span.startswith("make "):
            wrong += [f"`{span}`: {problem}" for problem in make_problems(span.split()[1:])]
        elif re.match(r"--\w", span):
            option = re.match(r"--[\w-]+", span)[0]
            if option not in all_options() | FOREIGN_OPTIONS:
                wrong.append(f"`{span}`: no command has {option}")
    assert not wrong, f"{page.relative_to(ROOT)}:\n" + "\n".join(wrong)


@each_page
def test_every_function_exists(page):
    """`switchkd.kneedle.kneedle` in backticks is a module, class, function or method of that name."""
    for span in code_spans(page):
        if match := re.fullmatch(r"(switchkd(?:\.\w+)+)(?:\(.*\))?", span):
            assert resolves(match[1]), f"{page.relative_to(ROOT)}: there is no {match[1]}"


def resolves(name: str) -> bool:
    """Whether a dotted name can be imported."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def problems(words: list[str], whole: bool = True) -> list[str]:
    """Return what is wrong with the words after `switchkd`: no such command, option, choice, number; an option that lacks.

    `whole` is False for a command that is only mentioned, which need not have its required options or values.
    """
    command, context, words = main, click.Context(main, info_name="switchkd"), list(words)
    while isinstance(command, click.Group):
        if not words or words[0] in ("--help", "-h", "--version", "…", "..."):
            return []
        name = words.pop(0)
        child = command.get_command(context, name)
        if child is None:
            return [f"there is no command {context.command_path} {name}"]
        command, context = child, click.Context(child, info_name=name, parent=context)
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    unknown = [w for w in words if re.match(r"--\w", w) and w.partition("=")[0] not in known]
    if unknown:
        return [f"{context.command_path} has no option {word}" for word in unknown]
    if not whole:
        return []
    try:
        values, rest, order = command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        return [error.format_message()]
    found = []
    for parameter in order:
        value = values.get(parameter.name)
        if value is None or parameter.nargs != 1 or parameter.multiple or _PLACEHOLDER.search(str(value)):
            continue
        try:
            parameter.type_cast_value(context, value)
        except click.UsageError as error:
            found.append(f"{context.command_path} {parameter.opts[0]}: {error.format_message()}")
    open_ended = "config" in values or any(
        _PLACEHOLDER.search(w) and w in ("…", "...", "$@", "[OPTIONS]") for w in words
    )
    if not open_ended and not {"help", "list"} & values.keys():  # these print and exit
        missing = [p.opts[-1] for p in command.params if p.required and values.get(p.name) in (None, ())]
        found += [f"{context.command_path} lacks {name}" for name in missing]
    found += [f"{context.command_path} takes no {word}" for word in rest if not _PLACEHOLDER.search(word)]
    return found


def all_options() -> set[str]:
    """Every option of every command."""

    def of(command):
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)
        for name in command.list_commands(None) if isinstance(command, click.Group) else ():
            yield from of(command.get_command(None, name))

    return set(of(main)) | {"--help", "--version"}


def make_problems(words: list[str]) -> list[str]:
    """Return what is wrong with the words after `make`, in this tree or in a project of `switchkd new`."""
    files = (ROOT / "Makefile", ROOT / "pipelines/project/templates/Makefile")
    targets = {
        name for file in files for name in re.findall(r"^(?:@{\w+})?([a-z0-9-]+):", file.read_text(), re.MULTILINE)
    }
    return [f"the Makefile has no target {word}" for word in words if "=" not in word and word not in targets]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("switchkd distill", "there is no command switchkd distill"),
        ("switchkd store polish x", "there is no command switchkd store polish"),
        ("FOO=1 srun switchkd train --turbo 9", "switchkd train has no option --turbo"),
        ("switchkd demo --seed two", "'two' is not a valid integer"),
        ("switchkd demo | switchkd eval --model m --data d", "switchkd eval lacks --output"),
        ("switchkd train --student s --data d \\\n  --output o --objective poem", "'poem' is not one of"),
        ("switchkd demo extra", "switchkd demo takes no extra"),
        ("switchkd demo --seed", "requires an argument"),
    ],
)
def test_a_wrong_command_is_seen(line, problem):
    (found,) = [p for words in commands(line, "switchkd") for p in problems(words)]
    assert problem in found


def test_right_commands_pass():
    text = (
        "# switchkd nonsense\nswitchkd train …\nX=$(switchkd store info s.zarr) && switchkd demo --seed $SEED > 'a b'"
    )
    assert [problems(words) for words in commands(text, "switchkd")] == [[], [], []]


def test_a_block_that_fails_is_told(place, bin_folder, tmp_path):
    text = "```bash\nswitchkd store info TEACHER | cat\n```\n"
    failing = tmp_path / "page.md"
    failing.write_text(text)
    with pytest.raises(pytest.fail.Exception, match=r"no teacher store at TEACHER"):
        run_page(failing, place, bin_folder, slow=False)
