"""For programs that were written for the trainer's script: its two functions, over our merge and our engine."""

from pos2d.compat.trainer import generate_text, load_model_with_lora

__all__ = ["generate_text", "load_model_with_lora"]
