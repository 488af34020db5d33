"""Row 17: a checkpoint's chat template that loops, recurses or takes memory ends in an error, in every process."""

import os
import threading

import broken_checkpoints as broken
import chat_templates
import pytest
import tiny
from torch.utils.data import DataLoader, Dataset

from switchkd.data import bounded_render
from switchkd.data.bounded_render import RenderExceeded, RenderFailed, render
from switchkd.data.chat_template import TemplateExceeds, open_chat_template
from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import load_template
from switchkd.data.samples import BadSample, Status, read_row
from switchkd.errors import CheckpointError, ConfigError
from switchkd.models.checkpoint import open_checkpoint

CHATML, with_chat = chat_templates.CHATML, chat_templates.with_chat
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
EXCEEDING = {
    "loops": (ENDLESS, "does not end: more than 0.5 seconds"),
    "branches": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "does not end",
    ),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    "one large text": ("{{ 'a' * 100000000000 }}", "more than 1024 MiB of memory"),
    "doubling": (
        "{% set n = namespace(t='ab') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
        "MiB of memory|does not end",
    ),
    "a wide field": ("{{ '%9999999999d' % 1 }}", "MiB of memory|fails|too"),
    "a number without end": ("{{ 9 ** (9 ** 9) }}", "does not end|memory"),
    "much text": ("{% for i in range(99999) %}{{ 'abcdefgh' * 100 }}{% endfor %}", "characters of one conversation"),
    "nested too deep": ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "calls itself without end|it was ended"),
}  # fmt: skip


@pytest.fixture
def impatient(monkeypatch):
    """Half a second for a rendering. The last process is left with the old settings, so a new one is made."""
    monkeypatch.setattr(bounded_render, "RENDER_SECONDS", 0.5)


def request(source, content="what ?"):
    return {"conversations": [[{"role": "user", "content": content}]], "chat_template": source}


@pytest.mark.parametrize("how", EXCEEDING)
def test_row_17_a_template_that_takes_too_much(impatient, how):
    source, message = EXCEEDING[how]
    with broken.bounded(), pytest.raises(RenderFailed, match=message):
        render(request(source))
    assert render(request("{{ messages[0].content }}")) == ("what ?", [])  # and the next one is rendered


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no') }}", "no"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7].content }}", "undefined|no element"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{% include '/etc/passwd' %}", "no loader|loader"),
        ("{{ {}['x'].y }}", "undefined|no attribute"),
    ],
)
def test_row_17_a_template_that_fails(source, message):
    with pytest.raises(RenderFailed, match=message) as caught:
        render(request(source))
    assert not isinstance(caught.value, RenderExceeded)


def test_row_17_opening_refuses_the_template(impatient):
    for source in (ENDLESS, CHATML + ENDLESS):
        with (
            broken.bounded(),
            pytest.raises(TemplateExceeds, match="chat template: it does not end.*another --template"),
        ):
            open_chat_template(source, {}, "<image>", [])


def test_row_17_a_row_at_which_the_template_begins_to_loop(with_chat, impatient):
    """The probe of its opening does not show it; the run stops instead of waiting at every such row."""
    checkpoint = open_checkpoint(with_chat)
    checkpoint.tokenizer.chat_template = CHATML + "{% if 'red' in messages[0].content %}" + ENDLESS + "{% endif %}"
    encoder = SampleEncoder(checkpoint, load_template("chat", checkpoint), None, 64)
    encoder.encode(read_row({"conversations": tiny.conversation(("what ?", "a"))}, 0))
    with pytest.raises(ConfigError, match=rf"row 5, {with_chat}: the checkpoint's chat template: it does not end"):
        encoder.encode(read_row({"conversations": tiny.conversation(("red ?", "a"))}, 5))


def test_row_17_a_row_at_which_the_template_fails_is_skipped(with_chat):
    checkpoint = open_checkpoint(with_chat)
    checkpoint.tokenizer.chat_template = CHATML + "{% if 'red' in messages[0].content %}{{ 1 / 0 }}{% endif %}"
    encoder = SampleEncoder(checkpoint, load_template("chat", checkpoint), None, 64)
    with pytest.raises(BadSample, match="row 5: template chat: the template fails: division by zero") as caught:
        encoder.encode(read_row({"conversations": tiny.conversation(("red ?", "a"))}, 5))
    assert caught.value.status is Status.BAD_TURN


def test_a_damaged_file_of_a_chat_template(with_chat, tmp_path):
    folder = broken.copy(with_chat, tmp_path / "ckpt")
    (folder / "chat_template.jinja").unlink()
    checkpoint = open_checkpoint(folder)
    for text in ("{", "[]", "3", '{"chat_template": 3}', '{"chat_template": {"tool": "x"}}'):
        (folder / "chat_template.json").write_text(text)
        with pytest.raises((CheckpointError, ConfigError), match=str(folder)):
            load_template("chat", checkpoint)


class Rendering(Dataset):
    """Renders in a loader process; an item says where."""

    def __len__(self):
        return 4

    def __getitem__(self, item):
        bounded_render.RENDER_SECONDS = 0.5
        with pytest.raises(RenderExceeded):
            render(request(ENDLESS))
        return os.getpid(), render(request("{{ messages[0].content }}", str(item)))[0]


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_loader_processes_render(context, monkeypatch):
    monkeypatch.setattr(bounded_render, "RENDER_SECONDS", 10)
    render(request("x"))  # so that a forked one inherits a renderer, which it must not use
    loader = DataLoader(Rendering(), batch_size=None, num_workers=2, multiprocessing_context=context)
    found = list(loader)
    assert [text for _, text in found] == ["0", "1", "2", "3"]
    assert len({process for process, _ in found} | {os.getpid()}) == 3
    assert render(request("y"))[0] == "y"


def test_threads_take_turns():
    found = {}

    def work(number):
        for _ in range(20):
            found.setdefault(number, set()).add(render(request("{{ messages[0].content }}", str(number)))[0])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: {str(number)} for number in range(4)}


def test_long_conversations_and_odd_characters():
    """More than a pipe holds in both directions, and characters that only JSON's escapes keep."""
    text = "täx\ud800\u2028\0" * 100_000
    assert render(request("{{ messages[0].content }}{{ messages[0].content }}", text))[0] == text * 2


def test_the_process_ends_with_its_parent(tmp_path):
    """Nothing is left behind, and nobody waits for its output, whether the parent ends or is killed."""
    import subprocess
    import sys

    code = (
        "import os, signal, sys\nfrom switchkd.data import bounded_render as b\n"
        "b.render({'conversations': [[{'role': 'user', 'content': 'a'}]], 'chat_template': 'x'})\n"
        "print(next(iter(b._renderers.values()))._process, flush=True)\n"
    )
    for end in ("", "os.kill(os.getpid(), signal.SIGKILL)"):
        done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, timeout=60)
        process = int(done.stdout)
        for _ in range(50):
            state = _state(process)
            if state in (None, "Z"):
                break
            threading.Event().wait(0.1)
        assert state in (None, "Z")


def _state(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return None
