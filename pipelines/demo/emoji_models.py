"""Train the models of EmojiVQA: the tower that ships, and the teacher and student of `switchkd ablate evidence-pilot`.

`make emoji-models` takes 80 minutes of one core with bfloat16 arithmetic, and 25 more with the tower. The same command goes on
with what is there. The models are trained on a suite of their own, three times the published one, drawn from another seed.
Weights that are trained on another machine differ by rounding, and so do their scores.
"""

from pathlib import Path
from typing import Any

import click
from safetensors.torch import save_file

from switchkd.errors import SwitchKDError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.demo.easy_vqa import TEMPLATE, write_checkpoint
from switchkd.pipelines.emoji_vqa.build import CAPTIONS, CONVERSATIONS, build
from switchkd.pipelines.emoji_vqa.models import SHIPPED, STUDENT_LANGUAGE, TEACHER_LANGUAGE, TOWER, TOWER_WEIGHTS
from switchkd.pipelines.emoji_vqa.options import SEED, EmojiVQAOptions
from switchkd.pipelines.emoji_vqa.tower import train_tower
from switchkd.pipelines.emoji_vqa.vocabulary import vocabulary
from switchkd.pipelines.run_folder import SUMMARY
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

SHARE, OTHER_SEED = 3, SEED + 1
TEACHER_PT_STEPS, TEACHER_STEPS, STUDENT_PT_STEPS, STUDENT_STEPS = 1500, 5000, 3000, 3000


def train_models(folder: Path, tower_again: bool = False) -> list[Path]:
    """Train the models below `folder`; return the weights of tower, teacher and student, as they ship (float16).

    The teacher is the tower with an LLM: pre-training on captions with the tower frozen, then SFT on conversations. The student is
    trained in the same order with the tower frozen throughout, so that a fine-tuning begins with an LLM that knows the questions.

    Args:
        tower_again: train the tower, too, instead of taking the one that ships.

    Raises:
        InputError, RunError: see `emoji_vqa.build.build` and `switchkd train`.
    """
    suite = build(EmojiVQAOptions(out=folder / "emoji-vqa", share=SHARE, seed=OTHER_SEED)).folder
    tower = folder / "tower.safetensors" if tower_again else TOWER_WEIGHTS
    if not tower.is_file():
        train_tower(suite.with_name("packages"), tower, vision=TOWER)
    pre: dict[str, Any] = {"data": suite / CAPTIONS, "train_parts": "projector,language"}
    fine: dict[str, Any] = {
        "data": suite / CONVERSATIONS,
        "train_parts": "vision,projector,language",
        "lr_vision": 3e-4,
    }
    # Teacher and student of a tower that was trained again stand apart from those of the tower that ships.
    models = folder / "own-tower" if tower_again else folder
    models.mkdir(exist_ok=True)
    start = _blank(models / "teacher-blank", TEACHER_LANGUAGE, tower)
    start = _train(start, models / "runs/teacher-pt", TEACHER_PT_STEPS, lr=1e-3, **pre)
    teacher = _train(start, models / "runs/teacher", TEACHER_STEPS, lr=1e-3, **fine)
    start = _blank(models / "student-blank", STUDENT_LANGUAGE, tower)
    start = _train(start, models / "runs/student-pt", STUDENT_PT_STEPS, lr=2e-3, **pre)
    student = _train(start, models / "runs/student", STUDENT_STEPS, lr=2e-3, **pre | {"data": suite / CONVERSATIONS})
    written = [models / f"{name}.safetensors" for name in SHIPPED]
    for run, path in zip((teacher, student), written, strict=True):
        weights = load_model(open_checkpoint(run)).state_dict()
        del weights["lm_head.weight"]  # that of the input embeddings
        save_file({name: tensor.half() for name, tensor in weights.items()}, path)
    return [tower, *written]


def _blank(path: Path, language: dict[str, int], tower: Path) -> Path:
    if not path.exists():
        unfinished = path.with_name(f".{path.name}")
        write_checkpoint(unfinished, vision=TOWER, language=language, seed=0, tower=tower, words=vocabulary())
        unfinished.rename(path)
    return path


def _train(student: Path, run: Path, steps: int, data: Path, **settings: Any) -> Path:
    if not (run / SUMMARY).is_file():
        train(
            TrainOptions(
                student=student,
                data=data,
                images=data.with_name("images"),
                output=run,
                objective="sft",
                switch=False,
                template=TEMPLATE,
                precision="bfloat16",
                steps=steps,
                batch_size=32,
                warmup=0.03,
                weight_decay=0.05,
                log_every=100,
                **settings,
            )
        )
    return run


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tower", is_flag=True, help="Train the tower again, too, instead of taking the one that ships.")
def main(folder: Path, tower: bool) -> None:
    """Train the models of EmojiVQA below FOLDER."""
    try:
        for path in train_models(folder, tower):
            click.echo(path)
    except SwitchKDError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
