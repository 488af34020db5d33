"""Mixture files: what is read, and what is refused by the name of the entry."""

import pytest
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.errors import ConfigError, DataError
from switchkd.pipelines.mixture import mixture_at, read_mixture


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "m.yaml").write_text(text)
        return tmp_path / "m.yaml"

    return write


def test_an_entry_has_the_name_of_its_file_and_the_store_of_its_name(write, tmp_path):
    mixture = read_mixture(
        write("- {data: a/x.json, weight: 1e-1}\n- {data: v1.5, cap: '5', name: y, store: 's3://b/y.zarr'}\n")
    )
    first, second = mixture.entries
    assert (first.name, first.weight, first.cap, second.name, second.cap) == ("x", 0.1, None, "y", 5)
    assert mixture.store_of(first, tmp_path) == tmp_path / "x.zarr"
    assert mixture.store_of(first, "s3://b/stores/") == "s3://b/stores/x.zarr"
    assert mixture.store_of(second, tmp_path) == "s3://b/y.zarr"
    assert read_mixture(write("- data: v1.5")).entries[0].name == "v1.5"
    assert mixture_at(tmp_path / "data.json") is None


@pytest.mark.parametrize(
    ("entry", "usable", "drawn"),
    [
        ("", 7, 7),
        ("weight: 2.5", 4, 10),
        ("weight: 0.01", 4, 1),
        ("weight: 1", 0, 0),
        ("cap: 3", 7, 3),
        ("cap: 9", 7, 7),
    ],
)
def test_samples_of_an_epoch(write, entry, usable, drawn):
    assert read_mixture(write("- data: x.json\n" + f"  {entry}" * bool(entry))).entries[0].drawn(usable) == drawn


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "should be a list of entries, as `- data: FILE`, found NoneType"),
        ("[]", "found an empty list"),
        ("data: x.json", "found dict"),
        ("- 3", "entry 1: expected keys and values"),
        ("a: : b", "cannot be read: mapping values are not allowed here"),
        ("- images: x", "entry 1: the key data is needed"),
        (
            "- data: x.json\n- {data: y.json, wieght: 2}",
            r"entry 2 \(y.json\): no key 'wieght'; there are data, name, images",
        ),
        ("- {data: x.json, weight: 0}", r"entry 1 \(x.json\): weight cannot be 0: it should be a number above 0"),
        ("- {data: x.json, weight: -1}", "weight cannot be -1"),
        ("- {data: x.json, weight: .nan}", "weight cannot be nan"),
        ("- {data: x.json, weight: .inf}", "weight cannot be inf"),
        ("- {data: x.json, cap: 0}", "cap cannot be 0: it should be a whole number at least 1"),
        ("- {data: x.json, cap: 5, weight: 2}", "weight and cap both say how many"),
        ("- {data: x.json, name: a/b}", "name 'a/b' cannot be that of a store"),
        (
            "- data: x.json\n- {data: ./x.json, weight: 2}",
            "entries 1 and 2 have the same data file .*`weight: 2` takes each",
        ),
        ("- data: a/x.json\n- data: b/x.json", "entries 1 and 2 have the same name x: .* another `name`"),
        ("- {data: x.json, store: s.zarr}\n- {data: y.json, store: s.zarr/}", "entries 1 and 2 have the same store"),
        ("- data: other.yml", "is a mixture itself"),
    ],
)
def test_what_is_refused(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_mixture(write(text))


def test_the_entry_is_named_in_any_error_of_its_own(write):
    mixture = read_mixture(write("- data: x.json"))
    with pytest.raises(DataError, match=r"m.yaml, entry x: gone$"), mixture.naming(mixture.entries[0]):
        raise DataError("gone")


@pytest.mark.parametrize(
    "command",
    [
        ["data", "check", "{m}"],
        ["train", "--student", "{c}", "--data", "{m}", "--output", "{c}/run"],
        ["cache-teacher", "--teacher", "{c}", "--data", "{m}", "--out", "{c}/stores"],
    ],
)
def test_a_missing_file_of_an_entry_is_told_at_once(write, tmp_path, command):
    """Exit code 2, before a model is opened: the checkpoint is none."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "x.json").write_text("[]")
    words = [word.format(m=tmp_path / "m.yaml", c=tmp_path) for word in command]
    write(f"- data: {tmp_path}/x.json\n- data: {tmp_path}/gone.json\n")
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, "entry gone: no data file" in done.output) == (2, True), done.output
    write(f"- data: {tmp_path}/x.json\n  images: {tmp_path}/gone\n")
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, "entry x: no image folder" in done.output) == (2, True), done.output


def test_the_stores_of_a_mixture_lie_in_a_folder(write, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "x.json").write_text("[]")
    mixture = write(f"- data: {tmp_path}/x.json\n")
    words = ["cache-teacher", "--teacher", str(tmp_path), "--data", str(mixture), "--out", str(tmp_path / "s.zarr")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "--out takes the folder of the stores" in done.output


def test_a_command_that_takes_one_data_file_says_so(write, tmp_path):
    from switchkd.data.samples import SampleFile

    with pytest.raises(DataError, match="is a mixture of data files, and one data file is needed here"):
        SampleFile(write("- data: x.json"))
