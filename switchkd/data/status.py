"""Whether a sample can be used, and if not, why."""

from enum import IntEnum

from switchkd.errors import DataError


class Status(IntEnum):
    """Whether a sample can be used, and if not, why; stores keep the number."""

    OK = 0
    NO_CONVERSATION = 1  # no list of turns, or an empty one
    BAD_TURN = 2  # a turn without a role or without text, or that the template or the tokenizer cannot write as it is
    UNKNOWN_ROLE = 3
    ROLES_OUT_OF_ORDER = 4  # turns must alternate user, assistant, … and end with the assistant
    SEVERAL_IMAGES = 5
    MARKER_WITHOUT_IMAGE = 6  # <image> in a row that names no image, or in an answer
    IMAGE_OUTSIDE_FOLDER = 7
    IMAGE_MISSING = 8
    IMAGE_UNREADABLE = 9
    IMAGE_TOO_LARGE = 10
    TOO_LONG = 11
    NOTHING_SUPERVISED = 12

    @property
    def label(self) -> str:
        """The name in reports and manifests."""
        return self.name.lower()


class BadSample(DataError):
    """A sample that cannot be used: the reason (`status`), a description (`detail`), and its length in tokens if known."""

    def __init__(self, status: Status, detail: str, tokens: int | None = None) -> None:
        super().__init__(f"{status.label}: {detail}")
        self.status = status
        self.detail = detail
        self.tokens = tokens

    def __reduce__(self) -> tuple[type["BadSample"], tuple[Status, str, int | None]]:
        """Pickle the arguments instead of the message, since worker processes send these errors to their parent."""
        return BadSample, (self.status, self.detail, self.tokens)
