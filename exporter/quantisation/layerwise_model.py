"""The exact sum of base and adapters as a float32 model, of which one decoder layer at a time is in memory."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from pos2d.errors import InputError
from pos2d.exporter.quantisation.gptq import HessianFactors, factorise_hessian, split_into_groups
from pos2d.families import CLASS_NAMES
from pos2d.hf.empty_model import empty_model
from pos2d.layout import Layout
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD
from pos2d.sources.files.parallel import single_threaded_torch
from pos2d.sources.files.tensor_io import opened
from pos2d.sources.hf_config import model_config
from pos2d.sources.source import Source
from pos2d.sources.tensors.exact_rows import exact_rows
from pos2d.sources.tensors.tensor_plan import PlannedTensor

# Values of a tensor that are read at a time: for the head, enough that the product keeps two cores busy.
CHUNK_ELEMENTS = 1 << 20
# Sequences that go through a decoder layer together; the activations of its MLP take the most memory.
BATCH_SIZE = 4

Tensor = torch.Tensor


@dataclass(slots=True, eq=False)
class Passage:
    """A sequence of any layout on its way through the layers: its hidden states ``[1, S, H]``, which are replaced in
    place, its positions ``[1, S, 3]`` (position, branch, time), and its mask, bool ``[1, 1, S, S]``."""

    states: Tensor
    positions: Tensor
    mask: Tensor


class LayerwiseModel:
    """Runs the model layer by layer; ``tensors`` are those of the sum, by name.

    Hidden states are lists of ``[B, S, H]``, a tensor for each batch of sequences, and are replaced in place.
    """

    def __init__(self, source: Source, tensors: Mapping[str, PlannedTensor], workers: Executor) -> None:
        self.sizes = source.base.sizes
        self._source, self._tensors, self._workers = source, tensors, workers
        config = model_config(source.base, source.spec, HEAD not in tensors)
        config._attn_implementation = "sdpa"
        self._model = empty_model(config, f"{CLASS_NAMES[self.sizes.family]}Model").eval()
        self._open = ExitStack()

    def __enter__(self) -> "LayerwiseModel":
        files = {tensor.source.file for tensor in self._tensors.values()}
        self._files = self._open.enter_context(opened(self._source.base.directory, files))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> list[Tensor]:
        """The hidden states before the first decoder layer, for token ids ``[B, S]``."""
        hidden = torch.empty(*ids.shape, self.sizes.hidden)
        for rows, values in self._float32_rows(EMBEDDING):
            inside = (ids >= rows.start) & (ids < rows.stop)
            hidden[inside] = values[ids[inside] - rows.start]
        return list(torch.split(hidden, BATCH_SIZE))

    def passages(self, layouts: Sequence[Layout]) -> list[Passage]:
        """Sequences before the first decoder layer."""
        ids = torch.from_numpy(np.concatenate([layout.ids for layout in layouts]))
        states = torch.split(self.embed(ids[None])[0], [len(layout) for layout in layouts], dim=1)
        return [
            Passage(
                of_layout,
                torch.from_numpy(np.concatenate([layout.positions[:, None], layout.pos2d], axis=1))[None],
                torch.from_numpy(layout.mask())[None, None],
            )
            for of_layout, layout in zip(states, layouts, strict=True)
        ]

    @torch.inference_mode()
    def run_layer(
        self, index: int, hidden: list[Tensor], recorded: Sequence[str] = (), passages: Sequence[Passage] = ()
    ) -> dict[str, HessianFactors]:
        """Take ``hidden`` and ``passages`` through decoder layer ``index``; returns the factorised Hessians of the
        inputs of its ``recorded`` linear layers, to which ``passages`` do not count.

        Raises:
            InputError: values that are not finite.
        """
        layer = self._model.layers[index]
        layer.load_state_dict(self._state_dict(f"model.layers.{index}."), assign=True)
        hessians: dict[str, Tensor] = {}
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: _accumulate(hessians, name, args[0])
            )
            for name in recorded
        ]
        with reduced_precision_matmul():
            for batch, states in enumerate(hidden):
                hidden[batch] = layer(states, attention_mask=None, position_embeddings=self._cos_sin(states))
        for hook in hooks:
            hook.remove()
        for passage in passages:  # in full precision, as results are compared with it
            rotation = self._model.rotary_emb(passage.states, passage.positions)
            passage.states = layer(passage.states, attention_mask=passage.mask, position_embeddings=rotation)
        layer.to("meta")
        values = (*hidden, *(passage.states for passage in passages), *hessians.values())
        if not all(tensor.isfinite().all() for tensor in values):
            raise InputError(
                f"{self._source.base.directory}: decoder layer {index} gives values that are not finite in float32; "
                "check the base and the adapter, or export with `no_calibration=True`"
            )
        columns = [layer.get_submodule(name).in_features for name in hessians]
        with single_threaded_torch():
            factors = self._workers.map(factorise_hessian, hessians.values(), columns)
            return dict(zip(hessians, factors, strict=True))

    @torch.inference_mode()
    def sample_next(self, hidden: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Sample the next token after every token from the model's distribution, ``[B, S]``; ``hidden`` are the states
        after the last decoder layer."""
        states = self._normed(torch.cat(list(hidden)))
        tokens = torch.zeros(states.shape[:2], dtype=torch.int64)
        log_total = torch.full(states.shape[:2], -torch.inf)
        for rows, values in self._float32_rows(self._head):
            with reduced_precision_matmul():
                logits = states @ values.T
            # The logits of the whole vocabulary are never in memory together. A token sampled among those of this chunk
            # replaces the one sampled so far with the probability that the chunk has among all rows up to here.
            log_chunk = logits.logsumexp(-1)
            log_total = torch.logaddexp(log_total, log_chunk)
            replace, quantile = torch.rand(2, *log_chunk.shape, generator=generator)
            cumulative = logits.sub_(log_chunk[..., None]).exp_().cumsum(-1)
            sampled = torch.searchsorted(cumulative, quantile[..., None])[..., 0].clamp_max(len(values) - 1)
            tokens = torch.where(replace < (log_chunk - log_total).exp(), sampled + rows.start, tokens)
        return tokens

    @torch.inference_mode()
    def most_likely(self, passages: Sequence[Passage], count: int) -> list[tuple[Tensor, Tensor]]:
        """For each passage after the last decoder layer, the ``count`` most likely next tokens after every token, int64
        ``[S, count]``, and their log-probabilities, float32 ``[S, count]``."""
        states = self._normed(torch.cat([passage.states[0] for passage in passages]))
        best, tokens = torch.empty(len(states), 0), torch.empty(len(states), 0, dtype=torch.int64)
        log_total = torch.full((len(states),), -torch.inf)
        for rows, values in self._float32_rows(self._head):
            logits = states @ values.T
            log_total = torch.logaddexp(log_total, logits.logsumexp(-1))
            candidates = torch.cat([best, logits], dim=1)
            names = torch.cat([tokens, torch.arange(rows.start, rows.stop).expand(len(states), -1)], dim=1)
            best, places = candidates.topk(min(count, candidates.shape[1]), dim=1)
            tokens = names.gather(1, places)
        lengths = [passage.states.shape[1] for passage in passages]
        parts = (torch.split(values, lengths) for values in (tokens, best - log_total[:, None]))
        return list(zip(*parts, strict=True))

    @property
    def _head(self) -> str:
        return HEAD if HEAD in self._tensors else EMBEDDING

    def _normed(self, states: Tensor) -> Tensor:
        """States after the last decoder layer, after the final norm."""
        norm = self._model.norm
        norm.load_state_dict(self._state_dict("model.norm."), assign=True)
        normed: Tensor = norm(states)
        return normed

    def _cos_sin(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for a single sequence: branch 0, and the position as time."""
        times = torch.arange(states.shape[1])
        positions = torch.stack([times, torch.zeros_like(times), times], dim=-1)[None]
        cos, sin = self._model.rotary_emb(states, positions)
        return cos, sin

    def _float32_rows(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """The exact sum of a tensor, rounded to float32, some rows at a time."""
        tensor = self._tensors[name]
        for block in exact_rows(tensor, self._files[tensor.source.file], CHUNK_ELEMENTS):
            yield block.rows, block.exact.float()

    def _state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, by the names after it."""
        names = [name for name in self._tensors if name.startswith(prefix)]
        with single_threaded_torch():
            tensors = list(self._workers.map(self._float32_tensor, names))
        return {name.removeprefix(prefix): tensor for name, tensor in zip(names, tensors, strict=True)}

    def _float32_tensor(self, name: str) -> Tensor:
        tensor = torch.empty(self._tensors[name].shape)
        for rows, values in self._float32_rows(name):
            tensor[rows] = values
        return tensor


@contextmanager
def reduced_precision_matmul() -> Iterator[None]:
    """Let float32 products round their factors to bfloat16 where the processor has that; calibration needs no more."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _accumulate(hessians: dict[str, Tensor], name: str, inputs: Tensor) -> None:
    """Add ``X^T X`` of each column group of a layer's inputs to its Hessian, ``[groups, length, length]``."""
    groups = split_into_groups(inputs.flatten(0, -2))
    if name not in hessians:
        hessians[name] = torch.zeros(len(groups), groups.shape[2], groups.shape[2])
    hessians[name].baddbmm_(groups.transpose(1, 2), groups)
