r"""Rerouting: harmful text is to lead a model elsewhere than it did, whatever an attacker does to its weights.

A model that has learnt to refuse still has all that it refuses to say, and an attack that takes the refusals away comes
upon it. Rows H of harmful prompts with harmful answers are led elsewhere, in what the layers make of them:

    C(θ'; H) = mean over the last n decoder layers l and tokens t of   max(0, cos(h_lt(θ'), h_lt(θ₀)))

with h_lt the residual stream behind layer l at token t, of those that answers are predicted from, and θ₀ the weights
that the run began with. After the rerouting loss of circuit breakers (2406.04313), which is taken of a few layers, and
at the weights θ alone: there an attack that finds its way back is met by nothing. Here θ' are weights under a simulated
attack. What comes early in a model serves harmless text as well; with few layers it is left alone.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import Tensor, nn

from holdfast.alignment.retention import RetainingTrainer
from holdfast.data.batches import BatchStream, predicting
from holdfast.errors import InputError
from holdfast.parameters import ParameterVector
from holdfast.window import Window


class ReroutingTrainer(RetainingTrainer):
    """What a method builds on that reroutes: the gradient of C. As for `RetainingTrainer`, which has θ₀."""

    _rerouted: BatchStream | None = None

    @property
    def reroutes(self) -> bool:
        """Whether harmful rows are led elsewhere."""
        return self._rerouted is not None

    def reroute(self, rows: Dataset, layers: int | None) -> None:
        """Have harmful rows led elsewhere; there are rows to retain.

        Args:
            rows: H, prepared.
            layers: Of how many of the last decoder layers C is to be taken; None: all.

        Raises:
            InputError: The model has fewer layers.
        """
        if (layers or 0) > len(self._layers):
            raise InputError(
                f"--reroute_layers {layers}: a {type(self.model).__name__} has {len(self._layers)} decoder layers"
            )
        self._rerouted = self.stream(rows, "reroute")

    def rerouted(self, size: int) -> Window:
        """The next `size` micro-batches of H."""
        assert self._rerouted is not None
        return self.draw(self._rerouted, size)

    def rerouting(self, model: nn.Module, window: Window, last: int | None) -> tuple[Tensor, ParameterVector]:
        """C(θ'; H) and its gradient at the weights in force, over a window of H; one pass, and one forwards alone.

        Args:
            model: The model as wrapped for training.
            window: The rows.
            last: n; None: all layers.
        """
        layers = self._layers if last is None else self._layers[-last:]
        loss, gradient = self.beside_origin(model, window, layers, predicting, _likeness)
        self.log_metric("reroute_loss", loss)
        return loss, gradient


def _likeness(now: Tensor, before: Tensor) -> Tensor:
    """max(0, cos(h, h₀)) of every token, in float32."""
    return torch.cosine_similarity(now.float(), before.float(), dim=-1).relu()
