"""Control characters of data, file names and models' words reach neither the terminal nor Markdown, by whatever command."""

import io
import json
import logging
import sys
import unicodedata

import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.common import quiet_libraries
from switchkd.cli.main import main
from switchkd.pipelines.release.model_card import _in_code, _rows
from switchkd.printable import markdown_text, printable

HOSTILE = {
    "colour": "\x1b[31m",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "C1": "\x9b31m",
    "return": "good\rbad",
    "backspace": "abc\b\b\bxyz",
    "bell": "\a",
    "null": "a\0b",
    "delete": "\x7f",
    "bidi": "a\u202eb\u2066c",
    "separator": "a\u2028b",
}
EVERY = "".join(HOSTILE.values())


def unsafe(text):
    return [
        char
        for char in text
        if (unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n") or char in "\u202e\u2066\u2028"
    ]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_control_characters_are_escaped(text):
    assert unsafe(text) and not unsafe(printable(text))


def test_every_control_character_is_escaped_and_other_text_is_not():
    for code in range(0x3000):
        char = chr(code)
        if unicodedata.category(char) == "Cc" and char not in "\t\n":
            assert printable(char) == f"\\x{code:02x}"
    assert printable("\ud800") == "\\ud800"
    ordinary = "Zeile\n\tTab, 漢字, 👩\u200d🚀, é, …"
    assert printable(ordinary) == ordinary


def test_a_long_text_is_cut_and_told():
    assert printable("x" * 1000, 10) == "x" * 10 + "… (1,000 characters)"
    assert printable("x" * 10, 10) == "x" * 10


def run(*words):
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert not unsafe(done.output), unsafe(done.output)
    return done


def hostile_rows(text):
    return [
        {"id": text, "question_type": text, "conversations": tiny.conversation((f"what {text} ?", f"red {text}"))},
        {"id": 1, "image": f"{text}.png", "conversations": tiny.conversation(("what ?", "red"))},
        {
            "id": 2,
            "image": "a.png",
            f"key{text}.png": f"{text}.png",
            "conversations": tiny.conversation(("what ?", "red")),
        },
        {"id": 3, f"key{text}": f"{text}.png", "conversations": tiny.conversation(("what ?", "red"))},
        {"id": 4, "conversations": [{"from": text, "value": text}]},
        {"id": 5, "conversations": [{"role": "user", "content": [{"type": text}]}]},
    ]


@pytest.mark.parametrize("text", [*HOSTILE.values(), EVERY], ids=[*HOSTILE, "every"])
def test_no_command_about_data_prints_one(text, teacher, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(hostile_rows(text)))
    tiny.image(tmp_path / "images/a.png", 0)
    done = run(
        "data", "check", tmp_path / "a.json", "--images", tmp_path / "images", "--model", teacher, "--template", "qa"
    )
    assert done.exit_code == 0
    done = run("data", "show", tmp_path / "a.json", "--model", teacher, "--template", "qa", "-n", 6)
    assert done.exit_code == 0 and "row 5" in done.output


@pytest.mark.parametrize("strict", [False, True])
def test_capture_prints_none(strict, teacher, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(hostile_rows(EVERY)))
    tiny.image(tmp_path / "images/a.png", 0)
    words = ["cache-teacher", "--teacher", teacher, "--data", tmp_path / "a.json", "--images", tmp_path / "images"]
    words += ["--out", tmp_path / "s.zarr", "--template", "qa", "--max-skipped", 0 if strict else 1]
    done = run(*words)
    assert done.exit_code == (2 if strict else 0), done.output


@pytest.mark.parametrize("text", [text for text in HOSTILE.values() if "\0" not in text])
def test_errors_about_files_print_none(text, teacher, tmp_path):
    for words in (
        ["data", "check", tmp_path / f"{text}.json"],
        ["data", "check", tmp_path / f"{text}.parquet"],
        ["chat", "--model", teacher, "--image", tmp_path / f"{text}.png", "--question", "what ?"],
    ):
        assert run(*words).exit_code == 2
    (tmp_path / f"{text}.json").write_text("[")
    assert run("data", "check", tmp_path / f"{text}.json").exit_code == 2


def test_a_models_words_are_escaped(teacher, monkeypatch):
    def ask(self, words, heard):
        for piece in EVERY:  # also where a sequence comes piece by piece
            heard(piece)
        return EVERY

    monkeypatch.setattr("switchkd.pipelines.release.chat.Chat.ask", ask)
    done = run("chat", "--model", teacher, "--template", "qa", "--question", "what ?")
    assert done.exit_code == 0 and "\\x1b[31m" in done.output


def test_log_lines_are_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    quiet_libraries()
    logging.getLogger("switchkd.x").warning("row %s", EVERY)
    assert "row" in written.getvalue() and not unsafe(written.getvalue())


@pytest.mark.parametrize(
    "name", ["a](http://x) [b", "<script>", "a|b", "a\nb\n# c", "`code`", "**bold**", "\x1b[31m", "![x](y)", "a\\|b"]
)
def test_names_are_no_markdown(name):
    table = _rows({name: name}).splitlines()
    assert len(table) == 3 and not unsafe(table[2])
    plain = table[2].replace("\\\\", "").replace("\\|", "")
    assert plain.count("|") == 3
    for mark in "[]<>`*#":
        assert mark not in markdown_text(name).replace(f"\\{mark}", "")


@pytest.mark.parametrize("name", ['x"); import os; ("', "a\nb", "a\\", "``` x", "\x1b[31m"])
def test_a_name_in_the_cards_code_stays_text(name):
    code = f'"{_in_code(name)}"'
    assert "\n" not in code
    assert eval(code) == printable(name)
