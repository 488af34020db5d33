"""The house's rules: imports go one way, the command line starts at once, files stay readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# folder → prefixes of `switchkd` that it may import
ALLOWED = {
    "switchkd": ("switchkd",),
    "stores": ("switchkd.stores", "switchkd.errors"),
    "pipelines": ("switchkd",),
    "cli": ("switchkd",),
}
FORBIDDEN = {
    "switchkd": ("switchkd.stores", "switchkd.pipelines", "switchkd.cli"),
    "stores": ("torch", "transformers", "switchkd.pipelines", "switchkd.cli"),
    "pipelines": ("switchkd.cli",),
    "cli": (),
}


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
