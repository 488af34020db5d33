"""benchmarks/step_gpu.py runs: every kind of cell at a tiny size on a CPU, resumed, with what was not measured said so."""

import json

import pytest
import step_gpu
import step_gpu_cells
import step_gpu_table
from step_gpu_cells import BEFORE, BEST, FP8_BEST, LIVE, LLAVA_KD, WAYS, Cell

ARGUMENTS = ["--device", "cpu", "--scale", "tiny", "--batches", "4"]
CHOSEN = [
    Cell("peak"),
    *(Cell("step", way, "with", 4) for way in WAYS if not way.compiled),
    Cell("step", BEST, "SFT", 4),
    Cell("profile", BEFORE, "with", 4),
    Cell("profile", BEST, "with", 4),
    Cell(LIVE, BEST, "without", 4),
    Cell(LLAVA_KD, BEFORE, "with", 4),
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the program in this process, a given list of cells; returns the table and the cells that were measured."""
    out, results, measured = tmp_path / "table.md", tmp_path / "results.json", []

    def here(cell, scale, device, seconds):
        measured.append(cell)
        return step_gpu.run_cell(cell, scale, device)

    def program(chosen, *more):
        measured.clear()
        monkeypatch.setattr(step_gpu, "cells", lambda batches: chosen)
        monkeypatch.setattr(step_gpu, "in_a_process", here)
        step_gpu.main([*ARGUMENTS, "--out", str(out), "--results", str(results), *more])
        return out.read_text(), list(measured), json.loads(results.read_text())

    return program


def test_cells_are_measured_once_and_told(run):
    text, measured, kept = run(CHOSEN[:2])
    assert measured == CHOSEN[:2] and text.count("not measured") > 20
    text, measured, kept = run(CHOSEN)
    assert measured == CHOSEN[2:]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| with", "| SFT"))]
    told = {(row[0].strip("| "), row[1]) for row in rows if "not measured" not in row[3]}
    assert told == {
        *(("with", way.name) for way in WAYS if not way.compiled), ("SFT", BEST.name), ("without", f"{LIVE}, {BEST.name}"),
        ("with", LLAVA_KD),
    }  # fmt: skip
    assert all(row[6].endswith("%") for row in rows if (row[0].strip("| "), row[1]) in told)
    for cell in CHOSEN:
        if cell.kind == "profile":
            parts = kept["results"][cell.key]["parts"]
            assert sum(took for part, took in parts.items() if part != "step") == pytest.approx(parts["step"])
            assert {
                "vision tower",
                "switch pathway",
                "products of the LM heads",
                "backward",
                "optimizer",
            } < parts.keys()
    flops = {key: found["flops"] for key, found in kept["results"].items() if "flops" in found and "; with; " in key}
    same = {found for key, found in flops.items() if key.startswith("step")}
    assert len(same) == 1 and flops[CHOSEN[-1].key] > same.pop()  # the same work in every way; a live teacher's is more


def test_goals_stand_beside_what_was_measured():
    """Two batches of the fastest way, one of another; a teacher in fp8 computes something else and counts for nothing."""
    took = {"flops": 8e12, "held": 1e9, "peak": 9e9, "transfer_seconds": 0.008}
    results = {
        Cell("peak").key: {"tflops": 100.0, "fp8_tflops": 150.0},
        Cell("step", BEFORE, "with", 16).key: took | {"seconds": 1.6},
        Cell("step", BEST, "with", 16).key: took | {"seconds": 0.8},
        Cell("step", BEST, "with", 32).key: took | {"seconds": 0.64, "flops": 16e12},
        Cell("step", FP8_BEST, "with", 16).key: took | {"seconds": 0.1},
        Cell("profile", BEST, "with", 16).key: {"parts": {"step": 0.8, "loss beside the products": 0.04}},
        Cell(LIVE, BEST, "with", 16).key: took | {"seconds": 0.48},
        Cell(LLAVA_KD, BEFORE, "with", 16).key: {"failed": "does not fit"},
    }
    rows = {line.split(" | ")[0]: line for line in step_gpu_table.goals(results, (16, 32), 100.0)}
    assert rows["| ms a sample, with switch"] == f"| ms a sample, with switch | 83 | 41.5 | 20.0 | {BEST.name}, 32 |"
    assert " | 40% | 25.0% | " in rows["| MFU, with switch"]
    assert rows["| ms a sample, SFT"].count("not measured") == rows["| MFU, without switch"].count("not measured") == 1
    assert " | 5.0% | " in rows["| loss beside the heads' products, of a step"]
    assert " | 1.20 |  | 1.50 | " in rows[f"| times as fast as {LIVE}, with switch"]
    assert "not measured" in rows[f"| times as fast as {LLAVA_KD}, with switch"]
    assert "| 500 | no more | 500 |" in rows["| MB a sample, with switch"]
    assert " | 1.0% | " in rows["| copy of a batch to the device, of a step"]
    assert "| 1.50 |" in rows["| float8 product over bfloat16's"]


def test_results_of_another_device_are_not_mixed(run, monkeypatch):
    run(CHOSEN[:1])
    monkeypatch.setattr(step_gpu, "describe", lambda device: {"device": "other", "torch": "1", "transformers": "1"})
    text, measured, _ = run(CHOSEN[:1])
    assert measured == CHOSEN[:1] and text.startswith("other, torch 1")


def test_a_cell_in_a_process_and_one_that_fails(monkeypatch, tmp_path):
    assert step_gpu.in_a_process(Cell("peak"), "tiny", "cpu", 120)["tflops"] > 0
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho 'RuntimeError: no kernel image' >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(step_gpu.sys, "executable", str(failing))
    assert step_gpu.in_a_process(Cell("peak"), "tiny", "cpu", 120) == {
        "failed": "failed: RuntimeError: no kernel image"
    }


def test_the_list_of_cells_has_every_row_of_the_table():
    every = step_gpu.cells((16, 32))
    assert len({cell.key for cell in every}) == len(every)
    assert {(cell.way, cell.objective) for cell in every if cell.kind == "step" and cell.batch == 16} == {
        (way, objective) for way in WAYS for objective in step_gpu_cells.OBJECTIVES if way.fits(objective)
    }
    assert [cell.kind for cell in every[:3]] == ["peak", "kernels", "step"]
