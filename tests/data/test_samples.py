"""Data files: both layouts, what every bad row becomes, file-level errors, and the memory-mapped Arrow behind them."""

import hashlib
import json
import multiprocessing
import operator
import pickle
import re
from pathlib import Path

import pytest
import tiny

from switchkd.data.samples import BadSample, SampleFile, Status, read_row
from switchkd.errors import DataError

GOOD = {"id": "g", "image": "a.png", "conversations": tiny.conversation(("<image>\nwhat is it ?", "a circle"))}


def turns(*pairs):
    return [{"from": who, "value": text} for who, text in pairs]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder, content, name="data.json"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def without_index(sample):
    return sample.id, sample.image, sample.turns, sample.question_type, sample.status, sample.detail


@pytest.mark.parametrize("layout", [json.dumps, lines, lambda rows: "\n\n" + lines(rows).replace("\n", "\n\n")])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_json_list_and_json_lines_give_the_same_samples(tmp_path, layout, bom):
    rows = tiny.rows(4, text_only=(1,), two_turns=(2,))
    samples = SampleFile(write(tmp_path, bom + layout(rows)))
    assert len(samples) == 4
    assert [s.index for s in samples] == [0, 1, 2, 3]
    assert [s.id for s in samples] == ["s0", "t1", "s2", "s3"]
    assert [s.image for s in samples] == ["000.png", None, "002.png", "003.png"]
    assert [s.question_type for s in samples] == ["color", "", "color", "color"]
    assert samples[2].turns == [("what color is it ?", "red"), ("what shape ?", "a circle")]
    assert samples[1].turns == [("what color is it ?", "blue")]
    assert samples.counts_by_status() == {Status.OK: 4}


def test_both_spellings_of_the_roles(tmp_path):
    row = {"conversations": turns(("user", "what ?"), ("assistant", "red"), ("human", "is it ?"), ("gpt", "it is"))}
    assert SampleFile(write(tmp_path, json.dumps([row])))[0].turns == [("what ?", "red"), ("is it ?", "it is")]


def test_ids_of_any_type_become_text_and_a_missing_one_the_row_number(tmp_path):
    ids = [{"id": "x"}, {"id": 7}, {"id": 1.5}, {"id": 0}, {"id": None}, {}]
    rows = [{"conversations": GOOD["conversations"], "image": "a.png"} | named for named in ids]
    assert [s.id for s in SampleFile(write(tmp_path, json.dumps(rows)))] == ["x", "7", "1.5", "0", "4", "5"]


def test_columns_that_no_one_asked_for_are_ignored(tmp_path):
    rows = [GOOD | {"source": "web", "score": 1}, GOOD | {"source": ["web"], "score": None}]
    assert [s.status for s in SampleFile(write(tmp_path, json.dumps(rows)))] == [Status.OK, Status.OK]


def test_text_beyond_ascii_and_line_separators_survive(tmp_path):
    question = "Größe？ 日本語 😀 line\u2028separator\x85next"
    row = {"conversations": tiny.conversation((question, "é"))}
    for name, content in (("a.json", json.dumps([row], ensure_ascii=False)), ("b.json", lines([row]))):
        assert SampleFile(write(tmp_path, content, name))[0].turns == [(question, "é")]
    raw = json.dumps(row, ensure_ascii=False) + "\n"
    assert SampleFile(write(tmp_path, raw * 2, "c.json"))[1].turns == [(question, "é")]


@pytest.mark.parametrize(
    "question", ["<image>\nwhat ?", "what ?\n<image>", "<image>what ?", "what ?", "  <image> what ?  "]
)
def test_the_marker_is_removed_wherever_it_stands(question):
    sample = read_row(GOOD | {"conversations": tiny.conversation((question, " red "))}, 0)
    assert (sample.status, sample.image, sample.turns) == (Status.OK, "a.png", [("what ?", "red")])


def test_a_marker_inside_a_question_or_in_a_later_turn_is_one_image():
    inside = read_row(GOOD | {"conversations": tiny.conversation(("is <image> red ?", "it is"))}, 0)
    assert inside.turns == [("is  red ?", "it is")]
    later = read_row(GOOD | {"conversations": tiny.conversation(("what ?", "a"), ("<image> it ?", "b"))}, 0)
    assert (later.status, later.turns) == (Status.OK, [("what ?", "a"), ("<image> it ?", "b")])
    assert later.placed and not inside.placed


@pytest.mark.parametrize(("image", "expected"), [(["a.png"], "a.png"), ([], None), ("", None), (None, None)])
def test_an_image_in_a_list_and_no_image(image, expected):
    sample = read_row({"image": image, "conversations": tiny.conversation(("what ?", "red"))}, 0)
    assert (sample.status, sample.image) == (Status.OK, expected)


def test_an_empty_answer_is_left_to_the_template():
    assert read_row({"conversations": tiny.conversation(("what ?", ""))}, 0).status is Status.OK


BAD_ROWS = [
    (3, Status.NO_CONVERSATION, "expected an object, found int"),
    (None, Status.NO_CONVERSATION, "expected an object, found NoneType"),
    ({}, Status.NO_CONVERSATION, "no list 'conversations' or 'messages' with at least one turn"),
    ({"conversations": []}, Status.NO_CONVERSATION, "no list 'conversations' or 'messages' with at least one turn"),
    ({"conversations": "hi"}, Status.NO_CONVERSATION, "no list 'conversations' or 'messages' with at least one turn"),
    ({"conversations": ["hi"]}, Status.BAD_TURN, "turn 0 needs 'from' and a text 'value', or 'role' and 'content'"),
    (
        {"conversations": [{"value": "hi"}]},
        Status.BAD_TURN,
        "turn 0 needs 'from' and a text 'value', or 'role' and 'content'",
    ),
    (
        {"conversations": turns(("human", "hi"), ("gpt", None))},
        Status.BAD_TURN,
        "turn 1 needs 'from' and a text 'value', or 'role' and 'content'",
    ),
    (
        {"conversations": turns(("human", "hi \ud83d"), ("gpt", "x"))},
        Status.BAD_TURN,
        "turn 0 holds half of a surrogate pair",
    ),
    (
        {"conversations": turns(("human", "hi"), ("system", "be good"), ("gpt", "x"))},
        Status.UNKNOWN_ROLE,
        "turn 1 is from 'system'; known: human, user, gpt, assistant, system (first)",
    ),
    (
        {"conversations": turns(("human", "hi"), (None, "x"))},
        Status.UNKNOWN_ROLE,
        "turn 1 is from None; known: human, user, gpt, assistant, system (first)",
    ),
    ({"conversations": turns(("gpt", "hi"))}, Status.ROLES_OUT_OF_ORDER, "turn 0 is from 'gpt'"),
    (
        {"conversations": turns(("human", "hi"), ("user", "hi"))},
        Status.ROLES_OUT_OF_ORDER,
        "turn 1 is from 'user'",
    ),
    (
        {"conversations": turns(("human", "hi"), ("gpt", "x"), ("human", "and"))},
        Status.ROLES_OUT_OF_ORDER,
        "the last turn is a question without an answer",
    ),
    (GOOD | {"image": ["a.png", "b.png"]}, Status.SEVERAL_IMAGES, "markers <image>: 1, images: 2"),
    (
        GOOD | {"conversations": tiny.conversation(("<image><image> hi", "x"))},
        Status.SEVERAL_IMAGES,
        "markers <image>: 2, images: 1",
    ),
    (
        GOOD | {"conversations": tiny.conversation(("<image> hi", "x"), ("<image> hi", "x"))},
        Status.SEVERAL_IMAGES,
        "markers <image>: 2, images: 1",
    ),
    (  # removing a marker leaves another
        GOOD | {"conversations": tiny.conversation(("<im<image>age> hi", "x"))},
        Status.SEVERAL_IMAGES,
        "markers <image>: 2, images: 1",
    ),
    (
        {"conversations": tiny.conversation(("<image> hi", "x"))},
        Status.MARKER_WITHOUT_IMAGE,
        "<image> in a row that names no image",
    ),
    (
        GOOD | {"conversations": tiny.conversation(("hi", "an <image>"))},
        Status.MARKER_WITHOUT_IMAGE,
        "turn 1, an answer, holds <image>",
    ),
    (GOOD | {"image": 3}, Status.IMAGE_MISSING, "image should be a path, found int"),
    (GOOD | {"image": [{"file": "a.png"}]}, Status.IMAGE_MISSING, "image should be a path, found dict"),
]


@pytest.mark.parametrize(("row", "status", "detail"), BAD_ROWS)
def test_a_bad_row_says_why_and_which(row, status, detail):
    sample = read_row(row, 7)
    assert (sample.index, sample.status, sample.detail) == (7, status, detail)
    assert (sample.image, sample.turns) == (None, [])
    with pytest.raises(BadSample, match=re.escape(f"{status.label}: row 7: {detail}")) as caught:
        sample.require_ok()
    assert caught.value.status is status


def test_every_status_of_a_row_is_covered():
    decided_later = {
        Status.IMAGE_OUTSIDE_FOLDER,
        Status.IMAGE_UNREADABLE,
        Status.IMAGE_TOO_LARGE,
        Status.TOO_LONG,
        Status.NOTHING_SUPERVISED,
    }
    assert {status for _, status, _ in BAD_ROWS} == set(Status) - decided_later - {Status.OK}


def test_the_numbers_of_statuses_stay():
    """Stores keep them."""
    assert [status.label for status in Status] == [
        "ok",
        "no_conversation",
        "bad_turn",
        "unknown_role",
        "roles_out_of_order",
        "several_images",
        "marker_without_image",
        "image_outside_folder",
        "image_missing",
        "image_unreadable",
        "image_too_large",
        "too_long",
        "nothing_supervised",
    ]
    assert list(Status) == list(range(13))


def test_a_bad_row_keeps_its_id_and_type():
    sample = read_row({"id": 12, "question_type": "color", "conversations": []}, 3)
    assert (sample.id, sample.question_type) == ("12", "color")
    assert read_row("text", 3).id == "3"


@pytest.mark.parametrize("layout", [json.dumps, lines])
def test_bad_rows_never_shift_the_numbers_of_good_ones(tmp_path, layout):
    rows = [GOOD | {"id": "first"}, *(row for row, _, _ in BAD_ROWS), GOOD | {"id": "last"}]
    samples = SampleFile(write(tmp_path, layout(rows)))
    assert len(samples) == len(BAD_ROWS) + 2
    assert [s.index for s in samples] == list(range(len(rows)))
    assert [s.status for s in samples][1:-1] == [status for _, status, _ in BAD_ROWS]
    assert (samples[len(rows) - 1].id, samples[len(rows) - 1].status) == ("last", Status.OK)
    counts = samples.counts_by_status()
    assert counts[Status.OK] == 2
    assert sum(counts.values()) == len(rows)
    assert [without_index(s) for s in samples] == [without_index(read_row(row, i)) for i, row in enumerate(rows)]


def test_half_a_surrogate_pair_stops_no_file(tmp_path):
    """JSON may spell one, UTF-8 and Arrow cannot hold it."""
    odd = GOOD | {"id": "x\ud800", "image": "\ud800.png", "question_type": "\udfff"}
    sample = SampleFile(write(tmp_path, json.dumps([odd])))[0]
    assert (sample.id, sample.image, sample.question_type) == ("x\\ud800", "\\ud800.png", "\\udfff")


def file_error(path):
    with pytest.raises(DataError) as caught:
        SampleFile(path)
    return str(caught.value)


def test_no_such_file(tmp_path):
    path = tmp_path / "none.json"
    assert file_error(path).startswith(f"no data file {path}: --data takes LLaVA-style JSON or JSON Lines, a .parquet")


def test_broken_json_lines_name_the_line(tmp_path):
    path = write(tmp_path, json.dumps(GOOD) + "\n\n" + '{"id": \n' + json.dumps(GOOD) + "\n")
    message = file_error(path)
    assert message.startswith(f"{path}, line 3, is not JSON: Expecting value: line 2 column 1 (char 8)")
    assert message.endswith("expected a list of rows or one JSON object a line")


@pytest.mark.parametrize("content", ["", "[", "[{}", "hello", "3 4", "[] []"])
def test_broken_json_names_the_file(tmp_path, content):
    path = write(tmp_path, content)
    assert file_error(path).startswith(f"{path} is not JSON: ")


@pytest.mark.parametrize("content", [b'[{"id": "\xe9"}]', lines([GOOD] * 500).encode() + b'{"id": "\xe9"}\n'])
def test_a_file_that_is_not_utf8(tmp_path, content):
    path = write(tmp_path, content)
    assert file_error(path).startswith(f"{path} is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9")


@pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("3", "int"), ('"text"', "str"), ("null", "NoneType")])
def test_a_file_without_a_list_of_rows(tmp_path, content, kind):
    path = write(tmp_path, content)
    assert file_error(path) == f"{path} should hold a list with at least one row, found {kind}"


def test_no_usable_row(tmp_path):
    path = write(tmp_path, json.dumps([{"conversations": []}, 3]))
    expected = f"{path} has no usable row among 2; row 0: no_conversation, no list 'conversations' or 'messages' with"
    assert file_error(path).startswith(expected)


def many(tmp_path, count):
    return SampleFile(write(tmp_path, json.dumps([GOOD | {"id": i} for i in range(count)]), f"{count}.json"))


def test_rows_live_in_an_arrow_file_on_disk(tmp_path):
    samples = many(tmp_path, 50)
    (file,) = samples._table.cache_files
    arrow = Path(file["filename"])
    assert arrow.suffix == ".arrow"
    assert arrow.is_file()


def test_a_pickled_sample_file_holds_no_row(tmp_path):
    small, large = many(tmp_path, 1), many(tmp_path, 3000)
    assert len(pickle.dumps(large)) < len(pickle.dumps(small)) + 100
    assert pickle.loads(pickle.dumps(large))[2999] == large[2999]


def test_a_spawned_process_reads_the_same_rows(tmp_path):
    samples = many(tmp_path, 50)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(operator.itemgetter(49), (samples,)) == samples[49]


def test_a_second_opening_reads_the_arrow_file_not_the_json(tmp_path, monkeypatch):
    path = write(tmp_path, json.dumps([GOOD | {"id": "once"}]))
    first = SampleFile(path)
    monkeypatch.setattr("switchkd.data.containers.JsonRows.rows", lambda self: pytest.fail("read the JSON again"))
    assert list(SampleFile(path)) == list(first)


def test_an_edited_file_is_read_anew(tmp_path):
    path = write(tmp_path, json.dumps([GOOD | {"id": "old"}]))
    before = SampleFile(path)
    write(tmp_path, json.dumps([GOOD | {"id": "new"}]))
    after = SampleFile(path)
    assert (before[0].id, after[0].id) == ("old", "new")
    assert before.fingerprint != after.fingerprint


def test_the_fingerprint_is_the_sha256_of_the_file(tmp_path):
    path = write(tmp_path, json.dumps([GOOD]))
    assert SampleFile(path).fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_copy_elsewhere_has_the_same_fingerprint_and_rows(tmp_path):
    text = json.dumps([GOOD | {"id": "copied"}])
    first, second = (SampleFile(write(tmp_path, text, name)) for name in ("one.json", "two.json"))
    assert first.fingerprint == second.fingerprint
    assert list(first) == list(second)
