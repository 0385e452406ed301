"""Configurations of decoders whose rotary frequencies turn with three positions instead of one.

Each is its stock family's configuration plus ``rope_2d``, a top-level block of ``config.json``:
``axes`` names for every rotary frequency the position that turns it (0 position, 1 branch, 2 time).
The ``model_type`` is our own, so that a loader that knows only 1D positions refuses the model.
"""

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config


class Pos2DLlamaConfig(LlamaConfig):
    model_type = "pos2d_llama"


class Pos2DMistralConfig(MistralConfig):
    model_type = "pos2d_mistral"


class Pos2DQwen2Config(Qwen2Config):
    model_type = "pos2d_qwen2"


class Pos2DQwen3Config(Qwen3Config):
    model_type = "pos2d_qwen3"
