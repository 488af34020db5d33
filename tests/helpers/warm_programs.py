"""A folder for PATH with a `switchkd` and a `python` that start at once; see warm_switchkd.py."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def warm_programs(folder):
    """Write both programs into a folder, and serve them until the block ends."""
    warm, door = Path(__file__).with_name("warm_switchkd.py"), folder / "socket"
    for program in ("switchkd", "python"):
        script = folder / program
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SE "{warm}" "{door}" {program} "$@"\n')
        script.chmod(0o755)
    serve = [sys.executable, warm, "serve", door]
    with subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        yield folder
        server.stdin.close()
