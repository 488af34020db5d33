"""A stand-in for the `switchkd` command that starts at once, for tests that run many of them.

    python tests/helpers/warm_switchkd.py serve SOCKET      imports torch and transformers once, then forks for every command
    python -SE tests/helpers/warm_switchkd.py SOCKET …      what a shell calls instead of `switchkd …`; imports nothing heavy

The child works in the caller's folder, environment and files (standard input, output and error are passed over the socket), so
pipes, redirections and exit codes are those of the real command. `python FILE` and `python -` are served the same way.
"""

import json
import os
import socket
import sys
from pathlib import Path


def call(path: str, words: list[str]) -> int:
    """Run one command in a child of the server, and return its exit code."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(line, [len(request).to_bytes(4, "little")], [0, 1, 2])
        line.sendall(request)
        return line.recv(1)[0]


def serve(path: str) -> None:
    """Fork for every caller until standard input ends."""
    import importlib
    import select
    import signal

    import torch

    for name in ("ablation.ablate", "capture.audit", "capture.dry_run", "reporting.attend", "reporting.report"):
        importlib.import_module(f"switchkd.pipelines.{name}")
    importlib.import_module("matplotlib.pyplot")
    torch.set_num_threads(1)  # a fork of a process with a pool of threads may hang
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()
        print("ready", flush=True)
        while 0 not in select.select([door, 0], [], [])[0]:
            line, _ = door.accept()
            if os.fork() == 0:
                _answer(line)
            line.close()


def _answer(line: socket.socket) -> None:
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(line, 4, 3)
    size, request = int.from_bytes(head, "little"), b""
    while len(request) < size:
        request += line.recv(size - len(request))
    words, folder, environment = json.loads(request)
    for target, file in enumerate(files):
        os.dup2(file, target)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = _run(words)
    sys.stdout.flush()
    sys.stderr.flush()
    line.sendall(bytes([code]))
    os._exit(0)


def _run(words: list[str]) -> int:
    import traceback

    program, *arguments = words
    try:
        if program == "switchkd":
            from switchkd.cli.main import main

            main(arguments, prog_name="switchkd")
        else:
            source = sys.stdin.read() if arguments[0] == "-" else Path(arguments[0]).read_text(encoding="utf-8")
            sys.argv = arguments
            exec(compile(source, arguments[0], "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(call(sys.argv[1], sys.argv[2:]))
