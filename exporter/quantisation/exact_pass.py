"""One pass of the exact model over all layers: for calibration, for predictions of held-out tokens, or for both."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor

from pos2d.exporter.quantisation.calibration import calibrate
from pos2d.exporter.quantisation.gptq import HessianFactors
from pos2d.progress import Progress
from pos2d.reference import MOST_LIKELY, HeldOut, Prediction
from pos2d.sources.source import Source
from pos2d.sources.tensors.tensor_plan import PlannedTensor


class ExactPass:
    """Runs the exact model once, layer by layer.

    ``tensors`` are those of the sum, by name, and ``workers`` read them. ``predictions`` are there at the end.
    """

    def __init__(
        self, source: Source, tensors: Mapping[str, PlannedTensor], workers: Executor, held_out: Sequence[HeldOut]
    ) -> None:
        self._source, self._tensors, self._workers, self._held_out = source, tensors, workers, held_out
        self.predictions: tuple[Prediction, ...] = ()

    def layers(self, *, calibrated: bool) -> Iterator[Mapping[str, HessianFactors]]:
        """Run the model. With calibration, yield the Hessians of each decoder layer: see
        :func:`pos2d.exporter.quantisation.calibration.calibrate`.

        Raises:
            InputError: values that are not finite.
        """
        if not (calibrated or self._held_out):
            return
        from pos2d.exporter.quantisation.layerwise_model import LayerwiseModel

        with LayerwiseModel(self._source, self._tensors, self._workers) as model:
            layouts = [held_out.layout(self._source.spec) for held_out in self._held_out]
            passages = model.passages(layouts) if layouts else []
            if calibrated:
                yield from calibrate(model, passages)
            else:
                with Progress("computing the exact model", model.sizes.layers) as progress:
                    for index in range(model.sizes.layers):
                        model.run_layer(index, [], passages=passages)
                        progress.advance()
            found = model.most_likely(passages, MOST_LIKELY) if passages else []
        self.predictions = tuple(
            Prediction(held_out, tokens.int().numpy(), log_probs.numpy())
            for held_out, (tokens, log_probs) in zip(self._held_out, found, strict=True)
        )
