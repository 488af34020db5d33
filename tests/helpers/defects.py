"""The defects of LLaVA-1.5-558K and Mix-665K made small: one row of each kind, and what each becomes."""

import io
from pathlib import Path

import tiny
from PIL import Image

from switchkd.data.samples import Status

_ASK = ("<image>\nwhat color is it ?", "red")
_LONG = "what is it ? " * 30  # 120 tokens and more; `MAX_LENGTH` refuses it
MAX_LENGTH = 64

# (name of the defect, row, what it becomes). Images: see `_write_images`.
_ROWS: list[tuple[str, dict, Status]] = [
    ("string id", {"id": "000000033471", "image": "coco/train2017/1.jpg", "conversations": [_ASK]}, Status.OK),
    ("integer id", {"id": 33471, "image": "coco/train2017/2.jpg", "conversations": [_ASK]}, Status.OK),
    ("missing OCR-VQA image", {"id": "a", "image": "ocr_vqa/images/1.jpg", "conversations": [_ASK]}, Status.IMAGE_MISSING),
    ("another one", {"id": "b", "image": "ocr_vqa/images/2.jpg", "conversations": [_ASK]}, Status.IMAGE_MISSING),
    ("JPEG cut short", {"id": "c", "image": "gqa/cut.jpg", "conversations": [_ASK]}, Status.IMAGE_UNREADABLE),
    ("web page behind .jpg", {"id": "d", "image": "gqa/page.jpg", "conversations": [_ASK]}, Status.IMAGE_UNREADABLE),
    ("empty file", {"id": "e", "image": "gqa/empty.jpg", "conversations": [_ASK]}, Status.IMAGE_UNREADABLE),
    ("GIF behind .jpg", {"id": "f", "image": "ocr_vqa/images/gif.jpg", "conversations": [_ASK]}, Status.OK),
    ("animation behind .jpg", {"id": "g", "image": "ocr_vqa/images/moving.jpg", "conversations": [_ASK]}, Status.OK),
    ("grey image", {"id": "h", "image": "vg/VG_100K/grey.jpg", "conversations": [_ASK]}, Status.OK),
    ("CMYK image", {"id": "i", "image": "vg/VG_100K/cmyk.jpg", "conversations": [_ASK]}, Status.OK),
    ("palette with alpha", {"id": "j", "image": "textvqa/palette.png", "conversations": [_ASK]}, Status.OK),
    ("text only", {"id": "wgByO4Y_0", "model": "", "conversations": [("what is it ?", "a circle")]}, Status.OK),
    ("several turns", {"id": "k", "image": "coco/train2017/1.jpg", "conversations": [_ASK, ("it ?", "red")]}, Status.OK),
    ("marker at the end", {"image": "coco/train2017/1.jpg", "conversations": [("what is it ?\n<image>", "red")]}, Status.OK),
    ("marker in the middle", {"image": "coco/train2017/1.jpg", "conversations": [("is <image> it ?", "red")]}, Status.OK),
    ("image without marker", {"image": "coco/train2017/1.jpg", "conversations": [("what is it ?", "red")]}, Status.OK),
    ("marker without image", {"id": "l", "conversations": [_ASK]}, Status.MARKER_WITHOUT_IMAGE),
    ("over-long", {"image": "coco/train2017/1.jpg", "conversations": [(_LONG, "red")]}, Status.TOO_LONG),
    ("over-long text", {"conversations": [(_LONG, "red")]}, Status.TOO_LONG),
]  # fmt: skip
# Conversations that are not pairs of question and answer.
_ODD: list[tuple[str, list[dict], Status]] = [
    ("begins with the answer", tiny.conversation(("what ?", "a"), ("it ?", "a"))[1:], Status.ROLES_OUT_OF_ORDER),
    ("ends with a question", tiny.conversation(("what ?", "a"), ("it ?", "a"))[:-1], Status.ROLES_OUT_OF_ORDER),
    ("no turns", [], Status.NO_CONVERSATION),
]

ROWS = [row | {"conversations": tiny.conversation(*row["conversations"])} for _, row, _ in _ROWS]
ROWS += [{"id": name, "conversations": turns} for name, turns, _ in _ODD]
NAMES = [name for name, *_ in (*_ROWS, *_ODD)]
STATUSES = [status for *_, status in (*_ROWS, *_ODD)]


def write(folder: Path) -> Path:
    """Write the data file and its images; returns the file, images are in `folder/images`."""
    path = tiny.data(folder, ROWS, images=False)
    _write_images(folder / "images")
    return path


def _write_images(folder: Path) -> None:
    picture = Image.open(tiny.image(folder / "plain.png", 0))
    for place in ("coco/train2017", "ocr_vqa/images", "gqa", "vg/VG_100K", "textvqa"):
        (folder / place).mkdir(parents=True)
    for name in ("1", "2"):
        picture.save(folder / f"coco/train2017/{name}.jpg")
    whole = io.BytesIO()
    picture.save(whole, "JPEG")
    (folder / "gqa/cut.jpg").write_bytes(whole.getvalue()[:-200])
    (folder / "gqa/page.jpg").write_text("<html>404</html>")
    (folder / "gqa/empty.jpg").touch()
    picture.save(folder / "ocr_vqa/images/gif.jpg", "GIF")
    frames = [picture, picture.rotate(180)]
    frames[0].save(folder / "ocr_vqa/images/moving.jpg", "GIF", save_all=True, append_images=frames[1:])
    picture.convert("L").save(folder / "vg/VG_100K/grey.jpg")
    picture.convert("CMYK").save(folder / "vg/VG_100K/cmyk.jpg")
    picture.convert("P").save(folder / "textvqa/palette.png", transparency=0)
