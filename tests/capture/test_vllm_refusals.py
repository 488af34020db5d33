"""Teachers that vLLM does not have, or would run with other results, are refused by name; logits mean the same in both backends.

Run by `make test-vllm`.
"""

import re

import families as tiny
import numpy as np
import pytest
import vllm_families
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.data.media import MediaReader
from switchkd.errors import CheckpointError, ConfigError
from switchkd.losses.lm_head import LogitMap
from switchkd.models import checkpoint, components
from switchkd.models.checkpoint import open_checkpoint, with_image_mode
from switchkd.pipelines.capture.backends.open import open_backend

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

REFUSED = {
    "gemma3": "image tokens of a gemma3 see each other in both directions, while vLLM's attention on CPU lets each see earlier",
    "paligemma": "tokens of a paligemma see the whole prompt in both directions",
    "qwen3_5": "vLLM's linear attention, of which a qwen3_5 has layers, is not reliable on CPU",
    "vipllava": "vLLM 0.* has no class for its architecture VipLlavaForConditionalGeneration",
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return vllm_families.write_data(tmp_path_factory.mktemp("data"))


def start(opened, **options):
    return open_backend("vllm", opened, "float32", device="cpu", max_length=256, vllm_options=options)


def refused(teacher, data, tmp_path, *more, template="chat"):
    """Return the one line with which `cache-teacher --backend vllm` refuses a teacher; it writes nothing."""
    words = ("cache-teacher", "--backend", "vllm", "--teacher", teacher, "--data", data, "--out", tmp_path / "s.zarr")
    words = (*words, "--images", data.parent / "images", "--template", template, "--check", "0", *more)
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert not (tmp_path / "s.zarr").exists()
    return line


@pytest.mark.parametrize("family", REFUSED)
def test_a_teacher_that_would_run_otherwise_is_refused_and_nothing_written(family, tmp_path, data):
    teacher = vllm_families.write_teacher(family, tmp_path / family)
    line = refused(teacher, data, tmp_path, template=vllm_families.template(family))
    assert re.search(f"{teacher}.*{REFUSED[family]}.*use --backend transformers", line)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_pixels_that_vllm_would_normalise_otherwise_are_refused(family, tmp_path, monkeypatch):
    opened = open_checkpoint(vllm_families.write_teacher(family, tmp_path / family))
    read = MediaReader.read

    def twice(self, images):
        media = read(self, images)
        return media._replace(columns=media.columns | {"pixel_values": (media.columns["pixel_values"] - 0.5) / 0.5})

    monkeypatch.setattr(MediaReader, "read", twice)
    with pytest.raises(CheckpointError, match="would read an image of a .* pixel_values is off by"):
        start(opened)


def test_a_processor_that_cuts_an_image_otherwise_is_refused(tmp_path, monkeypatch):
    """Fewer pixels by --max-pixels are no such difference."""
    opened = open_checkpoint(vllm_families.write_teacher("qwen3_vl", tmp_path / "teacher"))
    limited = with_image_mode(opened, "own", 256)
    read = MediaReader.read
    monkeypatch.setattr(MediaReader, "read", lambda self, images: read(MediaReader(limited), images))
    with pytest.raises(CheckpointError, match="token ids for .*; its features go to positions"):
        start(limited)
    monkeypatch.undo()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    start(limited, enforce_eager=True).engine.engine_core.shutdown()


def test_expert_parallel_on_a_cpu_is_refused(tmp_path):
    opened = open_checkpoint(vllm_families.write_teacher("qwen3_vl_moe", tmp_path / "teacher"))
    with pytest.raises(ConfigError, match="kernel for experts on a CPU crashes with it"):
        start(opened, enable_expert_parallel=True)


def test_arguments_that_vllm_does_not_take_are_told(tmp_path):
    opened = open_checkpoint(vllm_families.write_teacher("internvl", tmp_path / "teacher"))
    with pytest.raises(ConfigError, match="vLLM does not start: .*no_such_option"):
        start(opened, no_such_option=1)


@pytest.mark.parametrize("apart", ["0", "1"])
def test_too_little_memory_is_told_in_one_line_and_nothing_written(apart, tmp_path, data, monkeypatch):
    """Also by an engine in a process of its own, of which vLLM itself says only that it failed."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", apart)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40000")
    teacher = vllm_families.write_teacher("internvl", tmp_path / "teacher")
    assert re.match(
        "Error: vLLM does not start: .*less than requested memory for kv",
        refused(teacher, data, tmp_path, "--max-length", "256"),
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ("--max-length", "200", "--vllm-option", "max_model_len=64"),
            "vLLM takes 64 at most, by --vllm-option max_model_len",
        ),
        (("--max-length", "5000"), "vLLM takes 512 at most, by the teacher's positions"),
    ],
)
def test_an_engine_for_shorter_samples_is_refused(more, said, tmp_path, data):
    teacher = vllm_families.write_teacher("internvl", tmp_path / "teacher")
    assert re.search(rf"{said}: pass --max-length \d+", refused(teacher, data, tmp_path, *more))


def test_a_processor_that_vllm_cannot_open_is_refused(tmp_path, data, monkeypatch):
    from vllm.multimodal import MULTIMODAL_REGISTRY

    def fails(*_, **__):
        raise OSError("Can't load image processor")

    teacher = vllm_families.write_teacher("internvl", tmp_path / "teacher")
    monkeypatch.setattr(MULTIMODAL_REGISTRY, "create_processor", fails)
    said = refused(teacher, data, tmp_path, "--max-length", "256")
    assert re.search(f"vLLM cannot open the processor of {teacher}.*Can't load image processor", said)


def test_a_store_begun_with_another_dtype_is_refused(tmp_path, data):
    teacher = vllm_families.write_teacher("internvl", tmp_path / "teacher")
    words = ("cache-teacher", "--teacher", teacher, "--data", data, "--out", tmp_path / "s.zarr", "--template", "chat")
    words = [*map(str, words), "--images", str(data.parent / "images"), "--max-length", "256"]
    done = CliRunner().invoke(main, [*words, "--dtype", "bfloat16", "--shard", "0/2", "--part-size", "4"])
    assert done.exit_code == 0, done.stderr
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s.zarr").rglob("*")}
    done = CliRunner().invoke(main, [*words, "--dtype", "float32", "--part-size", "4", "--backend", "vllm"])
    assert done.exit_code == 2 and "teacher dtype: store 'bfloat16', here 'float32'" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s.zarr").rglob("*")} == before


def test_no_option_makes_vllm_normalise_pixels_again(tmp_path, data):
    case = vllm_families.open_case("qwen2_5_vl", tmp_path, data)
    backend = case.open_vllm(mm_device_do_normalize=True)
    for found, expected in zip(backend.capture(case.samples[:3], case.worker.manifest), case.expected, strict=False):
        np.testing.assert_allclose(found.hidden, expected.hidden, atol=1e-4, rtol=0)
    backend.engine.engine_core.shutdown()


# Language models that scale or cap their logits: transformers' Llava drops it, so `open_checkpoint` refuses them.
TEXTS = {
    "scale": ({"model_type": "granite", "logits_scaling": 8.0}, LogitMap(scale=1 / 8)),
    "cap": (tiny.CAPPED | {"model_type": "gemma2", "attn_logit_softcapping": None}, LogitMap(softcap=3.0)),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_logit_map_means_the_same_in_both_backends(kind, tmp_path, data, monkeypatch):
    from switchkd.pipelines.capture.backends import vllm_backend

    text, logit_map = TEXTS[kind]
    monkeypatch.setitem(vllm_families.TEXTS, "llava", text)
    monkeypatch.setitem(
        vllm_families.MORE, "llava", {"tied": kind == "cap"}
    )  # vLLM knows Gemma 2 with a tied head alone
    folder = vllm_families.write_teacher("llava", tmp_path / "refused")
    with pytest.raises(CheckpointError, match="which transformers' llava class leaves out and vLLM applies"):
        open_checkpoint(folder)
    for module in (checkpoint, components, vllm_backend):
        monkeypatch.setattr(module, "logit_map_of", lambda *_: LogitMap())
    with pytest.raises(CheckpointError, match="vLLM's logits are not the trainer's, .* times the product"):
        start(open_checkpoint(folder))
    for module in (checkpoint, components, vllm_backend):
        monkeypatch.setattr(module, "logit_map_of", lambda *_: logit_map)
    case = vllm_families.open_case("llava", tmp_path, data)
    backend = case.open_vllm()
    for found, expected in zip(backend.capture(case.samples, case.worker.manifest), case.expected, strict=True):
        np.testing.assert_allclose(found.hidden, expected.hidden, atol=2e-4, rtol=0)
        np.testing.assert_allclose(found.logits, expected.logits, atol=2e-4, rtol=0)
        assert found.stat("knee").tolist() == expected.stat("knee").tolist()
    backend.engine.engine_core.shutdown()
