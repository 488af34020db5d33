"""`switchkd export`: write a finished run as a folder for plain transformers, vLLM and a hub, with a model card."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlavaProcessor

from switchkd.data.chat_template_export import chat_template_source
from switchkd.data.encoded import pad_id_of
from switchkd.data.media import MediaReader
from switchkd.data.templates import ConversationFormat
from switchkd.errors import ConfigError, DataError, RunError
from switchkd.fingerprints import hash_json, hash_weights, weight_files
from switchkd.models.checkpoint import Checkpoint, open_checkpoint, readers_of
from switchkd.models.vlm import load_model
from switchkd.pipelines.evaluation.generation import stop_ids_of
from switchkd.pipelines.release.chat import template_of
from switchkd.pipelines.release.model_card import EvalScores, model_card
from switchkd.pipelines.release.options import ExportOptions
from switchkd.pipelines.run_folder import RECORD, SCORES, SUMMARY
from switchkd.pipelines.training.held_out.best import FOLDER, read_best
from switchkd.waits import Waiting

log = logging.getLogger(__name__)


def export(options: ExportOptions) -> Path:
    """Write a finished run's student as a Hugging Face folder, and push it to a repository if requested.

    The folder contains the weights, generation settings (greedy, with the end of answers of training), tokenizer, image processor,
    the run's template as chat template, and a model card. It is written completely or not at all.

    Raises:
        ConfigError: no finished run, no best student if it is asked for, no record of its template, or `out` exists already.
        DataError: scores of another model.
        RunError: pushing failed; the folder is complete.
    """
    if not ((options.run / SUMMARY).is_file() and (options.run / RECORD).is_file()):
        raise ConfigError(
            f"{options.run} is no finished run (a folder with {RECORD} and {SUMMARY}); train it to its end"
        )
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"{options.out} is there already; remove it, or name another folder")
    summary = json.loads((options.run / SUMMARY).read_text(encoding="utf-8"))
    record = yaml.safe_load((options.run / RECORD).read_text(encoding="utf-8"))
    folder = options.run
    if options.best:
        folder, summary = _best(options.run, summary)
    checkpoint = open_checkpoint(folder, options.trust_remote_code)
    template = template_of(checkpoint, options.template)
    scores = _scores(options, folder)
    unfinished = options.out.with_name(f".{options.out.name}.{os.getpid()}.tmp")
    try:
        _write_model(checkpoint, template, unfinished, options.dtype)
        card = model_card(options.push_to or options.out.name, checkpoint, record, summary, scores)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        if options.out.is_dir():
            options.out.rmdir()  # an empty one
        unfinished.rename(options.out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if options.push_to is not None:
        _push(options.out, options.push_to, options.private)
    return options.out


def _write_model(checkpoint: Checkpoint, template: ConversationFormat, folder: Path, dtype: str) -> None:
    model = load_model(checkpoint, dtype=dtype)
    tokenizer = checkpoint.tokenizer
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stop_ids_of(template, tokenizer), pad_token_id=pad_id_of(tokenizer)
    )
    with Waiting(f"writing the weights to {folder}"):
        model.save_pretrained(folder)
    reader = MediaReader(checkpoint)
    source = chat_template_source(template, tokenizer.eos_token, reader.text_of(reader.marker, own_template=False))
    tokenizer.chat_template = source
    if reader.is_variable:
        for part in reversed(readers_of(checkpoint)):  # the tokenizer last, since it writes the chat template
            part.save_pretrained(folder)
        return
    with Waiting("naming the weights of the vision tower as published"):
        _name_as_published(folder)
    tokenizer.save_pretrained(folder)
    vision, strategy = checkpoint.config.vision_config, checkpoint.config.vision_feature_select_strategy
    patches = (vision.image_size // vision.patch_size) ** 2
    # The processor writes patches + additional image tokens, one less under "default"; a projector that pools makes it negative.
    additional = checkpoint.image_tokens + (strategy == "default") - patches
    processor = LlavaProcessor(
        image_processor=checkpoint.image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=source,
        image_token=tokenizer.convert_ids_to_tokens(checkpoint.image_token_id),
        num_additional_image_tokens=additional,
    )
    processor.save_pretrained(folder)
    checkpoint.image_processor.save_pretrained(folder)  # a separate file, for programs that read only this one


def _name_as_published(folder: Path) -> None:
    """Add to the names of the vision tower's tensors the level `vision_model`, which published Llavas have and vLLM expects.

    transformers reads both names, and since 5.19 writes the shorter one.
    """

    def longer(name: str) -> str:
        head, tower, rest = name.partition("vision_tower.")
        return f"{head}{tower}vision_model.{rest}" if tower and not rest.startswith("vision_model.") else name

    for path in weight_files(folder):
        save_file({longer(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {longer(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _best(run: Path, summary: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a run's best student, and the run's summary as it would be of that student."""
    kept = read_best(run)
    if kept is None:
        raise ConfigError(
            f"{run} has kept no best student: it needs `switchkd train --keep-best METRIC`; leave --best out"
        )
    losses = {n.removeprefix("eval_"): v for n, v in kept["metrics"].items() if n.startswith("eval_loss")}
    by = f"{kept['metric']} of held-out samples, {kept['value']:.4f}"
    return run / FOLDER, summary | {"steps": kept["step"], "losses": losses, "kept_by": by}


def _scores(options: ExportOptions, student: Path) -> list[EvalScores]:
    """Read the evaluations whose weights are exactly this student's, which lies in `student`."""
    weights = hash_json(hash_weights(student))
    found = []
    for folder, asked in [*((folder, True) for folder in options.scores), *((f, False) for f in _below(options.run))]:
        if not (folder / SCORES).is_file() or not (folder / RECORD).is_file():
            raise DataError(
                f"{folder} holds no evaluation: expected {SCORES} and {RECORD}, as `switchkd eval` writes them"
            )
        record = yaml.safe_load((folder / RECORD).read_text(encoding="utf-8"))
        if record.get("weights") != weights:
            if asked:
                raise DataError(
                    f"{folder} has the scores of other weights than those of {student}; evaluate this student"
                )
            log.warning("left out: %s has the scores of other weights", folder)
            continue
        found.append(EvalScores(folder, record, json.loads((folder / SCORES).read_text(encoding="utf-8"))))
    return found


def _below(run: Path) -> Iterator[Path]:
    return (path.parent for path in sorted(run.rglob(SCORES)) if (path.parent / RECORD).is_file())


def _push(folder: Path, repository: str, private: bool) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a student made with switchkd")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{folder} is whole, but cannot be pushed to {repository}: {reason}") from error
