"""`switchkd chat`: a conversation with a model about an image, with streamed answers."""

from collections.abc import Callable

from switchkd.data.encoded import Prompt
from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import CHECKPOINT_TEMPLATE, load_template
from switchkd.data.samples import BadSample, Status
from switchkd.data.templates import IMAGE_MARKER, ConversationFormat
from switchkd.errors import ConfigError, DataError
from switchkd.models.checkpoint import Checkpoint, open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.evaluation.generation import GreedyGenerator
from switchkd.pipelines.model_template import template_of_run
from switchkd.pipelines.release.options import ChatOptions


class Chat:
    """A conversation about one image, or none.

    Raises:
        InputError: model, image or template cannot be used.
    """

    def __init__(self, options: ChatOptions) -> None:
        checkpoint = open_checkpoint(options.model, options.trust_remote_code)
        template = template_of(checkpoint, options.template)
        self.encoder = SampleEncoder(checkpoint, template, None, options.max_length)
        self.image, self.name = None, str(options.image)
        if options.image is not None:
            if not options.image.is_file():
                raise DataError(f"no image {options.image}")
            self.image = options.image.read_bytes()
        self.turns: list[tuple[str, str]] = []
        self._prompt("?")  # an unreadable image is reported before the weights are loaded
        model = load_model(checkpoint, dtype=options.dtype).to(options.device)
        self._answerer = GreedyGenerator(model, self.encoder, template, options.max_new_tokens)

    def ask(self, question: str, heard: Callable[[str], None]) -> str:
        """Return the answer to a question, given all earlier turns, and stream its words while they are generated.

        If the conversation becomes too long, a new one starts with this question.

        Raises:
            BadSample: the question alone is too long, or contains the image marker.
        """
        if IMAGE_MARKER in question:
            raise BadSample(
                Status.MARKER_WITHOUT_IMAGE, f"a question holds {IMAGE_MARKER}; the image stands before the first"
            )
        try:
            prompt = self._prompt(question)
        except BadSample as bad:
            if bad.status is not Status.TOO_LONG or not self.turns:
                raise
            self.turns = []
            prompt = self._prompt(question)
        answer = self._answerer.say(prompt, heard)
        self.turns.append((question, answer))
        return answer

    def _prompt(self, question: str) -> Prompt:
        return self.encoder.encode_turns(
            [*self.turns, (question, "")], [] if self.image is None else [self.image], [self.name]
        )


def template_of(checkpoint: Checkpoint, asked: str | None = None) -> ConversationFormat:
    """Return the template for a model: the requested one, that of the run that trained it, or its own chat template.

    Raises:
        ConfigError: none of them exists.
    """
    if asked is not None:
        return load_template(asked, checkpoint)
    if (trained_with := template_of_run(checkpoint)) is not None:
        return trained_with
    try:
        return load_template(CHECKPOINT_TEMPLATE, checkpoint)
    except ConfigError as error:
        raise ConfigError(
            f"which template {checkpoint.path} was trained with is not known: pass --template ({error})"
        ) from None
