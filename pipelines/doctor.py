"""`switchkd doctor`: report packages and devices of this machine, what is broken, and what each command lacks."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement
from packaging.version import Version

import switchkd
from switchkd.counting import counted
from switchkd.settings import OLDEST_FOR_TRAINING

# Extra → the features that it adds, for users. A test checks that it is complete.
EXTRAS = {
    "demo": "`demo`",
    "vllm": "`cache-teacher --backend vllm` (in an environment of its own)",
    "ray": "`cache-teacher --engine ray`",
    "s3": "stores at s3://, gs://, az://",
    "fast": "faster reading of stores on local disks",
    "viz": "`store plot`, `report`, `attend`, pictures of `train` and `ablate`",
    "loggers": "`train --log-to`",
    "deepspeed": "`train` under DeepSpeed",
    "lora": "`train --lora`",
    "torchao": "`train --teacher-dtype int8`",
    "evidence": "comparisons of arms in `ablate`",
    "eval": "`eval` of MMBench spreadsheets",
    "docs": "`make docs`",
    "dev": "`make test`",
}
LEAST_FREE_BYTES = 10 << 30  # below this, a folder's disk is reported as nearly full
LEAST_FILES = 4096  # open files; DataLoader workers and the parts of a store need many
LEAST_SHARED_BYTES = 1 << 30  # /dev/shm, through which DataLoader workers hand over batches


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    area: str
    verdict: str  # "ok"; "note", something is missing that not everyone needs; "bad", commands will fail
    what: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Check packages, devices, codecs, disks and limits, and yield findings one by one. Nothing is changed."""
    yield Finding("system", "ok", f"{platform.platform()}, Python {platform.python_version()} at {sys.executable}")
    yield Finding("system", "ok", f"switchkd {switchkd.__version__} at {Path(switchkd.__file__).parent}")
    yield from _core()
    yield _torchvision()
    yield from _devices()
    yield from _codecs()
    yield from _disks()
    yield from _limits()
    yield from _stages()
    yield from _extras()


def _core() -> Iterator[Finding]:
    for requirement in _requirements(""):
        yield _package(requirement, "packages", "bad")


def _requirements(extra: str) -> list[Requirement]:
    """Return the requirements of switchkd itself, or those that one of its extras adds."""
    found = map(Requirement, importlib.metadata.requires("switchkd") or [])
    in_force = [item for item in found if item.marker is None or item.marker.evaluate({"extra": extra})]
    return [item for item in in_force if (item.marker is not None and "extra" in str(item.marker)) == bool(extra)]


def _package(requirement: Requirement, area: str, verdict: str) -> Finding:
    pip = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(area, verdict, f"{requirement.name} is missing", pip)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(area, verdict, f"{requirement.name} {version}, wanted {requirement.specifier}", pip)
    return Finding(area, "ok", f"{requirement.name} {version}")


def _torchvision() -> Finding:
    """A torchvision that does not fit torch breaks the import of transformers' processors; none at all is fine."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("packages", "ok", "no torchvision; images are processed with Pillow")
    return _tried(
        "packages",
        lambda: (
            f"torchvision {importlib.import_module('torchvision').__version__}; unused, images are processed with Pillow"
        ),
        "torchvision is broken",
        "pip uninstall torchvision, or install the build that belongs to your torch",
    )


def _tried(area: str, look: Callable[[], str], failed: str, advice: str) -> Finding:
    """Return the result of `look`, or that it failed; a broken installation may raise any error."""
    try:
        return Finding(area, "ok", look())
    except Exception as error:
        return Finding(
            area, "bad", f"{failed}: {str(error).splitlines()[0] if str(error) else type(error).__name__}", advice
        )


def _devices() -> Iterator[Finding]:
    import torch

    threads = f"CPU: {counted(os.cpu_count() or 1, 'core')}, {counted(torch.get_num_threads(), 'thread')} for torch"
    yield Finding("devices", "ok", threads)
    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}, " if torch.version.cuda else "torch is built without CUDA, "
        )
        yield Finding("devices", "note", built + "no GPU is usable: everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        yield _tried("devices", lambda index=index: _gpu(index), f"cuda:{index} cannot be used", "see `nvidia-smi`")  # type: ignore[misc]


def _gpu(index: int) -> str:
    import torch

    about = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    torch.zeros(8, device=f"cuda:{index}").sum().item()
    bfloat16 = "bfloat16" if about.major >= 8 else "no bfloat16: use float16 or float32"
    return f"cuda:{index}: {about.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {bfloat16}"


def _codecs() -> Iterator[Finding]:
    """Write and read a small array with each kind of codec that stores use."""
    from switchkd.stores import layout

    values = np.arange(1000, dtype=np.float32)

    def round_trip() -> str:
        import zarr
        from numcodecs import Blosc, PCodec

        for codec in (PCodec(), Blosc("zstd")):
            if not np.array_equal(np.frombuffer(codec.decode(codec.encode(values)), np.float32), values):
                raise ValueError(f"{codec} does not give back what went in")
        return f"pcodec and zstd give back what goes in; zarr {zarr.__version__}, store format {layout.VERSION}"

    yield _tried("codecs", round_trip, "a codec fails", "pip install --force-reinstall 'numcodecs[pcodec]' zarr")


def _disks() -> Iterator[Finding]:
    cache = (
        os.environ.get("HF_DATASETS_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "datasets"
    )
    places = {"this folder": Path.cwd(), "rows of data files (HF_DATASETS_CACHE)": Path(cache).expanduser()}
    places["temporary files"] = Path(tempfile.gettempdir())
    for name, place in places.items():
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        text = f"{name}: {free / 1e9:,.0f} GB free at {place}"
        if not os.access(there, os.W_OK):
            yield Finding(
                "disk", "bad", f"{name}: {place} cannot be written", "choose another place, or change its rights"
            )
        elif free < LEAST_FREE_BYTES:
            yield Finding("disk", "note", text, "`cache-teacher --dry-run` tells how large a store will be")
        else:
            yield Finding("disk", "ok", text)


def _limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "" if files >= LEAST_FILES or files < 0 else f"ulimit -n {LEAST_FILES}"
    yield Finding("limits", "note" if advice else "ok", f"{files} open files", advice)
    shared = Path("/dev/shm")
    if shared.is_dir():
        total = shutil.disk_usage(shared).total
        small = total < LEAST_SHARED_BYTES
        advice = "with --workers, start the container with --shm-size 8g" if small else ""
        yield Finding("limits", "note" if small else "ok", f"{total / 1e9:.1f} GB of shared memory", advice)


def _stages() -> Iterator[Finding]:
    """Which stage the versions that are here serve: an environment of vLLM has an older transformers, and only caches."""
    transformers = importlib.metadata.version("transformers")
    if Version(transformers) >= Version(OLDEST_FOR_TRAINING):
        yield Finding("stages", "ok", f"transformers {transformers}: `cache-teacher` and `train`")
    else:
        what = f"transformers {transformers}: `cache-teacher` alone, since `train` needs {OLDEST_FOR_TRAINING} or newer"
        yield Finding("stages", "note", what, "train in another environment, from the store that this one caches")
    if importlib.util.find_spec("vllm") is None:
        return
    (wanted,) = (requirement for requirement in _requirements("vllm") if requirement.name == "vllm")
    (distribution, *_) = importlib.metadata.packages_distributions()["vllm"]  # that for CPUs has another name
    version = importlib.metadata.version(distribution)
    if wanted.specifier.contains(version, prereleases=True):
        yield Finding("stages", "ok", f"vLLM {version}: `cache-teacher --backend vllm`")
    else:
        what = f"vLLM {version}: `cache-teacher --backend vllm` is made for {wanted.specifier}"
        yield Finding("stages", "note", what, "pip install 'switchkd[vllm]' in an environment of its own")


def _extras() -> Iterator[Finding]:
    known = importlib.metadata.metadata("switchkd").get_all("Provides-Extra") or []
    for extra, brings in EXTRAS.items():
        if extra not in known:
            yield Finding("extras", "note", f"{brings}: newer than this installation", "install switchkd again")
            continue
        found = [_package(requirement, "extras", "note") for requirement in _requirements(extra)]
        lacking = [finding.what for finding in found if finding.verdict != "ok"]
        if lacking:
            yield Finding("extras", "note", f"{brings}: {', '.join(lacking)}", f"pip install 'switchkd[{extra}]'")
        else:
            yield Finding("extras", "ok", f"{brings}: {', '.join(finding.what for finding in found)}")
