"""The same checkpoint and questions through `switchkd eval` and through lmms-eval's `llava_hf`: answers and scores must agree.

    make check-lmms-eval        # or: python benchmarks/lmms_eval_check.py [--questions N] [--workdir FOLDER]

The model is the demo's teacher, the questions are easy-VQA's (test split), laid out as GQA, POPE and VizWiz. lmms-eval runs in a
virtual environment of its own, made here with the pins below, offline, with its own prompts and rules of these three tasks; only
the reading of local files is added (its tasks load from a hub). It answers one question at a time on the CPU in float32, `switchkd`
answers padded batches.

Then both score made-up answers, full of what the normaliser has rules for, by the rules that both take from the same official
scripts: TextVQA, VQAv2, MME (without full stops and a bare "y" or "n", which lmms-eval alone drops and takes). Exit code 0 if all
answers and scores agree.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchkd.pipelines.demo import easy_vqa
from switchkd.pipelines.demo.easy_vqa import TEACHER_LANGUAGE, TEACHER_VISION, TEACHER_WEIGHTS
from switchkd.pipelines.evaluation.benchmarks import mme, vqa
from switchkd.pipelines.evaluation.benchmarks.base import Answer
from switchkd.pipelines.evaluation.benchmarks.run import run_benchmarks
from switchkd.pipelines.evaluation.options import BenchmarkOptions
from switchkd.pipelines.run_folder import PREDICTIONS, SCORES

# lmms-eval asks for 146 packages and CUDA builds; these and what they need are what `llava_hf` and the three tasks import.
PACKAGES = """
    torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 pillow==13.0.0 numpy==2.4.6 aiohttp==3.14.5 av==15.1.0
    decord==0.6.0 dill==0.4.1 evaluate==0.4.6 httpx==0.28.1 jinja2==3.1.6 jsonlines==4.0.0 loguru==0.7.3 nltk==3.10.4 openai==3.57.0
    packaging==26.3 pandas==3.1.1 pydantic==2.14.4 pytablewriter==1.2.1 python-dotenv==1.2.4 pytz==2026.6 pyyaml==6.0.4
    requests==2.34.2 sacrebleu==2.6.0 scipy==1.17.1 sympy==1.14.0 tenacity==9.2.1 tiktoken==0.14.0 tqdm==4.70.1
""".split()  # noqa: SIM905
LMMS_EVAL = "lmms-eval==0.7.3"
NEW_TOKENS = 16
TOLERANCE = 1e-6  # of a score in percent
CHAT_TEMPLATE = (  # of one question: our template `qa`
    "{% for part in messages[0]['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}"
)
PARTS = ("random", "popular", "adversarial")

# How each task of lmms-eval reads a line of JSON; the prompts' ends and the rules are lmms-eval's own.
READERS = """
from PIL import Image
from lmms_eval.tasks.gqa.utils import gqa_doc_to_text as gqa_text
from lmms_eval.tasks.pope.utils import (
    pope_aggregate_accuracy, pope_aggregate_f1_score, pope_doc_to_text as pope_text, pope_process_results as pope_results,
)
from lmms_eval.tasks.vizwiz_vqa.utils import vizwiz_vqa_doc_to_text as vizwiz_text
from lmms_eval.tasks.vizwiz_vqa.utils import vizwiz_vqa_process_results as vizwiz_results


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function readers.visual
doc_to_text: !function readers.{kind}_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}}
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: "{end}"}}}}
metadata: [{{version: 0.0}}]
"""
SHORT = "\\nAnswer the question using a single word or phrase."
ENDS = {
    "gqa": SHORT,
    "pope": SHORT,
    "vizwiz": "\\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
}
EXACT = """metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}"""
RULES = {
    "gqa": EXACT,
    "vizwiz": "process_results: !function readers.vizwiz_results\n" + EXACT,
    "pope": """process_results: !function readers.pope_results
metric_list:
  - {metric: pope_accuracy, aggregation: !function readers.pope_aggregate_accuracy, higher_is_better: true}
  - {metric: pope_f1_score, aggregation: !function readers.pope_aggregate_f1_score, higher_is_better: true}""",
}

# What made-up answers are made of: contractions, numbers, articles, and punctuation with and without spaces.
PIECES = """
    the a an none two ten zero dont don't couldnt've yalld've its it's ows'at twas somebody'd 1,000 3.5 $20 10:30 p.m. u.s. t-shirt
    red Blue CAT/dog (yes) no. what? yes, no! a_b <c> [d] x=1 @home `q` 's nokia's "quoted" - . , ; yes no not other
""".split()  # noqa: SIM905
SCORE = """
import json, sys
from lmms_eval.tasks.mme.utils import mme_process_results
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_process_results
out = []
for case in json.load(open(sys.argv[1])):
    texts, doc = [case["prediction"]], {"question_id": 0, "question": "", "category": "color", "answer": "yes"}
    people = [{"answer": text, "answer_id": n} for n, text in enumerate(case["people"])]
    out.append({
        "textvqa": textvqa_process_results(doc | {"answers": list(case["people"])}, texts)["exact_match"],
        "vqav2": vqav2_process_results(doc | {"answers": people}, texts)["exact_match"],
        "mme": next(iter(mme_process_results(doc, [texts[0].replace(".", "").strip()]).values()))["score"],
    })
json.dump(out, open(sys.argv[2], "w"))
"""

Rows = list[dict[str, Any]]


def questions(count: int) -> Rows:
    """Return `count` test questions of easy-VQA, evenly over the split: id, image file, question, answer."""
    source = easy_vqa.package_folder() / "test"
    rows = json.loads((source / "questions.json").read_text())
    chosen = rows[:: max(1, len(rows) // count)][:count]
    return [
        {
            "id": str(n),
            "image": str(source / "images" / f"{number}.png"),
            "question": text.capitalize(),
            "answer": answer,
        }
        for n, (text, answer, number) in enumerate(chosen)
    ]


def people(row: Mapping[str, Any], number: int) -> list[str]:
    """Return ten people's answers of whom 0 to 9 say the true one, so that partial scores occur."""
    right = number % 10
    return [row["answer"]] * right + ["unanswerable"] * (10 - right)


def write_ours(root: Path, rows: Rows) -> None:
    """Lay the questions out as GQA, POPE and VizWiz publish theirs."""
    images = {"gqa/images": "{}.jpg", "vizwiz/val": "{}.jpg", "pope/val2014": "{}.jpg"}
    for folder, form in images.items():
        (root / folder).mkdir(parents=True)
        for row in rows:
            (root / folder / form.format(row["id"])).symlink_to(row["image"])
    gqa = {row["id"]: {"imageId": row["id"], "question": row["question"], "answer": row["answer"]} for row in rows}
    (root / "gqa/testdev_balanced_questions.json").write_text(json.dumps(gqa))
    vizwiz = [
        {"image": f"{row['id']}.jpg", "question": row["question"], "answers": [{"answer": a} for a in people(row, n)]}
        for n, row in enumerate(rows)
    ]
    (root / "vizwiz/val.json").write_text(json.dumps(vizwiz))
    for part, some in pope_parts(rows).items():
        lines = [
            {"question_id": int(r["id"]), "image": f"{r['id']}.jpg", "text": r["question"], "label": r["answer"]}
            for r in some
        ]
        (root / f"pope/coco_pope_{part}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_theirs(folder: Path, rows: Rows) -> list[str]:
    """Write the same questions as JSON Lines with a task file each, and return the tasks' names."""
    folder.mkdir()
    (folder / "readers.py").write_text(READERS)
    sets: dict[str, Rows] = {"gqa": rows}
    sets["vizwiz"] = [row | {"question_id": row["id"], "answers": people(row, n)} for n, row in enumerate(rows)]
    for part, some in pope_parts(rows).items():
        sets[f"pope_{part}"] = [row | {"question_id": row["id"]} for row in some]
    for name, lines in sets.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        kind = name.partition("_")[0]
        task = TASK.format(name=f"local_{name}", file=file, kind=kind, tokens=NEW_TOKENS, end=ENDS[kind])
        (folder / f"{name}.yaml").write_text(task.lstrip() + RULES[kind] + "\n")
    return [f"local_{name}" for name in sets]


def pope_parts(rows: Rows) -> dict[str, Rows]:
    """Deal the yes-or-no questions to POPE's three parts."""
    binary = [row for row in rows if row["answer"] in ("yes", "no")]
    return {part: binary[place::3] for place, part in enumerate(PARTS)}


def write_model(folder: Path) -> None:
    """Write the demo's teacher with what `llava_hf` needs besides: a processor and a chat template that equals our `qa`."""
    easy_vqa.write_checkpoint(folder, vision=TEACHER_VISION, language=TEACHER_LANGUAGE, seed=0, weights=TEACHER_WEIGHTS)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": TEACHER_VISION["patch_size"],
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
        "image_token": "<image>",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def environment(folder: Path) -> Path:
    """Make lmms-eval's virtual environment, once, and return its Python."""
    python = folder / "bin/python"
    if not (folder / ".complete").exists():
        print(f"making {folder} (some 95 packages, 1.9 GB)", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *PACKAGES], check=True)
        subprocess.run([*install, "--no-deps", LMMS_EVAL], check=True)
        (folder / ".complete").touch()
    return python


def run_theirs(
    python: Path, model: Path, folder: Path, tasks: Sequence[str], output: Path
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """Run lmms-eval, and return each task's metrics and its answers in the order of the task's file."""
    command = [python, "-m", "lmms_eval", "--model", "llava_hf", "--batch_size", "1", "--log_samples"]
    command += [
        "--model_args",
        f"pretrained={model},device=cpu,device_map=cpu,dtype=float32",
        "--tasks",
        ",".join(tasks),
    ]
    command += ["--include_path", folder, "--output_path", output]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache"), "HF_HOME": str(output / "home")}
    log = output.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(command, env=os.environ | offline, stdout=file, stderr=subprocess.STDOUT, check=False)
    results = list(output.rglob("*_results.json"))
    # It scores a failed generation as an empty answer and exits 0 even after an error, so its log is read too.
    if done.returncode or not results or "in generating" in log.read_text():
        raise SystemExit(f"lmms-eval failed, see {log}:\n{log.read_text()[-2000:]}")
    answers = {}
    for task in tasks:
        (samples,) = output.rglob(f"*_samples_{task}.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        answers[task] = [line["filtered_resps"].strip() for line in lines]
    return json.loads(results[0].read_text())["results"], answers


def compare(
    run: Path, tasks: Sequence[str], scores: dict[str, dict[str, float]], answers: dict[str, list[str]]
) -> bool:
    """Print both sides, and return whether every answer and every score agrees."""
    board = {row["name"]: row for row in json.loads((run / "ours" / SCORES).read_text())["benchmarks"]}
    same = True
    print(
        "| task | questions | answers that differ | metric | switchkd | lmms-eval |\n| --- | ---: | ---: | --- | ---: | ---: |"
    )
    for task in tasks:
        name, _, part = task.removeprefix("local_").partition("_")
        asked = [json.loads(line)["id"] for line in (run / "tasks" / f"{task.removeprefix('local_')}.jsonl").open()]
        (folder,) = (run / "ours").glob(f"{name}-*")
        ours = {row["id"]: row["prediction"] for row in map(json.loads, (folder / PREDICTIONS).open())}
        forms = {"gqa": "{}", "vizwiz": "{}.jpg", "pope": part + "/{}"}
        differ = sum(ours[forms[name].format(i)] != theirs for i, theirs in zip(asked, answers[task], strict=True))
        pairs = {"exact_match": board[name]["score"]}
        if name == "pope":
            details = board[name]["details"]
            pairs = {"pope_accuracy": details[f"{part}_accuracy"], "pope_f1_score": details[f"{part}_f1"]}
        for metric, score in pairs.items():
            other = 100 * scores[task][f"{metric},none"]
            same = same and differ == 0 and abs(score - other) < TOLERANCE
            print(f"| {task} | {len(asked)} | {differ} | {metric} | {score:.6f} | {other:.6f} |")
    return same


def compare_rules(python: Path, run: Path, count: int = 5000) -> bool:
    """Score made-up answers on both sides, print how many scores differ, and return whether none does."""
    draw = random.Random(0)
    cases = []
    for _ in range(count):
        said = [" ".join(draw.choices(PIECES, k=draw.randint(1, 3))) for _ in range(3)]
        # People differ, so that their answers are normalised too.
        people = ["somebody else's", *draw.choices(said, k=9)]
        cases.append({"prediction": said[0] + draw.choice(["", ".", "\n"]), "people": people})
    (run / "cases.json").write_text(json.dumps(cases))
    subprocess.run([python, "-c", SCORE, run / "cases.json", run / "theirs.json"], check=True)
    theirs = json.loads((run / "theirs.json").read_text())
    rules = {"textvqa": vqa.textvqa_accuracy, "vqav2": vqa.vqa_accuracy, "mme": mme.judge}
    differ = dict.fromkeys(rules, 0)
    partial = dict.fromkeys(rules, 0)
    for case, found in zip(cases, theirs, strict=True):
        for name, rule in rules.items():
            text = case["prediction"].replace(".", "").strip() if name == "mme" else case["prediction"]
            score = rule([Answer("yes" if name == "mme" else case["people"], text)])[0]
            partial[name] += score > 0
            if abs(score - found[name]) > TOLERANCE:
                differ[name] += 1
                if differ[name] <= 3:
                    print(f"{name}: switchkd {score}, lmms-eval {found[name]} for {case}")
    print("\n| rule | answers | scored above 0 | scores that differ |\n| --- | ---: | ---: | ---: |")
    for name in rules:
        print(f"| {name} | {count} | {partial[name]} | {differ[name]} |")
    return not any(differ.values())


def main() -> int:
    """Run both, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--workdir", type=Path, default=Path("build/lmms-eval"))
    options = parser.parse_args()
    work: Path = options.workdir.resolve()
    python = environment(work / "venv")
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    rows = questions(options.questions)
    write_model(run / "model")
    write_ours(run / "benchmarks", rows)
    tasks = write_theirs(run / "tasks", rows)
    asked = BenchmarkOptions(
        tasks=("gqa", "vizwiz", "pope"),
        benchmarks=run / "benchmarks",
        output=run / "ours",
        model=run / "model",
        template="qa",
        max_new_tokens=NEW_TOKENS,
        dtype="float32",
    )
    run_benchmarks(asked)
    same = compare(run, tasks, *run_theirs(python, run / "model", run / "tasks", tasks, run / "theirs"))
    same = compare_rules(python, run) and same
    print("all answers and scores agree" if same else "answers or scores DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
