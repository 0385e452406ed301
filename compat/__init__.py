"""The functions of the trainer's inference script, for programs that use it, over our merge and our engine."""

from pos2d.compat.trainer import generate_text, load_model_with_lora

__all__ = ["generate_text", "load_model_with_lora"]
