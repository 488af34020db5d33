"""The table of model families for readers, made from `families.FAMILIES`: `switchkd models` and docs/families.md show it."""

from switchkd.models.families import FAMILIES, Family

COLUMNS = (
    "family",
    "projector reads V(x) at",
    "images",
    "type ids",
    "positions",
    "packing",
    "kept prefix",
    "role",
    "VSD",
)


def family_rows() -> list[tuple[str, ...]]:
    """Return one row for each family, with a cell for each of `COLUMNS`."""
    return [_row(family) for family in FAMILIES.values()]


def switch_notes() -> dict[str, str]:
    """Return family → why VSD is off by default for it; without families where it is on."""
    return {name: family.switch_note for name, family in FAMILIES.items() if family.switch_note}


def markdown_table() -> str:
    """Return the table and the notes as Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(_in_code(row) for row in family_rows())]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    notes = "\n".join(f"* `{name}`: VSD is off by default, since {note}." for name, note in switch_notes().items())
    return f"{table}\n\n{notes}"


def _in_code(row: tuple[str, ...]) -> tuple[str, ...]:
    name, cuts, media, types, *rest = row
    code = [", ".join(f"`{word}`" for word in cell.split(", ")) for cell in (name, cuts, media)]
    return (*code, types if types == "none" else f"`{types}`", *rest)


def _row(family: Family) -> tuple[str, ...]:
    positions = "M-RoPE" if family.mrope else f"from {family.first_position}" if family.first_position else "plain"
    return (
        family.model_type,
        ", ".join(family.cuts),
        ", ".join(family.media),
        family.type_ids,
        positions if family.causal else f"{positions}, not causal",
        _yes(family.packs),
        _yes(family.keeps_prefix),
        "teacher" if family.teaches_only else "teacher, student",
        "off by default" if family.switch_note else "on",
    )


def _yes(whether: bool) -> str:
    return "yes" if whether else "no"
