"""Options of `switchkd train` for LoRA, and what they mean together."""

from switchkd.errors import ConfigError
from switchkd.pipelines.options import keyword_options_class, option
from switchkd.settings import LORA_PARTS, Lora

LORA = "LoRA"  # heading of the help


@keyword_options_class
class LoraOptions:
    """Which parts of the student train as LoRA instead of whole."""

    lora: int | None = option(
        default=None,
        at_least=1,
        group=LORA,
        metavar="RANK",
        help="Train the student's LLM as LoRA of this rank, through peft: its weights are frozen, and a product of two small "
        "matrices is added to every linear layer. The other --train-parts train whole.",
        unset="the whole LLM trains",
    )
    lora_alpha: float | None = option(
        default=None,
        above=0,
        group=LORA,
        help="The product of the two matrices is multiplied by this number / RANK.",
        unset="twice the rank",
    )
    lora_dropout: float | None = option(
        default=None, at_least=0, at_most=0.9, group=LORA, help="Dropout of what enters the matrices.", unset="0"
    )
    lora_parts: str | None = option(
        default=None,
        group=LORA,
        help="Parts of the student that train as LoRA: language, vision, or both, separated by a comma.",
        unset="language",
    )
    lora_targets: str | None = option(
        default=None,
        group=LORA,
        metavar="NAMES",
        help="Linear layers that get LoRA, by the last part of their names and separated by commas, such as q_proj,v_proj.",
        unset="every linear layer of the parts' transformer layers",
    )

    def as_lora(self, trained: frozenset[str]) -> Lora | None:
        """Return what trains as LoRA; None without.

        Args:
            trained: the parts of the student that train.

        Raises:
            ConfigError: an option of LoRA without --lora, an unknown part, or one that does not train.
        """
        if self.lora is None:
            for name in ("lora_alpha", "lora_dropout", "lora_parts", "lora_targets"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"--{name.replace('_', '-')} belongs to LoRA: pass --lora RANK, too")
            return None
        parts = _names(self.lora_parts or "language")
        for part in parts:
            if part not in LORA_PARTS:
                raise ConfigError(
                    f"--lora-parts takes {' and '.join(LORA_PARTS)}, separated by a comma; found {part!r}"
                )
            if part not in trained:
                raise ConfigError(
                    f"--lora trains {part}, which --train-parts leaves frozen: add {part} to --train-parts, or leave it out of "
                    "--lora-parts"
                )
        targets = None if self.lora_targets is None else _names(self.lora_targets)
        if targets is not None and not all(targets):
            raise ConfigError(f"--lora-targets takes names separated by commas, found {self.lora_targets!r}")
        alpha = 2.0 * self.lora if self.lora_alpha is None else self.lora_alpha
        return Lora(self.lora, alpha, self.lora_dropout or 0.0, frozenset(parts), targets)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))
