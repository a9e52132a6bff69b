"""How much of an adaptive encoder an evaluation ran."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine import dist
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger

from densepred.evaluation.record import check_counted
from densepred.registry import METRICS


@METRICS.register_module()
class EncoderDepth(BaseMetric):
    """Mean number of encoder layers, and mean multiply-adds in them, of the images of an evaluation.

    Reads ``encoder_layers`` and ``encoder_flops``, which `densepred.adaptive.AdaptiveSegmentor` notes in every sample it
    predicts. `evaluate` returns ``EncoderDepth`` and ``EncoderGFLOPs``; one multiply-add counts 1.
    """

    def __init__(self) -> None:
        super().__init__(prefix="EncoderDepth")  # without one MMEngine warns; `evaluate` does without
        self._sums = torch.zeros(3, dtype=torch.float64)  # layers, multiply-adds, images

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Add a batch of samples (as dictionaries, see MMEngine's ``Evaluator``)."""
        for sample in data_samples:
            if "encoder_layers" not in sample:
                raise ValueError(
                    f"{sample.get('img_path', 'a sample')} has no encoder_layers: EncoderDepth measures an "
                    "AdaptiveSegmentor; take it out of val_evaluator for other models"
                )
            self._sums += torch.tensor([sample["encoder_layers"], sample["encoder_flops"], 1], dtype=torch.float64)

    def evaluate(self, size: int) -> dict[str, float]:
        """Sum over the processes, begin anew, and return the means on every rank.

        Args:
            size: Images in the data set.

        Raises:
            ValueError: The processes together did not count each image once.
        """
        sums, self._sums = self._sums, torch.zeros(3, dtype=torch.float64)
        dist.all_reduce(sums)
        check_counted("EncoderDepth", int(sums[2]), size)
        metrics = self.compute_metrics([sums])
        if dist.is_main_process():
            text = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            MMLogger.get_current_instance().info(f"{text} an image, mean of {size}")
        return metrics

    def compute_metrics(self, results: list[torch.Tensor]) -> dict[str, float]:
        """Return the means of sums (layers, multiply-adds, images)."""
        layers, flops, images = sum(results).tolist()
        return {"EncoderDepth": layers / images, "EncoderGFLOPs": flops / images / 1e9}
