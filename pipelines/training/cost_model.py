"""Cost model of a training run: parameters of each part, memory of a process, and FLOPs of its steps, computed from model sizes.

It runs no model, so the figures are available before the first step. docs/training.md explains each term; a test compares the
memory with what one step keeps, and the FLOPs with torch's own count. Linear attention (Qwen3.5) is counted as full attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from switchkd.fingerprints import component_of
from switchkd.losses.fused import CHUNK_LOGITS
from switchkd.models.components import language_model_of, layers_of, tower_layers_of, tower_of
from switchkd.models.lora import is_lora
from switchkd.pipelines.training.int8_teacher import stored_bytes
from switchkd.pipelines.training.option_checks import PARTS
from switchkd.pipelines.training.student_parts import part_of

# Tensors of a chunk's size that the loss keeps at the same time: logits of student and teacher, their order, a gradient of each.
LOSS_TENSORS = 8


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (parameters, trainable parameters) of each part of the model: vision, projector, language, a baseline's adapters."""
    found = dict.fromkeys((*PARTS, "adapters"), (0, 0))
    for name, parameter in model.named_parameters():
        every, trained = found[part_of(name)]
        found[part_of(name)] = every + parameter.numel(), trained + parameter.numel() * parameter.requires_grad
    return {part: counts for part, counts in found.items() if counts[0]}


@dataclass(frozen=True)
class _Stack:
    """A transformer by its sizes."""

    layers: int
    width: int  # d
    inner: int  # f, of the MLP
    gated: bool  # a SwiGLU MLP and RMSNorm, as language models have
    attention: int  # heads x width of a head
    weights: int  # of the linear layers
    convolved: int  # weights of a patch embedding
    lora: tuple[int, int, int] = (0, 0, 0)  # layers with LoRA: their number, the sum of their inputs, of their ranks
    lora_weights: int = 0  # of A and B, which `weights` contains, too
    lora_dropout: bool = False

    @classmethod
    def of(cls, module: Any) -> "_Stack":
        """Return the sizes of a language model."""
        return cls._of(module, len(layers_of(module)), list(module.modules()))

    @classmethod
    def of_tower(cls, model: Any) -> "_Stack":
        """Return the sizes of a model's vision tower, without what belongs to its projector."""
        tower = tower_of(model)
        own = [module for name, module in model.named_modules() if component_of(f"{name}.") == "vision"]
        return cls._of(tower, len(tower_layers_of(model)), own)

    @classmethod
    def _of(cls, module: Any, layers: int, inside: list[nn.Module]) -> "_Stack":
        config: Any = module.config
        width = getattr(config, "embed_dim", config.hidden_size)  # Qwen2-VL's tower calls its width embed_dim
        heads = getattr(config, "num_attention_heads", None) or config.num_heads
        head = getattr(config, "head_dim", None) or width // heads
        with_lora: list[Any] = [
            m for m in inside if hasattr(m, "lora_A") and isinstance(getattr(m, "base_layer", None), nn.Linear)
        ]
        down = [a for m in with_lora for a in m.lora_A.values()]
        return cls(
            layers=layers,
            width=width,
            inner=getattr(config, "intermediate_size", None) or int(width * config.mlp_ratio),
            gated=any(name.endswith("gate_proj") for name, _ in module.named_modules()),
            attention=heads * head,
            weights=sum(m.weight.numel() for m in inside if isinstance(m, nn.Linear)),
            convolved=sum(m.weight.numel() for m in inside if isinstance(m, nn.Conv2d | nn.Conv3d)),
            lora=(len(down), sum(a.in_features for a in down), sum(a.out_features for a in down)),
            lora_weights=sum(p.numel() for m in with_lora for name, p in m.named_parameters() if "lora_" in name),
            lora_dropout=any(isinstance(drop, nn.Dropout) for m in with_lora for drop in m.lora_dropout.values()),
        )

    def forward_flops(self, tokens: float, pairs: float) -> float:
        """2 FLOPs per weight and token, and 4 per attention unit and pair of tokens (the scores, and the weighted mean)."""
        return 2 * (self.weights + self.convolved) * tokens + 4 * self.layers * self.attention * pairs

    def kept_bytes(self, element: int, trains: bool, checkpointed: bool = False) -> int:
        """Bytes per token that all layers keep for the backward pass; norms compute in float32, the rest in `element` bytes.

        A layer keeps the inputs of its norms, q, k, v and the attention's output, and the inputs of its activation and product;
        a linear layer keeps its input only if its weight trains. With checkpointing, each layer keeps only its input, and one
        layer at a time keeps the rest.

        A layer with LoRA keeps the input of A and that of B. Under autocast and with dropout each such layer has a copy of its
        own of the former, and with dropout a mask of bytes; else layers that read the same tensor share it.
        """
        if checkpointed:
            return self.layers * self.width * element + self.kept_bytes(element, trains) // self.layers
        d, f = self.width, self.inner
        count, inputs, ranks = self.lora
        if count:
            apart = element == 2 or self.lora_dropout
            own = element * ranks + apart * element * inputs + self.lora_dropout * inputs
            return own + replace(self, lora=(0, 0, 0)).kept_bytes(element, trains or not apart)
        attention = 4 * self.attention
        if self.gated:
            values = attention + 3 * f + (4 * d + f if trains else 0)
            return self.layers * (element * values + 4 * 2 * d)
        values = attention + f + 2 * d + (3 * d + f if trains else 0)
        return self.layers * element * values


class Work(NamedTuple):
    """The work done: sums over batches of B rows padded to L tokens, I of them with an image."""

    tokens: float = 0  # B·L, padding included
    pairs: float = 0  # B·L²; for packed samples, B rows of length L
    images: float = 0  # I
    image_tokens: float = 0  # I·L
    image_pairs: float = 0  # I·L²
    positions: float = 0
    image_positions: float = 0
    # Of families whose images become other numbers of patches; 0 for Llava, where both follow from `images`.
    patches: float = 0  # inside the vision tower
    patch_pairs: float = 0
    placeholders: float = 0  # image tokens
    # Of image tokens, those that pass the switch pathway: the rest with `--vsd-share` does not.
    switched_share: float = 1.0


def patches_of(config: Any, media: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (patches inside the vision tower, pairs of patches that attend to each other) of a batch's media, scalars, int64.

    Tiles of zeros are padding. Pairs are those of full attention within an image or tile; a tower with windows has fewer.
    """
    if (grid := media.get("image_grid_thw")) is not None:
        counts = grid.prod(1)
        return counts.sum(), counts.square().sum()
    side = config.vision_config.patch_size
    height, width = (side, side) if isinstance(side, int) else side
    if config.vision_config.model_type == "pixtral":  # images of several sizes, padded to one
        counts = (media["image_sizes"] // media["image_sizes"].new_tensor([height, width])).prod(1)
        return counts.sum(), counts.square().sum()
    tiles = media["pixel_values"].flatten(0, -4)  # [tiles, 3, H, W]
    real = tiles.flatten(1).any(1).sum()
    each = (tiles.shape[-2] // height) * (tiles.shape[-1] // width)
    return real * each, real * each**2


class CostModel:
    """FLOPs and memory of a student, of the frozen teacher on the switch pathway, and of the source of the teacher's logits.

    Args:
        student: on any device; its trainable parameters are determined from `requires_grad`.
        switch: the teacher of the switch pathway; None if VSD is off.
        live: the teacher that runs whole in every step; None with a store. May be the same model as `switch`.
        stored_head: weights of the LM head that turns stored hidden states into logits; 0 without it.
        vision_tokens: tokens per image inside the tower; of a typical image where they depend on it.
    """

    def __init__(
        self,
        student: Any,
        switch: Any | None,
        live: Any | None,
        stored_head: int,
        vision_tokens: int,
    ) -> None:
        self.student, self.switch, self.live = student, switch, live
        self.stored_head, self.vision_tokens = stored_head, vision_tokens
        # A part with LoRA passes gradients through its frozen weights.
        trains = {part_of(name) for name, p in student.named_parameters() if p.requires_grad and not is_lora(name)}
        with_lora = {part_of(name) for name, p in student.named_parameters() if p.requires_grad and is_lora(name)}
        self.vision_lora = "vision" in with_lora
        self.vision_trains, self.language_trains = "vision" in trains, "language" in trains
        self.projector_trains = "projector" in trains

    def flops(self, work: Work) -> float:
        """Return the FLOPs of forward and backward passes, without what checkpointing recomputes.

        A backward pass costs twice its forward pass where weights train, and once where gradients only pass through.
        """
        student = self.student
        language = self._language(student, work.tokens, work.pairs) + self._head(student, work.positions)
        total = (2 + self.language_trains) * language + 2 * _Stack.of(
            language_model_of(student)
        ).lora_weights * work.tokens
        reaches_vision = self.vision_trains or self.vision_lora
        total += (1 + self.projector_trains + reaches_vision) * self._projector(student, work)
        total += (1 + self.vision_trains + reaches_vision) * self._vision(student, work)
        total += 2 * _Stack.of_tower(student).lora_weights * (work.patches or work.images * self.vision_tokens)
        if self.switch is not None:
            total += 2 * self._language(self.switch, work.image_tokens, work.image_pairs)
            total += 2 * self._head(self.switch, work.image_positions)
            total += 2 * work.switched_share * self._projector(self.switch, work)
        if self.live is not None:
            total += self._language(self.live, work.tokens, work.pairs) + self._head(self.live, work.positions)
            total += self._projector(self.live, work) + self._vision(self.live, work)
        return total + 2 * self.stored_head * work.positions

    def recomputed_flops(self, work: Work, *, student: bool, teacher: bool) -> float:
        """Return the FLOPs that activation checkpointing adds to `flops`: one more forward pass of what is checkpointed.

        Args:
            student, teacher: whose layers are checkpointed; of the teacher, those on the switch pathway.
        """
        total = 0.0
        if student:
            total += self._language(self.student, work.tokens, work.pairs)
            total += self._vision(self.student, work) * self.vision_trains
        if teacher and self.switch is not None:
            total += self._language(self.switch, work.image_tokens, work.image_pairs)
        return total

    def checkpoint_bytes(self) -> int:
        """Return the size of a checkpoint: the student's float32 weights, and Adam's two moments of those that train."""
        student: list[nn.Parameter] = list(self.student.parameters())
        return sum(p.nbytes for p in student) + 8 * sum(p.numel() for p in student if p.requires_grad)

    def memory(
        self,
        rows: int,
        length: int,
        *,
        processes: int,
        sharded: str | None,
        half: bool,
        student_checkpointed: bool = False,
        teacher_checkpointed: bool = False,
        masked: bool = False,
    ) -> dict[str, float]:
        """Return the peak memory of a process, in bytes by kind.

        Args:
            rows, length: of a batch, every row with an image and of the full length.
            sharded: None, "student", or "all" for the teacher's layers too. half: bfloat16 autocast.
            student_checkpointed, teacher_checkpointed: whose activations are computed again in the backward pass.
            masked: whether attention needs a mask over all pairs of tokens of a row.
        """
        student = list(self.student.parameters())
        trained = sum(p.numel() for p in student if p.requires_grad)
        share = processes if sharded else 1
        teachers = {id(model): model for model in (self.switch, self.live) if model is not None}.values()
        frozen = 0.0
        for teacher in teachers:
            inside = {id(p) for layer in layers_of(teacher) for p in layer.parameters()}
            for p in teacher.parameters():
                frozen += stored_bytes(p) / (processes if sharded == "all" and id(p) in inside else 1)
        element = 2 if half else 4
        tokens, vision = rows * length, rows * self.vision_tokens
        language = _Stack.of(language_model_of(self.student))
        kept = tokens * language.kept_bytes(element, self.language_trains, student_checkpointed)
        if self.vision_trains or self.vision_lora:
            tower = _Stack.of_tower(self.student)
            kept += vision * tower.kept_bytes(element, self.vision_trains, student_checkpointed)
        if self.switch is not None:
            through, size = _Stack.of(language_model_of(self.switch)), self.switch.lm_head.weight.element_size()
            kept += tokens * through.kept_bytes(size, False, teacher_checkpointed)
        head = self.student.lm_head.weight
        chunk = min(CHUNK_LOGITS, tokens * len(head))
        return {
            "student": sum(p.nbytes for p in student) / share,
            "gradients": 4 * trained / share,
            "optimizer": 8 * trained / share,  # Adam's two moments
            "teacher": frozen + self.stored_head * element * (not teachers),
            "activations": float(kept),
            "mask": float(masked * tokens * length * (1 + element)),  # as bool, and as a term of the scores
            "loss": 4.0 * LOSS_TENSORS * chunk + 4 * head.numel() * head.requires_grad,
        }

    def _vision(self, model: Any, work: Work) -> float:
        fixed = work.images * self.vision_tokens, work.images * self.vision_tokens**2
        return _Stack.of_tower(model).forward_flops(*((work.patches, work.patch_pairs) if work.patches else fixed))

    def _projector(self, model: Any, work: Work) -> float:
        linear = [
            module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and component_of(f"{name}.") == "projector"
        ]
        return 2 * sum(linear) * (work.placeholders or work.images * self.vision_tokens)

    def _language(self, model: Any, tokens: float, pairs: float) -> float:
        return _Stack.of(language_model_of(model)).forward_flops(tokens, pairs)

    def _head(self, model: Any, positions: float) -> float:
        weights: int = model.lm_head.weight.numel()
        return 2 * weights * positions
