"""The exact model, base and adapters summed, run a block at a time: no more of it is ever in memory."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pos2d.errors import InputError
from pos2d.exporter.artifact.hf_config import model_config
from pos2d.exporter.files.parallel import single_threaded_torch
from pos2d.exporter.files.tensor_io import opened
from pos2d.exporter.inputs.checkpoint import EMBEDDING, HEAD
from pos2d.exporter.quantisation.gptq import Curvature, curvature_of, in_panels
from pos2d.exporter.quantisation.writing import exact_rows
from pos2d.exporter.sources.source import Source
from pos2d.exporter.tensors.plan import PlannedTensor
from pos2d.families import CLASS_NAMES
from pos2d.hf import modeling_pos2d

# Of a tensor at once: of the head that is a product worth having two cores for.
ELEMENTS = 1 << 20
# Sequences that go through a block together; the values of its MLP are what they cost.
BATCH = 4

Tensor = torch.Tensor


class ExactDecoder:
    """``tensors``: of the sum, by name. Hidden states are lists of ``[B, S, H]``, and change where they lie."""

    def __init__(self, source: Source, tensors: Mapping[str, PlannedTensor], workers: Executor) -> None:
        self.sizes = source.base.sizes
        self._source, self._tensors, self._workers = source, tensors, workers
        config = model_config(source.base, source.spec, HEAD not in tensors)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self._model: Any = getattr(modeling_pos2d, f"{CLASS_NAMES[self.sizes.family]}Model")(config)
        self._model.eval()
        rotary: Any = modeling_pos2d.Pos2DRotaryEmbedding
        self._rotary = rotary(LlamaRotaryEmbedding(config), source.spec.axes)
        self._open = ExitStack()

    def __enter__(self) -> "ExactDecoder":
        files = {tensor.source.file for tensor in self._tensors.values()}
        self._files = self._open.enter_context(opened(self._source.base.directory, files))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> list[Tensor]:
        """Of tokens ``[B, S]``."""
        found = torch.empty(*ids.shape, self.sizes.hidden)
        for rows, values in self._rows(EMBEDDING):
            here = (ids >= rows.start) & (ids < rows.stop)
            found[here] = values[ids[here] - rows.start]
        return list(torch.split(found, BATCH))

    @torch.inference_mode()
    def read(self, number: int, hidden: list[Tensor], watched: Sequence[str] = ()) -> dict[str, Curvature]:
        """Take ``hidden`` through block ``number``; the curvature of what its ``watched`` layers read.

        Raises:
            InputError: values that are not finite.
        """
        prefix = f"model.layers.{number}."
        layer = self._model.layers[number]
        layer.load_state_dict(self._load(prefix), assign=True)
        moments: dict[str, Tensor] = {}
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(lambda _, read, name=name: _add(moments, name, read[0]))
            for name in watched
        ]
        with fast_products():
            for index, states in enumerate(hidden):
                hidden[index] = layer(states, attention_mask=None, position_embeddings=self._angles(states))
        for hook in hooks:
            hook.remove()
        layer.to("meta")
        if not all(values.isfinite().all() for values in (*hidden, *moments.values())):
            raise InputError(
                f"{self._source.base.directory}: block {number} gives values that are not finite in float32; check the "
                "base and the adapter, or export with --no-calibration"
            )
        columns = [layer.get_submodule(name).in_features for name in moments]
        with single_threaded_torch():
            return dict(zip(moments, self._workers.map(curvature_of, moments.values(), columns), strict=True))

    @torch.inference_mode()
    def draw(self, hidden: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Next tokens ``[B, S]``, drawn with the probabilities that the model gives them after the last block."""
        norm = self._model.norm
        norm.load_state_dict(self._load("model.norm."), assign=True)
        states = torch.cat([norm(states) for states in hidden])
        tokens = torch.zeros(states.shape[:2], dtype=torch.int64)
        total = torch.full(states.shape[:2], -torch.inf)
        for rows, values in self._rows(HEAD if HEAD in self._tensors else EMBEDDING):
            with fast_products():
                logits = states @ values.T
            # Among all tokens so far, one of these is drawn as often as their share says: the logits of the whole
            # vocabulary are never there together.
            here = logits.logsumexp(-1)
            total = torch.logaddexp(total, here)
            chance, place = torch.rand(2, *here.shape, generator=generator)
            sums = logits.sub_(here[..., None]).exp_().cumsum(-1)
            token = torch.searchsorted(sums, place[..., None])[..., 0].clamp_max(len(values) - 1) + rows.start
            tokens = torch.where(chance < (here - total).exp(), token, tokens)
        return tokens

    def _angles(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of ordinary text."""
        times = torch.arange(states.shape[1])
        positions = torch.stack([times, torch.zeros_like(times), times], dim=-1)[None]
        cos, sin = self._rotary(states, positions)
        return cos, sin

    def _rows(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        tensor = self._tensors[name]
        for rows, _, exact, _ in exact_rows(tensor, self._files[tensor.source.file], ELEMENTS):
            yield rows, exact.float()

    def _load(self, prefix: str) -> dict[str, Tensor]:
        """Exact sums, rounded to float32, of the tensors that begin with ``prefix``, by the rest of their names."""
        names = [name for name in self._tensors if name.startswith(prefix)]
        with single_threaded_torch():
            loaded = list(self._workers.map(self._whole, names))
        return {name.removeprefix(prefix): values for name, values in zip(names, loaded, strict=True)}

    def _whole(self, name: str) -> Tensor:
        values = torch.empty(self._tensors[name].target.shape)
        for rows, part in self._rows(name):
            values[rows] = part
        return values


@contextmanager
def fast_products() -> Iterator[None]:
    """Products of float32 with bfloat16 factors, where the processor has them: what is read is rough anyway."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _add(moments: dict[str, Tensor], name: str, read: Tensor) -> None:
    """Add what a layer reads to the second moments of its panels."""
    panels = in_panels(read.flatten(0, -2))
    if name not in moments:
        moments[name] = torch.zeros(len(panels), panels.shape[2], panels.shape[2])
    moments[name].baddbmm_(panels.transpose(1, 2), panels)
