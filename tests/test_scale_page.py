"""The files of docs/scale.md as its reader has them: checked as scripts, and run with stand-ins for Slurm's commands.

`srun` starts its command once for each node, at the same time; `sbatch` runs a file once for each task of its array; `scontrol`
names this machine. So the two nodes are two launchers of one process each, which meet over loopback.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import families
import pytest
import tiny
from docs_pages import ROOT, blocks

PAGE = ROOT / "docs/scale.md"
FILES = {block.title: block.content for block in blocks(PAGE) if block.title}
SBATCH = ("cache.sbatch", "train.sbatch", "eval.sbatch")
STAND_INS = {
    "scontrol": "#!/bin/sh\necho 127.0.0.1\n",
    "nvidia-smi": "#!/bin/sh\nexit 0\n",
    "srun": """#!/bin/bash
export SLURM_STEP_NUM_NODES=$SLURM_JOB_NUM_NODES
for node in $(seq "$SLURM_JOB_NUM_NODES"); do SLURM_NODEID=$((node - 1)) "$@" & jobs+=($!); done
code=0
for job in "${jobs[@]}"; do wait "$job" || code=$?; done
exit $code
""",
    "sbatch": """#!/bin/bash
echo "$*" >> submitted
script=${!#}
setting() { sed -n "s/^#SBATCH --$1=//p" "$script"; }
export SLURM_JOB_ID=$RANDOM SLURM_JOB_NUM_NODES=${NODES:-1} SLURM_JOB_NODELIST='node[0-1]'
array=$(setting array)
if [ -n "$array" ]; then
    export SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_COUNT=$((${array#*-} + 1))
    for SLURM_ARRAY_TASK_ID in $(seq 0 "${array#*-}"); do
        export SLURM_ARRAY_TASK_ID
        bash "$script" >> "$script.log" 2>&1 || exit 1
    done
else
    bash "$script" >> "$script.log" 2>&1 || exit 1
fi
echo "$SLURM_JOB_ID"
""",
}


@pytest.fixture
def place(tmp_path):
    """The files of the page beside a tiny pair of the recipe's family, with the commands of Slurm on PATH."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    data = tiny.data(tmp_path, tiny.rows(8, text_only=(1,)))
    paths = (tmp_path / "paths.sh").read_text()
    for role, seed in (("TEACHER", 1), ("STUDENT", 2)):
        folder = re.search(rf"^{role}=(.*)/$", paths, re.MULTILINE)[1]
        families.write_checkpoint("qwen2_5_vl", tmp_path / folder, seed)
    for role in ("DATA", "HELD_OUT"):
        (tmp_path / re.search(rf"^{role}=(.*)$", paths, re.MULTILINE)[1]).write_bytes(data.read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "paths.sh").write_text(re.sub("PORT=.*", f"PORT={port}", paths.replace("GPUS=8", "GPUS=1")))
    array = tmp_path / "cache.sbatch"
    array.write_text(array.read_text().replace("--array=0-7", "--array=0-1"))
    (tmp_path / "bin").mkdir()
    for name, content in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def bash(place, script, **environment):
    path = f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    around = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(["bash", script], cwd=place, env=around, capture_output=True, text=True, timeout=600)


def log(place, script):
    return (place / f"{script}.log").read_text()


@pytest.mark.parametrize("name", [*SBATCH, "submit.sh", "check.sh", "paths.sh"])
def test_a_file_is_a_script_whose_names_are_set(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    subprocess.run(["bash", "-n", tmp_path / name], check=True)
    own = set(re.findall(r"^(\w+)=", FILES["paths.sh"] + "\n" + FILES[name], re.MULTILINE))
    used = set(re.findall(r"\$\{?(\w+)", FILES[name]))
    assert {variable for variable in used if not variable.startswith("SLURM_")} <= own
    assert not name.endswith(".sbatch") or FILES[name].startswith("#!/bin/bash\n#SBATCH --job-name=")


def test_the_chain_submits_every_file_and_each_waits_for_the_one_before(place):
    for name in SBATCH:
        (place / name).write_text("true\n")
    done = bash(place, "submit.sh")
    assert done.returncode == 0, done.stderr
    jobs = (place / "submitted").read_text().splitlines()
    assert [line.split()[-1] for line in jobs] == list(SBATCH)
    assert ["--dependency=afterok:" in line for line in jobs] == [False, True, True]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_from_nothing_to_a_scored_student_on_two_nodes(place):
    done = bash(place, "submit.sh", NODES="2")
    assert done.returncode == 0, done.stderr + "".join(path.read_text()[-3000:] for path in place.glob("*.log"))
    assert log(place, "cache.sbatch").count("of 2 (from Slurm's array)") == 2
    trained = log(place, "train.sbatch")
    assert "2 processes (fsdp) x batch size 4 x accumulation 16" in trained and "steps: 1 of 128 samples" in trained
    scores = json.loads((place / "eval/qwen2.5-vl-3b/scores.json").read_text())
    assert scores
    assert (place / "students/qwen2.5-vl-3b/model.safetensors").is_file()
    again = bash(place, "submit.sh", NODES="2")  # nothing is done twice
    assert again.returncode == 0, again.stderr
    assert "was already trained for" in log(place, "train.sbatch")


@pytest.mark.slow
def test_a_wrong_number_of_nodes_is_refused(place):
    (place / "one.sh").write_text("sbatch train.sbatch\n")
    script = place / "train.sbatch"
    script.write_text(script.read_text().replace('--nnodes "$SLURM_JOB_NUM_NODES"', "--nnodes 1").replace("$PORT", "0"))
    (place / "stores/qwen2.5-vl-7b.zarr").mkdir(parents=True)  # refused before it is opened
    done = bash(place, "one.sh", NODES="2")
    assert done.returncode and not (place / "runs").exists()
    assert "Slurm runs this step on 2 nodes, and torchrun was told of 1" in log(place, "train.sbatch")


@pytest.mark.slow
def test_the_check_tells_what_it_takes(place):
    script = place / "check.sh"
    script.write_text(script.read_text().replace("switchkd doctor\n", ""))  # which looks at this machine
    done = bash(place, "check.sh")
    assert done.returncode == 0, done.stderr
    for said in ("pays  ", "size by payload:", "memory   about", "time     about", "nothing was written at"):
        assert said in done.stdout, said
