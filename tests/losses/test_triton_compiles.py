"""Every Triton kernel compiles for the GPUs that it is for, to a program of the device; no device is needed for that."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by `make test-triton`"),
]
PROGRAM = """
import json, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from switchkd.losses import triton_selection as selection
from switchkd.pipelines.training.step_ways import fp8_kernel as fp8

KERNELS = {
    "count": (selection._count, {"logits": "*fp32", "wanted": "*i64", "lows": "*fp32", "scales": "*fp32", "sizes": "*i32",
        "floors": "*i32", "numbers": "*i32", "columns": "i32"}, {"has_wanted": True, "bins": selection.BINS,
        "block": selection.COLUMNS}),
    "collect": (selection._collect, {"logits": "*fp32", "lows": "*fp32", "scales": "*fp32", "floors": "*i32", "values": "*fp32",
        "ids": "*i64", "columns": "i32", "width": "i32"}, {"bins": selection.BINS, "block": selection.COLUMNS}),
    "knee": (selection._knee, {"descending": "*fp32", "lows": "*fp32", "sizes": "*i32", "knees": "*i64", "width": "i32"},
        {"block": selection.SORTED_COLUMNS}),
    "quantise": (fp8._quantise, {"x": "*bf16", "factors": "*fp32", "quantised": "*fp8e4nv", "scales": "*fp32", "columns": "i32",
        "stride": "i32"}, {"has_factors": True, "block": fp8.COLUMNS}),
}
found = {}
for capability in (89, 90):
    for name, (kernel, types, constants) in KERNELS.items():
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
        made = triton.compile(ASTSource(kernel, signature, constexprs=places), target=GPUTarget("cuda", capability, 32))
        found[f"{name} {capability}"] = [len(made.asm["cubin"]), made.metadata.shared, "e4m3" in made.asm["ptx"]]
print(json.dumps(found))
"""


def test_kernels_compile_for_ada_and_hopper(tmp_path):
    pytest.importorskip("triton", reason="needs triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = tmp_path / "program.py"  # the compiler reads the source of kernels, not of this
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8
    for name, (size, shared, float8) in found.items():
        assert size > 1000 and shared < 48_000, name
        assert float8 == name.startswith("quantise")
