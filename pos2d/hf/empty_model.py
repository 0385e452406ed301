"""Models without weights, for code that fills them itself. Unlike the other files here, this one does not travel."""

from typing import Any

import torch

from pos2d.hf import modeling_pos2d


def empty_model(config: Any, class_name: str) -> Any:
    """A model on the meta device, except for its rotary embedding, whose frequencies no weight file has.

    ``class_name`` is a class of ``modeling_pos2d``, a decoder stack (``Pos2DQwen2Model``) or a causal language model.
    """
    with torch.device("meta"):
        model = getattr(modeling_pos2d, class_name)(config)
    decoder = model.base_model
    rotary = decoder.rotary_emb
    decoder.rotary_emb = type(rotary)(type(rotary.stock)(config), rotary.axes)
    return model
