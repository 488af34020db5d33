"""What a student is assembled from: a vision tower and a language model in folders of their own."""

import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

NO_IMAGE = [word for word in tiny.WORDS if word != "<image>"]


def tower(folder, kind="siglip", both=False, size=16):
    """A vision tower as hubs hold them: alone, or with its text tower."""
    torch.manual_seed(5)
    vision = tiny.vision_config(kind, width=16, size=size)
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    if not both:
        SiglipVisionModel(vision).save_pretrained(folder)
    elif kind == "siglip":
        vision.vision_use_head = True
        text = SiglipTextConfig(**text, projection_size=16)
        SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(folder)
    else:
        text = CLIPTextConfig(**text)
        CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
        ).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return folder


def language(folder, kind="qwen2", words=NO_IMAGE, rows=16, tied=True):
    torch.manual_seed(6)
    AutoModelForCausalLM.from_config(tiny.text_config(kind, width=16, rows=rows, tied=tied)).save_pretrained(folder)
    tiny.tokenizer(words).save_pretrained(folder)
    return folder
