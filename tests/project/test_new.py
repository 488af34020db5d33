"""`switchkd new`: what it writes can be run to the end as it is, and a pair that needs other settings gets them with the reason."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
import tiny
import yaml
from click.testing import CliRunner
from warm_programs import warm_programs

from switchkd.cli.main import main
from switchkd.errors import CheckpointError, ConfigError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.evaluation.options import EvalOptions
from switchkd.pipelines.project.options import NewOptions
from switchkd.pipelines.project.pathway import choose_pathway
from switchkd.pipelines.project.project import FILES, new_project
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.stages import with_stage

BESIDE = Path(sys.executable).parent  # torchrun and switchkd of this environment


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher, student):
    """A folder whose name has what shells, make and YAML treat specially, with a pair of models and data."""
    folder = tmp_path_factory.mktemp("new") / "it's $HOME #1: a & b"
    shutil.copytree(teacher, folder / "the teacher")
    shutil.copytree(student, folder / "the student")
    tiny.data(folder, tiny.rows(12, text_only=(3,), two_turns=(5,)))
    return folder


def given(place, **changed):
    paths = {"teacher": place / "the teacher", "student": place / "the student", "data": place / "data.json"}
    paths |= {"images": place / "images", "eval_data": place / "data.json"}
    return NewOptions(**(paths | {"template": "qa", "global_batch": 8, "gpus": 1} | changed))


def words_of(options):
    named = {name: value for name, value in vars(options).items() if name != "out" and value not in (None, False)}
    return ["new", str(options.out), *(str(w) for n, v in named.items() for w in ("--" + n.replace("_", "-"), v))]


def run(*command, folder, path, **environment):
    # Under `make test` these would make the project's make a part of that one.
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True,
        env=kept | {"OMP_NUM_THREADS": "1", "PATH": f"{path}:{os.environ['PATH']}"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_all_runs_to_a_report_and_again_changes_nothing(place, tmp_path):
    out = tmp_path / "project"
    (tmp_path / "bin").mkdir()
    with warm_programs(tmp_path / "bin") as path:
        told = run("switchkd", *words_of(given(place, out=out)), folder=tmp_path, path=path)
        assert set(FILES.values()) == {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
        assert all(name in told for name in FILES.values())
        listed = run("make", folder=out, path=path)
        targets = [line.split()[0] for line in listed.splitlines()]
        assert targets == ["help", "all", "check", "estimate", "cache", "verify", "train", "eval", "baseline", "report"]
        run("make", "estimate", folder=out, path=path)
        assert not (out / "stores").exists()
        run("make", "all", folder=out, path=path)
        report = (out / "report/report.html").read_text()
        assert "exact" in report and "data.zarr" in report
        before = {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*") if file.is_file()}
        told = run("make", "cache", "train", "verify", folder=out, path=path)
        assert "0 parts written, 1 there before" in told and "was already trained for 2 steps" in told
        assert {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*") if file.is_file()} == before
        run("make", "baseline", folder=out, path=path)
    scores = [json.loads((out / f"eval/{name}/scores.json").read_text()) for name in ("student", "baseline")]
    assert all(score["questions"] == 13 for score in scores), scores
    record = yaml.safe_load((out / "runs/student/run.yaml").read_text())
    assert (record["switch"], record["global_batch"], record["stage"]) == (True, 8, "dft")
    assert yaml.safe_load((out / "runs/baseline/run.yaml").read_text())["objective"] == "sft"


def options_in(file, kind, **more):
    named = {name.replace("-", "_"): value for name, value in yaml.safe_load(file.read_text()).items()}
    return kind(**(with_stage(named["stage"], named) if "stage" in named else named), **more)


def test_the_configurations_hold_options_with_absolute_inputs(place, tmp_path):
    out = tmp_path / "deep/er/project"
    new_project(given(place, out=out, global_batch=96, nodes=2, gpus=3, trust_remote_code=True))
    cached = options_in(out / "cache.yaml", CacheOptions)
    trained, plain = (options_in(out / f"{name}.yaml", TrainOptions) for name in ("train", "baseline"))
    scored = options_in(out / "eval.yaml", EvalOptions)
    for each in (cached, trained, plain, scored):
        assert each.trust_remote_code and each.data == (place / "data.json").resolve()
        assert each.images == (place / "images").resolve()
    assert (str(cached.out), cached.template, plain.template) == ("stores/data.zarr", "qa", "qa")
    assert {str(trained.cache), str(trained.output), str(scored.model)} == {"stores/", "runs/student"}
    assert (trained.objective, plain.objective, plain.switch) == ("dbild-rkl", "sft", False)
    for each in (trained, plain):
        assert (each.global_batch, each.batch_size, each.accumulated(6)) == (96, 16, 1)
        assert each.accumulated(1) == 6 and each.accumulated(3) == 2  # the same file on fewer devices
    assert "#SBATCH --array=0-5\n" in (out / "slurm/cache.sbatch").read_text()
    train = (out / "slurm/train.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in train and "#SBATCH --gres=gpu:3\n" in train and "--nproc-per-node 3 " in train
    assert "#SBATCH --signal=TERM@120\n" in train
    for file in [*out.glob("slurm/*"), out / "README.md", out / "Makefile"]:
        assert "@{" not in file.read_text() and "@@" not in file.read_text()
        if file.parent.name == "slurm":
            subprocess.run(["bash", "-n", file], check=True)


def test_without_held_out_data_nothing_is_scored(place, tmp_path):
    made = new_project(given(place, out=tmp_path / "p", eval_data=None, template=None))
    assert "eval.yaml" not in made.files and not (tmp_path / "p/eval.yaml").exists()
    for name in ("Makefile", "README.md", "slurm/finish.sbatch"):
        assert "eval" not in (tmp_path / "p" / name).read_text()
    assert yaml.safe_load((tmp_path / "p/cache.yaml").read_text())["template"] == "qwen2_base"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"global_batch": 100, "gpus": 8},
            r"100 samples cannot be divided among 1 node x 8 GPUs: pass --global-batch 96",
        ),
        ({"global_batch": 4, "nodes": 2, "gpus": 8}, r"4 samples cannot be divided among 2 .* pass --global-batch 16"),
        ({"template": "no_such"}, "no template 'no_such'"),
        ({"data": "mixture.yaml"}, "is a mixture: make the project for one of its data files"),
    ],
)
def test_what_cannot_be_a_project_is_refused_and_nothing_is_written(place, tmp_path, changed, message):
    if "data" in changed:
        changed = {"data": tmp_path / changed["data"]}
        changed["data"].write_text("- data: a.json\n- data: b.json\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        new_project(given(place, out=tmp_path / "new/project", **changed))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_holds_something_is_left_alone(place, tmp_path):
    (tmp_path / "empty").mkdir()
    new_project(given(place, out=tmp_path / "empty"))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out in ("empty", "empty/README.md", "link"):
        done = CliRunner().invoke(main, words_of(given(place, out=tmp_path / out)))
        assert done.exit_code == 2 and "exists already, and nothing in it is overwritten" in done.stderr
    assert {
        file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and "link" not in str(file)
    } == before


# ---- what a pair needs


def pathway(teacher, student):
    options = TrainOptions(student=student, teacher=teacher, data=Path("d.json"), output=Path("o"))
    return choose_pathway(options, open_checkpoint(teacher), open_checkpoint(student))


def test_a_pair_that_fits_needs_nothing(teacher, student):
    found = pathway(teacher, student)
    assert (found.options, found.reason) == ({}, "")


def test_other_widths_need_an_adapter_and_the_reason_is_written(place, teacher, tmp_path):
    narrow = tiny.checkpoint(tmp_path / "narrow", seed=3, vision=tiny.vision_config(width=16))
    found = pathway(teacher, narrow)
    assert found.options == {"switch_adapter": "linear"} and "Align and VSD both" in found.meaning
    assert "32" in found.reason and "16" in found.reason
    new_project(given(place, out=tmp_path / "p", student=narrow))
    assert options_in(tmp_path / "p/train.yaml", TrainOptions).switch_adapter == "linear"
    assert found.reason.split("(")[0][:60] in (tmp_path / "p/README.md").read_text()


def test_another_tokenizer_needs_a_vocabulary_map(teacher, tmp_path):
    words = [*tiny.WORDS[:5], *reversed(tiny.WORDS[5:]), "green"]
    found = pathway(teacher, tiny.checkpoint(tmp_path / "other", seed=3, words=words))
    assert found.options == {"vocab_map": True} and "the tokenizers differ" in found.reason


def test_a_family_in_which_vsd_teaches_nothing(tmp_path):
    pair = [families.write_checkpoint("gemma3", tmp_path / name, seed) for seed, name in enumerate(("t", "s"))]
    found = pathway(*pair)
    assert found.options == {"switch": False} and "frozen tower" in found.reason


def test_a_pair_that_fits_with_nothing_is_refused_by_its_first_error(teacher, tmp_path):
    moe = families.write_checkpoint("qwen3_vl_moe", tmp_path / "moe", 0)
    with pytest.raises(CheckpointError, match="only teaches here"):
        pathway(moe, moe)


# ---- Slurm, by programs that behave as its own do

SBATCH = r"""#!/bin/bash
# Runs a job at once: checks its dependency, one task after the other, its output in the file that it asks for.
set -euo pipefail
here=$(dirname "$0") script=${!#} id=$(( $(cat "$here/jobs" 2>/dev/null || echo 100) + 1 ))
for word in "$@"; do
    case $word in --dependency=afterok:*) grep -qx "${word##*:}" "$here/ended" || { echo "no such job: $word" >&2; exit 1; } ;; esac
done
asked() { sed -n "s/^#SBATCH --$1=//p" "$script"; }
export SLURM_JOB_ID=$id SLURM_JOB_NUM_NODES=$(asked nodes) SLURM_JOB_NODELIST=localhost
array=$(asked array); last=${array#0-}
for task in $(seq 0 "${last:-0}"); do
    if [ -n "$array" ]; then
        export SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_STEP=1 SLURM_ARRAY_TASK_COUNT=$((last + 1))
    fi
    bash "$script" > "logs/$(basename "$script")-$task.log" 2>&1
done
echo "$id" > "$here/jobs"; echo "$id" >> "$here/ended"; echo "$id;cluster"
"""
SRUN = """#!/bin/bash
# As many tasks as the job has nodes, all on this machine; ends well if all of them do.
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""
SCONTROL = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && for node in $(seq "$SLURM_JOB_NUM_NODES"); do echo "$3"; done
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (BESIDE / "switchkd").is_file(), reason="switchkd is not installed as a command beside this Python"
)
def test_the_slurm_jobs_run_in_their_order_on_two_nodes(place, tmp_path):
    """Two nodes are two agents of torchrun on loopback, which meet by c10d; capture is an array of two tasks."""
    out, path = tmp_path / "project", tmp_path / "bin"
    path.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    new_project(given(place, out=out, nodes=2))
    with (out / "cache.yaml").open("a") as config:
        config.write("part-size: 5\n")
    told = run("bash", "slurm/submit.sh", folder=out, path=f"{path}:{BESIDE}")
    assert told == "submitted: cache 101, train 102, finish 103\n"
    assert [file.name for file in sorted((out / "logs").iterdir())] == [
        "cache.sbatch-0.log", "cache.sbatch-1.log", "finish.sbatch-0.log", "train.sbatch-0.log",
    ]  # fmt: skip
    assert "worker 1 of 2 (from Slurm's array)" in (out / "logs/cache.sbatch-1.log").read_text()
    assert "2 processes (ddp) x batch size 4 x accumulation 1" in (out / "logs/train.sbatch-0.log").read_text()
    assert json.loads((out / "eval/student/scores.json").read_text())["questions"] == 13
    assert (out / "report/report.html").is_file()
