r"""Retention: what alignment data do not ask for is to go on as it was.

Training that changes how a model answers harmful prompts forgets, too, what nobody rehearses. Rows K that have nothing
to do with harm hold it to the weights θ₀ that the run began with, by what they make of K on the way:

    R(θ; K) = mean over decoder layers l and tokens t of   ‖h_lt(θ) − h_lt(θ₀)‖² / ‖h_lt(θ₀)‖²

with h_lt the residual stream behind layer l at token t, prompts and answers alike. After the retain loss of circuit
breakers (2406.04313), which is ‖h − h₀‖; squared and divided it hangs neither on a model's width nor on the norms that
its stream has, which grow from layer to layer and at single tokens.

What K does not come near is held by the weights themselves, if at all: `TowardsOrigin` takes them a little back after
every update, at a rate ρ beside the learning rate η,

    θ ← θ + η · ρ · (θ₀ − θ)

the penalty of L2-SP (1802.01483), ρ / 2 · ‖θ − θ₀‖², apart from the gradient as AdamW has it of weight decay.

Examples:
    >>> trainer = PatcherTrainer(
    ...     model="Qwen/Qwen2.5-1.5B-Instruct",
    ...     args=PatcherConfig(output_dir="hardened", retain_weight=0.5),
    ...     train_dataset=alignment,
    ...     attack_dataset=harmful,
    ...     retain_dataset=harmless,
    ... )  # doctest: +SKIP
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from holdfast.config import DefenseConfig
from holdfast.data.batches import Batch, BatchStream, all_tokens
from holdfast.errors import InputError
from holdfast.layers import first_of, hooked
from holdfast.models import base_model
from holdfast.parameters import TINY, ParameterVector, approach, exchanged, snapshot, take_gradient
from holdfast.residual import decoder_layers
from holdfast.trainer import DefenseTrainer
from holdfast.window import Window

_ORIGIN = "retained"


class RetainingTrainer(DefenseTrainer):
    """What a method builds on that retains: the gradient of R, and θ₀ across checkpoints.

    θ₀ is one buffer of the trained parameters' size, and of a LoRA adapter that of the adapter alone.

    Args:
        model: As for `DefenseTrainer`.
        args: The configuration.
        train_dataset: As for `DefenseTrainer`.
        retain_dataset: Harmless prompts with answers, K; None: nothing is retained.
        **kwargs: As for `DefenseTrainer`.

    Raises:
        InputError: The model's decoder layers are not found, or are to be compiled, or the rows cannot be used.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: DefenseConfig | None = None,
        train_dataset: Dataset | None = None,
        *,
        retain_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, **kwargs)
        self._retained: BatchStream | None = None
        self._layers: list[nn.Module] = []
        self._origin: ParameterVector | None = None
        self._last_token: dict[str, int] = {}
        if retain_dataset is not None:
            if self.args.torch_compile:
                raise InputError(
                    "--torch_compile cannot be used with --retain_data: compiled layers hide their outputs"
                )
            self._retained = self.batches_of(retain_dataset, "retain")
            self._layers = decoder_layers(self.model)
            accepted = inspect.signature(base_model(self.model).forward).parameters
            self._last_token = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @property
    def retains(self) -> bool:
        """Whether there is anything to retain."""
        return self._retained is not None

    def remember(self) -> None:
        """Take today's weights for θ₀, unless there is one; to be called before the first update."""
        if self.retains and self._origin is None:
            self._origin = snapshot(self.model)

    def decay_towards_origin(self, rate: float) -> None:
        """Have every update take the weights back as `TowardsOrigin` does, at a rate ρ; there are rows to retain."""
        self.add_callback(TowardsOrigin(self, rate))

    def approach_origin(self, share: float) -> None:
        """Take the weights a share of the way back to θ₀."""
        assert self._origin is not None
        approach(self.model, self._origin, share)

    def retained(self, size: int) -> Window:
        """The next `size` micro-batches of K."""
        assert self._retained is not None
        return self.draw(self._retained, size)

    def retention(self, model: nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """R and its gradient at the weights in force, over a window of K; one pass, and one forwards alone."""
        return self.beside_origin(model, window, self._layers, all_tokens, _relative_squares)

    def beside_origin(
        self,
        model: nn.Module,
        window: Window,
        layers: list[nn.Module],
        tokens_of: Callable[[Batch], Tensor],
        measure: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, ParameterVector]:
        """The mean over layers and tokens of a measure of what layers put out beside what they did with θ₀; gradient.

        Args:
            model: The model as wrapped for training, with whatever weights are in force.
            window: The rows.
            layers: The decoder layers that count.
            tokens_of: Which tokens of a batch count: (rows, tokens), bool.
            measure: Takes a layer's output today and that with θ₀, (rows, tokens, width) each, to (rows, tokens).

        Raises:
            InputError: The model's residual stream is laid out in another way than one vector per token.
        """
        assert self._origin is not None
        here = torch.stack([tokens_of(batch).sum() for batch in window.batches]).sum().to(self.args.device)
        count, ranks = self.accelerator.reduce(here, "sum"), self.accelerator.num_processes
        losses = []
        for part in self.each_part(model, window):
            with torch.no_grad(), self.shared_randomness(), exchanged(self.model, self._origin):
                before, _ = self._streams_behind(layers, model, part)
            now, nothing = self._streams_behind(layers, model, part)
            tokens = tokens_of(part.batches[0]).to(self.args.device)
            if any(stream.shape[:-1] != tokens.shape for stream in before):
                raise InputError(
                    f"--retain_data: a layer of a {type(self.model).__name__} puts out {tuple(before[0].shape)} for "
                    f"{tuple(tokens.shape)} tokens; expected one vector for each"
                )
            moved = [measure(*pair)[tokens].sum() for pair in zip(now, before, strict=True)]
            share = ranks * torch.stack(moved).mean() / count
            self.accelerator.backward(share + nothing)
            losses.append(share.detach())
        return torch.stack(losses).sum(), take_gradient(self.model)

    def method_state(self) -> dict[str, Any]:
        """θ₀."""
        return {} if self._origin is None else {_ORIGIN: self._origin}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Take up θ₀.

        Raises:
            InputError: There is something to retain, and the checkpoint's run retained nothing.
        """
        if self.retains and _ORIGIN not in state:
            raise InputError(
                "--retain_data: the checkpoint has not the weights that its run began with, since that retained "
                "nothing; expected a run begun with --retain_data"
            )
        self._origin = state[_ORIGIN] if self.retains else None

    def _streams_behind(self, layers: list[nn.Module], model: nn.Module, part: Window) -> tuple[list[Tensor], Tensor]:
        """The residual stream behind these layers, (rows, tokens, width) each, of a micro-batch; and a zero.

        The zero has all parameters in its graph, as reducing gradients over ranks asks for. No loss is taken, so that
        the vocabulary is gone through at one token of a row alone, where the model can be told so.
        """
        with _outputs(layers) as found, self.passing(model, part) as batch:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**inputs, **self._last_token, use_cache=False).logits
        return found, (0 * logits).sum()


class TowardsOrigin(TrainerCallback):
    """Weight decay towards θ₀, after every step of the optimizer: θ ← θ + η · ρ · (θ₀ − θ), η the step's rate.

    Args:
        trainer: What has θ₀.
        rate: ρ.
    """

    def __init__(self, trainer: RetainingTrainer, rate: float) -> None:
        self._trainer, self._rate = trainer, rate

    def on_optimizer_step(self, *_: Any, optimizer: torch.optim.Optimizer, **__: Any) -> None:
        """Decay, once the optimizer has stepped and before its rate goes on."""
        self._trainer.approach_origin(self._rate * optimizer.param_groups[0]["lr"])


@contextmanager
def _outputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What modules put out in the body, in the order in which they are run; the first member where it is a tuple."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(first_of(output))

    with hooked(modules, note):
        yield found


def _relative_squares(now: Tensor, before: Tensor) -> Tensor:
    """‖h − h₀‖² / ‖h₀‖² of every token, in float32."""
    now, before = now.float(), before.float()
    return (now - before).square().sum(-1) / before.square().sum(-1).clamp(min=TINY)
