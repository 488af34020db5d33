"""An exported student answers in vLLM, past none of its processors, as in plain transformers. Run by `make test-vllm`."""

import json

import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from switchkd.data.templates import TEMPLATES
from switchkd.pipelines.release.export import export
from switchkd.pipelines.release.options import ExportOptions

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

QUESTIONS = ("what color is it ?", "what shape ?", "is it a square ?")
TOKENS = 8


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A finished run's folder, and what export makes of it."""
    folder = tmp_path_factory.mktemp("run")
    clip = tiny.vision_config("clip", size=32, patch=8, layers=3)
    run = tiny.checkpoint(folder / "run", 1, width=64, vision=clip, layer=-2, strategy="default")
    record = {"objective": "sft", "switch": False, "student": "s", "teacher": None, "data": "d"}
    (run / "run.yaml").write_text(json.dumps(record))
    made_from = {"template": TEMPLATES["qa"].as_dict(), "data": "0", "store": None, "teacher": None}
    summary = {"steps": 1, "samples": 1, "skipped": {}, "losses": {}, "history": [], "made_from": made_from}
    (run / "summary.json").write_text(json.dumps(summary))
    return export(ExportOptions(run, folder / "exported"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [Image.open(tiny.image(folder / f"{i}.png", i, (40, 40))).convert("RGB") for i in range(len(QUESTIONS))]


def conversation(kind, picture, question):
    return [{"role": "user", "content": [{"type": kind, kind: picture}, {"type": "text", "text": question}]}]


def test_vllm_answers_as_transformers_does(exported, pictures, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    processor = AutoProcessor.from_pretrained(exported, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    expected = []
    for picture, question in zip(pictures, QUESTIONS, strict=True):
        inputs = processor.apply_chat_template(
            conversation("image", picture, question),
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        generated = model.generate(**inputs, max_new_tokens=TOKENS)[0, inputs["input_ids"].shape[1] :].tolist()
        expected.append((inputs["input_ids"][0].tolist(), generated))

    engine = LLM(
        str(exported),
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1},
        max_num_seqs=4,
    )
    answers = engine.chat(
        [conversation("image_pil", picture, question) for picture, question in zip(pictures, QUESTIONS, strict=True)],
        SamplingParams(temperature=0, max_tokens=TOKENS),
        chat_template_content_format="openai",
    )
    found = [(list(answer.prompt_token_ids), list(answer.outputs[0].token_ids)) for answer in answers]
    assert found == expected
