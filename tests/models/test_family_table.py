"""`switchkd models`: one row a family, every cell from its entry."""

from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.models.families import FAMILIES
from switchkd.models.family_table import COLUMNS, family_rows, markdown_table


def test_every_family_has_a_row():
    told = CliRunner().invoke(main, ["models"])
    assert told.exit_code == 0, told.output
    lines = told.output.splitlines()
    assert [line.split()[0] for line in lines[1 : len(FAMILIES) + 1]] == list(FAMILIES)
    for name, family in FAMILIES.items():
        if family.switch_note:
            assert f"{name}: VSD is off by default, since {family.switch_note}." in lines


def test_cells_are_those_of_the_entries():
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in family_rows()}
    assert rows["qwen3_vl"]["projector reads V(x) at"] == "visual.merger, visual.deepstack_merger_list.*"
    assert rows["qwen3_vl"]["positions"] == "M-RoPE" and rows["qwen3_vl"]["kept prefix"] == "no"
    assert rows["qwen3_vl_moe"]["role"] == "teacher"
    assert rows["gemma3"]["packing"] == "no" and rows["gemma3"]["VSD"] == "off by default"
    assert rows["gemma3"]["type ids"] == "token_type_ids = image"
    assert rows["paligemma"]["positions"] == "from 1, not causal"
    assert rows["llava"]["VSD"] == "on" and rows["llava"]["type ids"] == "none"


def test_the_markdown_has_the_same_cells():
    table = [line.strip("| ").split(" | ") for line in markdown_table().splitlines() if line.startswith("|")]
    assert [[cell.replace("`", "") for cell in line] for line in table[2:]] == [list(row) for row in family_rows()]
