"""The rules of the tree: imports go one way, floor by floor; the command line starts at once; public names are documented."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# folder → prefixes of `switchkd` that it may import
ALLOWED = {
    "switchkd": ("switchkd",),
    "stores": ("switchkd.stores", "switchkd.errors", "switchkd.settings", "switchkd.counting"),
    "pipelines": ("switchkd",),
    "cli": ("switchkd",),
}
FORBIDDEN = {
    "switchkd": ("switchkd.stores", "switchkd.pipelines", "switchkd.cli"),
    "stores": ("torch", "transformers", "switchkd.pipelines", "switchkd.cli"),
    "pipelines": ("switchkd.cli",),
    "cli": (),
}

# Room → floor. A room is a folder, or one file of a folder whose files stand on several floors; the longest name that fits a file
# counts. A room imports itself and what stands below, never its own floor or what is above: imports inside functions count, too.
FLOORS = {
    "switchkd/__init__.py": 0,
    "switchkd/collector.py": 0,
    "switchkd/counting.py": 0,
    "switchkd/errors.py": 0,
    "switchkd/library_errors.py": 1,
    "switchkd/positions.py": 1,
    "switchkd/printable.py": 0,
    "switchkd/settings.py": 1,
    "switchkd/waits.py": 1,
    "switchkd/fingerprints.py": 2,
    "switchkd/losses": 2,
    "switchkd/models": 3,
    "switchkd/data": 4,
    "stores/storage": 2,
    "stores": 3,
    "pipelines/__init__.py": 0,
    "pipelines/progress.py": 2,
    "pipelines/options.py": 1,
    "pipelines/cores.py": 1,
    "pipelines/drawing.py": 1,
    "pipelines/shipped.py": 1,
    "pipelines/mixture.py": 2,
    "pipelines/given.py": 3,
    "pipelines/run_folder.py": 2,
    "pipelines/doctor.py": 4,
    "pipelines/stopwatch.py": 3,
    "pipelines/checkpoints": 4,
    "pipelines/batch.py": 4,
    "pipelines/stored_teacher.py": 5,
    "pipelines/model_template.py": 5,
    "pipelines/visual_advantage.py": 5,
    "pipelines/own_loop.py": 6,
    "pipelines/preflight": 6,
    "pipelines/evaluation": 6,
    "pipelines/evaluation/benchmarks": 7,
    "pipelines/capture/backends": 6,
    "pipelines/capture": 7,
    "pipelines/emoji_vqa": 7,
    "pipelines/training/lifecycle": 6,
    "pipelines/training": 7,
    "pipelines/release": 8,
    "pipelines/project": 8,
    "pipelines/reporting": 8,
    "pipelines/demo": 8,
    "pipelines/ablation": 9,
    "cli": 10,
}
MODULES = {
    "switchkd": "switchkd",
    "stores": "switchkd.stores",
    "pipelines": "switchkd.pipelines",
    "cli": "switchkd.cli",
}


def files_of_the_package():
    """Return {module: path from the root}."""
    found = {}
    for folder, package in MODULES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in inside if part != "__init__")))] = path.relative_to(
                ROOT
            ).as_posix()
    return found


def room_of(path):
    fitting = [room for room in FLOORS if path == room or path.startswith(f"{room}/")]
    assert fitting, f"{path} stands on no floor: give its folder one in FLOORS"
    return max(fitting, key=len)


def test_every_import_goes_to_a_lower_floor():
    files = files_of_the_package()
    found = []
    for path in files.values():
        for name in imports_of(ROOT / path):
            if name in files and room_of(path) != room_of(files[name]):
                here, there = room_of(path), room_of(files[name])
                if FLOORS[there] >= FLOORS[here]:
                    found.append(f"{path} (floor {FLOORS[here]}) imports {files[name]} (floor {FLOORS[there]})")
    assert found == []


def test_folders_do_not_import_each_other():
    """Floors of single files could hide a circle of their folders."""
    files = files_of_the_package()
    needs = {}
    for path in files.values():
        here = str(Path(path).parent)
        there = {str(Path(files[name]).parent) for name in imports_of(ROOT / path) if name in files}
        needs.setdefault(here, set()).update(there - {here})

    def reached(folder):
        seen, waiting = set(), [folder]
        while waiting:
            new = needs.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    assert [folder for folder in needs if folder in reached(folder)] == []


def test_no_room_is_crowded():
    files = list(files_of_the_package().values())
    rooms = Counter(str(Path(path).parent) for path in files)
    assert {room: count for room, count in rooms.items() if count > 25} == {}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def starts_with(name, prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports_of(path):
            assert not starts_with(name, FORBIDDEN[folder]), f"{path.relative_to(ROOT)} imports {name}"
            if name.startswith("switchkd."):
                assert starts_with(name, ALLOWED[folder]), f"{path.relative_to(ROOT)} imports {name}"


def test_stores_do_not_load_torch():
    code = "import sys, switchkd.stores; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom switchkd.cli.main import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'zarr', 'numpy', 'datasets', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_public_name_has_a_docstring():
    for folder in ALLOWED:
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            named = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
            for node in named:
                if not node.name.startswith("_") and node.col_offset == 0:
                    assert ast.get_docstring(node), f"{path.relative_to(ROOT)}: {node.name}"
