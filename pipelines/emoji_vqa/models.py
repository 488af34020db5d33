"""The small models of EmojiVQA: their shapes, and the weights that ship (float16, trained by `make emoji-models`)."""

from pathlib import Path

ASSETS = Path(__file__).parent
# The tower from which teacher and student start, trained by `tower.py`; its images become 8 × 8 features.
TOWER = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 96,
    "patch_size": 12,
}
TOWER_WEIGHTS = ASSETS / "tower.safetensors"
TEACHER_LANGUAGE = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
}
STUDENT_LANGUAGE = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
}
# Name → arguments of its LLM, and its weights: a teacher, and a student whose tower is still the pretrained one.
SHIPPED = {
    "teacher": (TEACHER_LANGUAGE, ASSETS / "teacher.safetensors"),
    "student": (STUDENT_LANGUAGE, ASSETS / "student.safetensors"),
}
