"""DefenseTrainer: TRL's SFTTrainer whose update is one *defended gradient*.

A *window* is all micro-batches of one optimizer update on this rank. A method says what its gradient over a window is
and nothing else; accumulation, DDP, FSDP2, mixed precision, clipping, schedules, logging and checkpoints stay the base
trainer's. Without a method of its own this trainer is supervised fine-tuning, the baseline of every stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.training_args import ParallelMode

from holdfast.checkpoint import last_checkpoint
from holdfast.config import DefenseConfig
from holdfast.data.batches import Batch, BatchStream
from holdfast.data.completions import require_rows
from holdfast.errors import InputError, TrainingError
from holdfast.models import load_model, load_tokenizer
from holdfast.optimizers import check_optimizer
from holdfast.parameters import ParameterVector, put_gradient, take_gradient
from holdfast.precision import compute_in_bf16, keep_in_float32
from holdfast.resuming import ResumableTrainer

_NO_SHARDING = "--fsdp was asked for, but this run would not shard: start it with torchrun on GPUs"


@dataclass(frozen=True)
class Window:
    """The micro-batches of one update on this rank, and how many completion tokens they hold over all ranks."""

    batches: list[Batch]
    tokens: Tensor | int | None

    def __len__(self) -> int:
        return len(self.batches)


class DefenseTrainer(ResumableTrainer):
    """Fine-tune with a defended gradient; as it stands, with the plain one.

    A method overrides `defended_gradient`, and where it has something to remember, `method_state` and
    `load_method_state`. Used as TRL's own trainers are:

        trainer = DefenseTrainer(model="Qwen/Qwen2.5-1.5B-Instruct", args=DefenseConfig("out"), train_dataset=alignment)
        trainer.train()

    `training_step(model, batch)` may be called directly: it defends that one batch and leaves the defended gradient in
    `param.grad`.

    Args:
        model: A model, a folder, an adapter folder or a Hub id. Trained weights of a lower precision become float32.
        args: The configuration; by default one writing to `holdfast-output`.
        train_dataset: Rows in any format of `holdfast.data.formats`.
        processing_class: The tokenizer; by default the model's own.
        **kwargs: Whatever `SFTTrainer` takes (`eval_dataset`, `peft_config`, `callbacks`, …).

    Raises:
        InputError: Data or settings that cannot be used; nothing has been written.
    """

    _tag_names = ["holdfast"]
    _name = "Holdfast"
    config_class: type[DefenseConfig] = DefenseConfig
    # The loss is divided by the window's token count, on every architecture.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: DefenseConfig | None = None,
        train_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else self.config_class(output_dir="holdfast-output")
        if not isinstance(args, self.config_class):
            raise InputError(f"{type(self).__name__} needs a {self.config_class.__name__}, got a {type(args).__name__}")
        if train_dataset is None:
            raise InputError("train_dataset is missing")
        require_rows(train_dataset, "train")
        if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
            raise InputError(_NO_SHARDING)
        if kwargs.get("compute_loss_func") or kwargs.get("formatting_func"):
            raise InputError(
                "compute_loss_func and formatting_func cannot be used: the loss is that of the completions"
            )
        if isinstance(model, str):
            processing_class = processing_class if processing_class is not None else load_tokenizer(model)
            model = load_model(model, trainable=True, **(args.model_init_kwargs or {}))
            args.model_init_kwargs = None
        compute_in_bf16(model, args)
        self._quiet = False
        self._window: Window | None = None
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
        )
        keep_in_float32(self.model)
        # SFTTrainer computes the loss from the token count itself, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        self._refuse_unsupported_parallelism()
        check_optimizer(self)

    # ------------------------------------------------------------------ what a method says

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """The loss to report and the gradient to hand to the optimizer; here g(θ; B)."""
        return self.loss_and_gradient(model, window)

    # ------------------------------------------------------------------ what a method builds on

    def backward(self, model: torch.nn.Module, window: Window, *, quiet: bool = True) -> Tensor:
        """Add g(θ; B) of a window to `param.grad`, reduced over the ranks once; returns L(θ; B).

        The loss is this rank's share times the number of ranks, so that its mean over ranks is L.

        Args:
            model: The model as wrapped for training.
            window: What to take the loss on.
            quiet: Leave TRL's metrics alone. Only the train batch at θ itself is to be logged.
        """
        losses = []
        self.current_gradient_accumulation_steps = len(window)  # what is a mean per micro-batch is divided by it
        with self._quietly() if quiet else nullcontext():
            for batch in self.each_batch(model, window):
                losses.append(super().training_step(model, dict(batch), window.tokens))
        return torch.stack(losses).sum()

    def each_batch(self, model: torch.nn.Module, window: Window) -> Iterator[Batch]:
        """The micro-batches of a window, for a loop whose backward passes are reduced over the ranks once, at last."""
        for index, batch in enumerate(window.batches, start=1):
            with nullcontext() if index == len(window) else self.accelerator.no_sync(model):
                yield batch

    def forward(
        self, model: torch.nn.Module, batch: Batch, tokens: Tensor | int | None, *, quiet: bool = True
    ) -> Tensor:
        """This rank's share of L(θ; B) for one micro-batch, with its graph: the first half of `backward`."""
        model.train()
        inputs = self._prepare_inputs(dict(batch))
        with self._quietly() if quiet else nullcontext(), self.compute_loss_context_manager():
            return cast(Tensor, self.compute_loss(model, inputs, num_items_in_batch=tokens))

    def loss_and_gradient(
        self, model: torch.nn.Module, window: Window, *, quiet: bool = False
    ) -> tuple[Tensor, ParameterVector]:
        """L(θ; B) and g(θ; B), the gradient moved out of `param.grad`. See `backward`."""
        loss = self.backward(model, window, quiet=quiet)
        return loss, take_gradient(self.model)

    def draw(self, batches: Iterator[Batch], size: int = 1) -> Window:
        """The next `size` micro-batches of a second data set as a window with its own token count."""
        return self.as_window(list(itertools.islice(batches, size)))

    def as_window(self, batches: list[Batch], tokens: Tensor | int | None = None) -> Window:
        """Micro-batches as a window; without a token count, their own completion tokens over all ranks are counted."""
        return Window(batches, self._get_num_items_in_batch(batches, self.args.device) if tokens is None else tokens)

    def batches_of(self, dataset: Dataset | None, name: str, batch_size: int | None = None) -> BatchStream:
        """An endless stream over a second data set, prepared exactly as `train_dataset` was.

        Its position is part of every checkpoint.

        Args:
            dataset: Rows in any accepted format, not necessarily the train set's.
            name: "attack" or "safety".
            batch_size: Rows per device; by default the train set's.

        Raises:
            InputError: The data set is missing or cannot be used.
        """
        if dataset is None:
            raise InputError(f"{type(self).__name__} lacks its {name}_dataset (--{name}_data)")
        prepared = self._prepare_dataset(dataset, self.processing_class, self.args, self.args.packing, None, name)
        return self.stream(prepared, name, batch_size)

    def stream(self, prepared: Dataset, name: str, batch_size: int | None = None) -> BatchStream:
        """An endless stream over prepared rows, its position part of every checkpoint. See `batches_of`."""
        args = self.args
        self._streams[name] = BatchStream(
            prepared,
            self.data_collator,
            batch_size or args.per_device_train_batch_size,
            seed=args.seed,
            name=name,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return self._streams[name]

    def shared_randomness(self) -> AbstractContextManager[None]:
        """The pass inside and the one that follows see the same dropout masks.

        Otherwise the difference of two gradients would mostly be the difference of their masks.
        """
        device = self.args.device
        on_accelerator = device.type != "cpu"
        return torch.random.fork_rng(
            [device] if on_accelerator else [], device_type=device.type if on_accelerator else "cuda"
        )

    def log_metric(self, name: str, value: Tensor | float) -> None:
        """Log a number averaged over ranks, and over the updates since the last log, as TRL does its own."""
        if isinstance(value, Tensor):
            value = self.accelerator.gather(value.detach().reshape(1)).mean().item()
        self._metrics["train"][name].append(value)

    # ------------------------------------------------------------------ the update

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """Keep the accumulation window that the training loop is about to walk through."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = Window(batches, tokens)
        return batches, tokens

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Leave the defended gradient of the window in `param.grad`, at its last micro-batch, and return the loss.

        Called directly with a batch that the training loop did not draw, that batch is the window; without a token
        count the mean is over its own completion tokens on all ranks.
        """
        window = self._window
        if window is None or not any(inputs is batch for batch in window.batches):
            window = self.as_window([inputs], num_items_in_batch)
        elif not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        else:
            self._window = None
        if getattr(model, "gradient_as_bucket_view", False):
            raise InputError("gradient_as_bucket_view cannot be used: gradients could not be moved out of the buckets")
        self.model.zero_grad()  # what an earlier direct call left must not be added to
        loss, gradient = self.defended_gradient(model, window)
        put_gradient(self.model, gradient)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss and metrics; in quiet passes the same loss, and no metrics."""
        if not self._quiet:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        tokens = torch.as_tensor(num_items_in_batch).clamp(min=1)
        loss = -outputs.log_probs.sum() / tokens * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Stop before an update that would break the weights, on all ranks alike: the norm is the same everywhere."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(grad_norm)):
            kept = last_checkpoint(self.args.output_dir)
            raise TrainingError(
                f"the loss or its gradient is not finite at step {self.state.global_step + 1}; "
                + (f"the last good checkpoint is {kept}" if kept else "no checkpoint had been written yet")
            )
        return grad_norm

    # ------------------------------------------------------------------ details

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        self._quiet, before = True, self._quiet
        try:
            yield
        finally:
            self._quiet = before

    def _refuse_unsupported_parallelism(self) -> None:
        """What was asked for must be what runs: accelerate turns FSDP on a CPU into DDP without a word."""
        shards = self.accelerator.distributed_type == DistributedType.FSDP
        if self.args.fsdp and not shards:
            raise InputError(_NO_SHARDING)
        if shards and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise InputError("--fsdp_config must choose version 2: FSDP1 hides the parameters in flat ones")
        if self.args.world_size > 1 and not self.args.average_tokens_across_devices:
            raise InputError(
                "--average_tokens_across_devices must stay true: losses are means over the tokens of all ranks"
            )
