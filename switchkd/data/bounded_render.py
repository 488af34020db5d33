"""Renders a checkpoint's chat template in a process of its own, with a limit on time and memory.

A chat template is a program that comes with a checkpoint. jinja's sandbox keeps it from files and attributes, but not from endless
loops, from recursion that branches, or from `'a' * 10 ** 11`; and a single operation cannot be interrupted from inside a process.
The process is forked on first use, in the main process and in every loader process that renders, and answers one request after the
other over pipes: some 50 µs beside the 100 µs or more that a template takes.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import threading
import time
import warnings
from typing import Any, NoReturn

RENDER_SECONDS = 10.0  # of one rendering; usual ones take a millisecond
RENDER_BYTES = 1 << 30  # more than the process has when it begins
MAX_TEXT = 1 << 24  # characters of a rendered conversation


class RenderFailed(Exception):
    """The template failed; the message says how."""


class RenderExceeded(RenderFailed):
    """The template exceeded a limit; it will for other conversations, too."""


def render(request: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation with transformers' `render_jinja_template`, within limits.

    Args:
        request: its arguments, plain data: `conversations` (one), `chat_template`, `add_generation_prompt`, ….

    Returns:
        The text, and the (begin, end) offsets of its generation blocks.

    Raises:
        RenderFailed, RenderExceeded: see there.
    """
    with _lock:
        renderer = _renderers.get(os.getpid())
        if renderer is None:
            renderer = _renderers[os.getpid()] = _Renderer()
        try:
            answer = renderer.ask(request)
        except BaseException:
            # It may be at work still, and its answer would be taken for that of the next request.
            _renderers.clear()
            renderer.end()
            raise
    if "failed" in answer:
        raise (RenderExceeded if answer["exceeded"] else RenderFailed)(answer["failed"])
    return answer["text"], [(int(begin), int(end)) for begin, end in answer["spans"]]


class _Renderer:
    """A process that renders, and the pipes to it."""

    def __init__(self) -> None:
        # Imported before the fork, so that every process finds them.
        import transformers.utils.chat_template_utils  # noqa: F401

        with contextlib.suppress(ImportError):
            import jinja2.sandbox  # noqa: F401
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads, whose locks a child could wait for; this one takes none of torch's.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if self._process == 0:
            _serve(requests, answers)
        os.close(requests)
        os.close(answers)
        os.set_blocking(self._requests, False)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request. Raises RenderExceeded if none comes in time."""
        deadline = time.monotonic() + RENDER_SECONDS
        message = json.dumps(request).encode() + b"\n"
        answer = b""
        try:
            while message:
                _wait([], [self._requests], deadline)
                message = message[os.write(self._requests, message) :]
            while not answer.endswith(b"\n"):
                _wait([self._answers], [], deadline)
                found = os.read(self._answers, 1 << 20)
                if not found:
                    raise RenderExceeded(_ENDED)
                answer += found
        except BrokenPipeError:
            raise RenderExceeded(_ENDED) from None
        read: dict[str, Any] = json.loads(answer)
        return read

    def close(self) -> None:
        """Close this side of the pipes, which ends the process where no other process has them open."""
        os.close(self._requests)
        os.close(self._answers)

    def end(self) -> None:
        """Kill the process."""
        self.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._process, 0)


_ENDED = f"it was ended: it may have taken more than {RENDER_BYTES >> 20} MiB of memory, or nested too deep"
_renderers: dict[int, _Renderer] = {}  # of this process, by its id
_lock = threading.Lock()


def _forget() -> None:
    """In a process that was forked: it needs a renderer of its own, and its parent's must not wait for it to end."""
    global _lock
    _lock = threading.Lock()
    for renderer in _renderers.values():
        renderer.close()
    _renderers.clear()


os.register_at_fork(after_in_child=_forget)


def _wait(readers: list[int], writers: list[int], deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0 or not any(select.select(readers, writers, [], left)):
        raise RenderExceeded(f"it does not end: more than {RENDER_SECONDS:g} seconds for one conversation")


def _serve(requests: int, answers: int) -> NoReturn:
    """Answer requests until the other side of the pipe is closed; this is the whole life of the forked process."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):  # the parent decides
            signal.signal(number, signal.SIG_IGN)
        # Nothing else of the parent may be held open: sockets, devices, pipes that somebody reads to their end.
        requests, answers = (fcntl.fcntl(pipe, fcntl.F_DUPFD, 3) for pipe in (requests, answers))
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        first, second = sorted((requests, answers))
        for begin, end in ((3, first), (first + 1, second), (second + 1, 1 << 16)):
            os.closerange(begin, end)
        _limit_memory()
        with open(requests, "rb") as reader, open(answers, "wb") as writer:
            for line in reader:
                writer.write(_answer(json.loads(line)))
                writer.flush()
    finally:
        os._exit(0)


def _answer(request: dict[str, Any]) -> bytes:
    from transformers.utils.chat_template_utils import render_jinja_template

    exceeded = ""
    try:
        texts, spans = render_jinja_template(**request)
        if len(texts[0]) <= MAX_TEXT:
            found = spans[0] if request.get("return_assistant_tokens_mask") else []
            return json.dumps({"text": texts[0], "spans": found}).encode() + b"\n"
        exceeded = f"it makes {len(texts[0]):,} characters of one conversation"
    except MemoryError:
        exceeded = f"it takes more than {RENDER_BYTES >> 20} MiB of memory"
    except RecursionError:
        exceeded = "it calls itself without end"
    except Exception as error:  # jinja's, and those of every operation that a template can do
        return json.dumps({"failed": str(error)[:1000] or type(error).__name__, "exceeded": False}).encode() + b"\n"
    return json.dumps({"failed": exceeded, "exceeded": True}).encode() + b"\n"


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = now + RENDER_BYTES if hard == resource.RLIM_INFINITY else min(hard, now + RENDER_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
