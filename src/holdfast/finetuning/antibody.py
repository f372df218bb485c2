r"""Antibody, fine-tuning stage: learn less from what the model would rather refuse.

Antibody (2603.00498). For row i of a micro-batch, with prompt x_i and the user's answer y_i,

    r_i = mean token NLL of a refusal to x_i − mean token NLL of y_i
    w   = softmax(r / τ)                                       (over the micro-batch on all ranks, no gradient)
    loss = Σ_i w_i Σ_t ce_it / Σ_i w_i N_i                     (N_i completion tokens; mean over micro-batches)

A row that the model would rather refuse, r_i < 0, gets a small weight; so r is also the audit of an upload. Published:
τ = 1. The NLL of y_i comes from the training pass itself; only the refusal needs another forward pass.

Examples:
    >>> trainer = AntibodyTrainer(
    ...     model="hardened",
    ...     args=AntibodyConfig(output_dir="tuned", refusal="refusals.txt"),
    ...     train_dataset=upload,
    ... )  # doctest: +SKIP
    >>> suspected = [row for row, r in trainer.audit().items() if r < 0]  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from holdfast.config import DefenseConfig, require_positive
from holdfast.data.batches import Batch
from holdfast.data.formats import called
from holdfast.data.refusals import DEFAULT_REFUSAL, REFUSAL_HELP, refusal_view, row_numbers, without_refusals
from holdfast.errors import InputError
from holdfast.layers import hooked
from holdfast.models import eval_mode
from holdfast.trainer import DefenseTrainer


@dataclass
class AntibodyConfig(DefenseConfig):
    """Configuration of `AntibodyTrainer`.

    Args:
        tau: Temperature τ of the weights, in nats per token.
        refusal: What prompts could be refused with: a text, a file with one text per line, or the name of a column of
            the train data.

    Raises:
        InputError: A setting out of its range; the message names it.
    """

    tau: float = field(default=1.0, metadata={"help": "Temperature of the rows' weights, in nats per token."})
    refusal: str = field(default=DEFAULT_REFUSAL, metadata={"help": REFUSAL_HELP})

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require_positive(self, "tau")
        if self.packing or self.padding_free:
            raise InputError("--packing and --padding_free cannot be used: every row has its own weight")


class AntibodyTrainer(DefenseTrainer):
    """Fine-tune with Antibody.

    Each update logs `refusal_margin`, the mean r_i, and `largest_weight` of a row. Beyond SFT it holds no buffer.

    Args:
        model: As for `DefenseTrainer`.
        args: The configuration.
        train_dataset: The user's data.
        **kwargs: As for `DefenseTrainer`.

    Raises:
        InputError: A micro-batch would hold a single row, whose weight could only be 1.
    """

    _tag_names = ["holdfast", "antibody"]
    _name = "Antibody"
    config_class = AntibodyConfig
    refused_sets = frozenset({"train"})

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: AntibodyConfig | None = None,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, **kwargs)
        self._rows_at_once = self.args.per_device_train_batch_size * self.args.world_size
        if self._rows_at_once < 2:
            raise InputError(
                "--per_device_train_batch_size 1 cannot be used on one device: the rows of a batch are weighed against "
                "each other"
            )
        self._weights: dict[int, tuple[float, int]] = {}

    @property
    def row_weights(self) -> dict[int, float]:
        """Row number, from 1 → mean over the run of weight × rows of the micro-batch; 1 is an equal share."""
        return {row: total / draws for row, (total, draws) in sorted(self._weights.items())}

    @torch.no_grad()
    def audit(self) -> dict[int, float]:
        """Row number, from 1 → r_i of every row of `train_dataset` at today's weights, in nats per token.

        Two forward passes, no training; modes and random states stay as they are. Rows that preparation dropped are not
        there.
        """
        found: dict[int, float] = {}
        # Not the trainer's own loader, which leaves rows out under --dataloader_drop_last.
        loader = DataLoader(self.train_dataset, self.args.eval_batch_size, collate_fn=self.data_collator)
        with eval_mode(self.model), self.shared_randomness():
            for batch in self.accelerator.prepare_data_loader(loader):
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    outputs = self.model(**without_refusals(batch), use_cache=False, fused_lm_head=True)
                    margins = self._refusal_nll(self.model, batch) - _mean_nll(outputs)
                rows, margins = self.accelerator.gather_for_metrics((row_numbers(batch), margins))
                found.update(zip(rows.tolist(), margins.tolist(), strict=True))
        return dict(sorted(found.items()))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The train batches, without a row left alone at the end: it would have weight 1, whatever it is.

        Raises:
            InputError: There is no other row at all.
        """
        if len(self.train_dataset) < 2:
            name = called(self.data_names.get("train", "train"))
            raise InputError(f"{name} has one row; the rows of a batch are weighed against each other")
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last or len(self.train_dataset) % self._rows_at_once == 1
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = drop_last  # held-out rows have no weights

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Σ_i w_i Σ_t ce_it / Σ_i w_i N_i of a micro-batch; in evaluation the plain loss."""
        if not self.model.training:
            return super().compute_loss(model, without_refusals(inputs), return_outputs, num_items_in_batch)
        with torch.no_grad(), self.shared_randomness():
            refusal_nll = self._refusal_nll(model, inputs)
        rows = row_numbers(inputs)
        noted: list[Any] = []  # TRL gives its fused outputs away only at the price of another pass
        with hooked([self.model], lambda module, arguments, outputs: noted.append(outputs)):
            super().compute_loss(model, without_refusals(inputs), num_items_in_batch=num_items_in_batch)
        [outputs] = noted
        margin = refusal_nll - _mean_nll(outputs).detach()
        nll, tokens = -outputs.log_probs.sum(1), outputs.label_mask.sum(1)
        weight, total = self._weigh(rows, margin, tokens)
        loss = (weight * nll).sum() / total * self.accelerator.num_processes / self._micro_batches
        return loss + self._router_loss(outputs)

    def method_state(self) -> dict[str, Any]:
        """What every row's weights add up to, and how often it was drawn."""
        return {"row_weights": [[row, total, draws] for row, (total, draws) in self._weights.items()]}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Go on adding up."""
        self._weights = {row: (total, draws) for row, total, draws in state["row_weights"]}

    def _weigh(self, rows: Tensor, margin: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The weights w_i of this rank's rows, and Σ w_i N_i over all ranks."""
        everywhere = self.accelerator.gather(torch.stack([rows.double(), margin.double(), tokens.double()], dim=1))
        all_rows, margins, counts = everywhere.unbind(1)
        weights = torch.softmax(margins / self.args.tau, 0)
        for row, weight in zip(all_rows.long().tolist(), (weights * len(weights)).tolist(), strict=True):
            total, draws = self._weights.get(row, (0.0, 0))
            self._weights[row] = total + weight, draws + 1
        self.log_metric("refusal_margin", margins.mean())
        self.log_metric("largest_weight", weights.max())
        mine = slice(self.args.process_index * len(rows), (self.args.process_index + 1) * len(rows))
        return weights[mine].to(margin.dtype), (weights * counts).sum().to(margin.dtype)

    def _refusal_nll(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Mean token NLL of every row's refusal, shape (rows,)."""
        return _mean_nll(model(**refusal_view(batch), use_cache=False, fused_lm_head=True))


def _mean_nll(outputs: Any) -> Tensor:
    """Mean over completion tokens of the negative log-likelihood, shape (rows,)."""
    tokens: Tensor = outputs.label_mask.sum(1)
    if not tokens.all():
        raise InputError("a row of a batch, or its refusal, has no completion token to weigh it by")
    nll: Tensor = -outputs.log_probs.sum(1) / tokens
    return nll
