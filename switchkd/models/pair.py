"""Checks a student against the teacher of a later stage, before the stage in between is paid for, and names the cure."""

from switchkd.errors import CheckpointError
from switchkd.fingerprints import hash_tokenizer
from switchkd.models.checkpoint import Checkpoint, check_compatible


def check_pair(teacher: Checkpoint, student: Checkpoint) -> None:
    """Check that a student can learn from a teacher with the switch pathway: tokenizers, embedding rows, image tokens, features.

    Raises:
        CheckpointError: names both sides of the first property that does not match, and the option of `init-student` that cures it.
    """
    try:
        check_compatible(teacher, student, switch=True)
        if student.vocab_rows < teacher.vocab_rows:
            raise CheckpointError(
                f"the student's embedding has {student.vocab_rows} of the {teacher.vocab_rows} rows of the teacher's logits: "
                f"teacher {teacher.path}, student {student.path}"
            )
    except CheckpointError as error:
        raise CheckpointError(f"{error}.\nThe cure: {_cure(teacher, student)}") from error


def _cure(teacher: Checkpoint, student: Checkpoint) -> str:
    if hash_tokenizer(teacher.tokenizer) != hash_tokenizer(student.tokenizer):
        return (
            f"`switchkd init-student --tokenizer {teacher.path}`, where its tokenizer holds the language model's with the same "
            "ids; or distil with --vocab-map, and leave --teacher out here"
        )
    if student.vocab_rows < teacher.vocab_rows or teacher.image_token_id != student.image_token_id:
        return "make the student anew with `switchkd init-student`, which enlarges the embedding for its tokenizer"
    otherwise = "or distil with --switch-adapter linear or --no-switch, and leave --teacher out here"
    if teacher.feature_width != student.feature_width:
        return (
            f"`switchkd init-student --vision` with a tower of width {teacher.feature_width}, such as that of {teacher.path}; "
            f"{otherwise}"
        )
    if teacher.feature_tokens != student.feature_tokens:
        whole = student.feature_tokens + (student.config.vision_feature_select_strategy == "default")
        for strategy, count in (("default", whole - 1), ("full", whole)):
            if teacher.feature_tokens == count:
                what = "drops the first feature" if strategy == "default" else "keeps all features"
                return f"`switchkd init-student --strategy {strategy}`, which {what}, as the teacher does; {otherwise}"
        return f"`switchkd init-student --vision` with a tower of {teacher.feature_tokens} patches; {otherwise}"
    grid = getattr(teacher.config, "projector_grid", None)
    projector = "mlp" if grid is None else f"ldpv2 --grid {grid}"
    return f"`switchkd init-student --projector {projector}`, as the teacher's; {otherwise}"
