"""The tables of `step_gpu.py`, with "not measured" where nothing was."""

from typing import Any

from step_gpu_cells import BEFORE, BEST, KERNELS, LIVE, LLAVA_KD, OBJECTIVES, WAYS, Cell, Way

NOT_MEASURED = "not measured"


def table(results: dict[str, Any], about: dict[str, str], batches: tuple[int, ...], made_by: str) -> list[str]:
    """Return the tables of all results, with "not measured" where there is none."""
    peak = results.get(Cell("peak").key, {}).get("tflops")
    lines = [
        f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}, bfloat16; a large product of matrices: "
        f"{f'{peak:,.0f} TFLOP/s' if peak else NOT_MEASURED}; made by `{made_by}`.",
        "",
        *goals(results, batches, peak),
        "",
        "| kernel | check before a run |",
        "| --- | --- |",
    ]
    kernels = results.get(Cell("kernels").key, {})
    lines += [f"| {name} | {kernels.get(name, NOT_MEASURED)} |" for name in KERNELS]
    lines += [
        "",
        "A step, at the batch with the least time a sample. Memory a sample is what a step adds to what is held between steps.",
        "",
        "| switch | way | batch | ms a step | ms a sample | times as fast as before | MFU | memory a sample, MB "
        "| graphs compiled, frames not |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for objective in OBJECTIVES:
        base = best_of(results, "step", BEFORE, objective, batches)
        rows = [("step", way, way.name) for way in WAYS if way.fits(objective)]
        rows += [] if objective == "SFT" else [(LIVE, BEST, f"{LIVE}, {BEST.name}"), (LLAVA_KD, BEFORE, LLAVA_KD)]
        lines += [
            row_of(objective, name, best_of(results, kind, way, objective, batches), base, peak)
            for kind, way, name in rows
        ]
    lines += [
        "",
        f"Parts of a step with switch, {batches[0]} samples, ms.",
        "",
        f"| part | {BEFORE.name} | {BEST.name} |",
        "| --- | ---: | ---: |",
    ]
    found = [results.get(Cell("profile", way, "with", batches[0]).key, {}).get("parts", {}) for way in (BEFORE, BEST)]
    names = list(found[0] or found[1]) or ["step"]
    for part in names:
        lines.append(
            f"| {part} | "
            + " | ".join(f"{1e3 * each[part]:,.1f}" if part in each else NOT_MEASURED for each in found)
            + " |"
        )
    return lines


# What a step took on an H100 at 5 samples before these ways, and what it should take: ms a sample, MFU; with switch, without, SFT.
EARLIER_MS, EARLIER_MFU = (83.0, 45.0, 39.0), ("14%", "", "10%")
GOAL_MFU = (0.40, 0.35, 0.35)


def goals(results: dict[str, Any], batches: tuple[int, ...], peak: float | None) -> list[str]:
    """Return the table of goals: earlier, goal, and the best way that computes the same (a teacher in fp8 does not)."""
    lines = ["| | H100, 5 samples, earlier | goal | measured | way, batch |", "| --- | ---: | ---: | ---: | --- |"]
    fastest = {objective: fastest_of(results, objective, batches) for objective in OBJECTIVES}
    for number, objective in enumerate(OBJECTIVES):
        name = objective if objective == "SFT" else f"{objective} switch"
        sample, mfu, way = (NOT_MEASURED, NOT_MEASURED, "")
        if (found := fastest[objective]) is not None:
            sample, way = f"{1e3 * found[2]['seconds'] / found[1]:,.1f}", f"{found[0]}, {found[1]}"
            mfu = f"{found[2]['flops'] / found[2]['seconds'] / peak / 1e12:.1%}" if peak else NOT_MEASURED
        lines.append(
            f"| ms a sample, {name} | {EARLIER_MS[number]:.0f} | {EARLIER_MS[number] / 2:.1f} | {sample} | {way} |"
        )
        lines.append(f"| MFU, {name} | {EARLIER_MFU[number]} | {GOAL_MFU[number]:.0%} | {mfu} | {way} |")
    parts = results.get(Cell("profile", BEST, "with", batches[0]).key, {}).get("parts")
    share = NOT_MEASURED if parts is None else f"{parts['loss beside the products'] / parts['step']:.1%}"
    lines.append(
        f"| loss beside the heads' products, of a step | 6 to 14% | 10% | {share} | {BEST.name}, {batches[0]} |"
    )
    for kind, way, least in ((LIVE, BEST, ""), (LLAVA_KD, BEFORE, "3.00")):
        for objective, earlier in zip(OBJECTIVES[:2], ("1.20", "1.37"), strict=True):
            batch, other = best_of(results, kind, way, objective, batches)
            mine, ratio = fastest[objective], NOT_MEASURED
            if mine is not None and "seconds" in other:
                ratio = f"{other['seconds'] / batch / (mine[2]['seconds'] / mine[1]):.2f}"
            before = earlier if kind == LIVE else ""
            lines.append(f"| times as fast as {kind}, {objective} switch | {before} | {least} | {ratio} | |")
    memory = []
    for way in (BEFORE, BEST):
        found_there = results.get(Cell("step", way, "with", batches[0]).key, {})
        has_peak = found_there.get("peak")
        memory.append(f"{(has_peak - found_there['held']) / batches[0] / 1e6:,.0f}" if has_peak else NOT_MEASURED)
    lines.append(f"| MB a sample, with switch | {memory[0]} | no more | {memory[1]} | {BEST.name}, {batches[0]} |")
    step = results.get(Cell("step", BEST, "with", batches[0]).key, {})
    copied = f"{step['transfer_seconds'] / step['seconds']:.1%}" if "transfer_seconds" in step else NOT_MEASURED
    lines.append(f"| copy of a batch to the device, of a step | | 1% | {copied} | {BEST.name}, {batches[0]} |")
    rate = results.get(Cell("peak").key, {}).get("fp8_tflops")
    lines.append(
        f"| float8 product over bfloat16's | | | {f'{rate / peak:.2f}' if rate and peak else NOT_MEASURED} | |"
    )
    return lines


def fastest_of(
    results: dict[str, Any], objective: str, batches: tuple[int, ...]
) -> tuple[str, int, dict[str, Any]] | None:
    """Return (way, batch, result) with the least time a sample of all ways that compute the same; None if none was measured."""
    found = [
        (way.name, batch, each)
        for way in WAYS
        for batch in batches
        if not way.fp8 and "seconds" in (each := results.get(Cell("step", way, objective, batch).key, {}))
    ]
    return min(found, key=lambda each: each[2]["seconds"] / each[1], default=None)


def best_of(
    results: dict[str, Any], kind: str, way: Way, objective: str, batches: tuple[int, ...]
) -> tuple[int, dict[str, Any]]:
    """Return (batch, result) with the least time a sample; of a way that was never measured or never fitted, what is known."""
    found = [(batch, results.get(Cell(kind, way, objective, batch).key, {})) for batch in batches]
    timed = [each for each in found if "seconds" in each[1]]
    if timed:
        return min(timed, key=lambda each: each[1]["seconds"] / each[0])
    return next((each for each in found if each[1]), found[0])


def row_of(
    objective: str, name: str, best: tuple[int, dict[str, Any]], base: tuple[int, dict[str, Any]], peak: float | None
) -> str:
    """Return one row of the table of steps."""
    batch, found = best
    if "seconds" not in found:
        return f"| {objective} | {name} | {batch if found else ''} | {found.get('failed', NOT_MEASURED)} | | | | | |"
    sample = found["seconds"] / batch
    faster = f"{base[1]['seconds'] / base[0] / sample:.2f}" if "seconds" in base[1] else ""
    mfu = f"{found['flops'] / found['seconds'] / peak / 1e12:.1%}" if peak else ""
    memory = f"{(found['peak'] - found['held']) / batch / 1e6:,.0f}" if found["peak"] else NOT_MEASURED
    graphs = f"{found['compiled_graphs']}, {found['not_compiled']}" if "compiled_graphs" in found else ""
    times = f"{1e3 * found['seconds']:,.1f} | {1e3 * sample:,.2f}"
    return f"| {objective} | {name} | {batch} | {times} | {faster} | {mfu} | {memory} | {graphs} |"
