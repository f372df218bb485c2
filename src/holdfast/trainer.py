"""DefenseTrainer: TRL's SFTTrainer whose update is one *defended gradient*.

A method says what its gradient over a window (`holdfast.window`) is and nothing else; accumulation, DDP, FSDP2, mixed
precision, clipping, schedules, logging and checkpoints stay the base trainer's. Without a method of its own this is
supervised fine-tuning, the baseline of every stage.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SchedulerType
from transformers.training_args import ParallelMode

from holdfast.checkpoint import kept
from holdfast.config import DefenseConfig
from holdfast.data.batches import Batch, BatchStream, all_tokens, require_inputs, rows_in
from holdfast.data.completions import require_rows
from holdfast.errors import InputError, TrainingError
from holdfast.layers import has_routers
from holdfast.models import load_model, load_tokenizer, require_model
from holdfast.optimizers import check_optimizer
from holdfast.parameters import ParameterVector, put_gradient, take_gradient
from holdfast.precision import compute_in_bf16, keep_in_float32
from holdfast.resuming import ResumableTrainer
from holdfast.window import Window

logger = logging.getLogger(__name__)

_NO_SHARDING = "--fsdp was asked for, but this run would not shard: start it with torchrun on GPUs"


class DefenseTrainer(ResumableTrainer):
    """Fine-tune with a defended gradient; as it stands, with the plain one.

    Of a Mixture-of-Experts model the train batch at θ is trained on as TRL does: with the auxiliary loss of its
    routers, unless `router_aux_loss_coef` is 0. Passes that belong to a method (harmful, attacked, refusing, safety)
    are cross-entropy alone.

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
        **kwargs: Whatever `SFTTrainer` takes (`eval_dataset`, `peft_config`, `callbacks`, …), and `data_names` (see
            `holdfast.data.completions.CompletionTrainer`).

    Raises:
        InputError: Data or settings that cannot be used; nothing has been written.
    """

    _tag_names = ["holdfast"]
    _name = "Holdfast"
    config_class: type[DefenseConfig] = DefenseConfig
    # The loss is divided by the window's token count, on every architecture.
    loss_is_scaled_for_ga = True
    # Set by the base trainer: whether the loss has an auxiliary one of the model's routers, and its coefficient.
    aux_loss_enabled: bool
    router_aux_loss_coef: float

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: DefenseConfig | None = None,
        train_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        args = self.configured(args)
        require_model(model, processing_class, trainer=type(self).__name__)
        if train_dataset is None:
            raise InputError("train_dataset is missing")
        require_rows(train_dataset, (kwargs.get("data_names") or {}).get("train", "train"))
        if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
            raise InputError(_NO_SHARDING)
        if kwargs.get("compute_loss_func") or kwargs.get("formatting_func"):
            raise InputError(
                "compute_loss_func and formatting_func cannot be used: the loss is that of the completions"
            )
        if isinstance(model, str):
            if processing_class is None:
                processing_class = load_tokenizer(model, revision=(args.model_init_kwargs or {}).get("revision"))
            model = load_model(model, trainable=True, **(args.model_init_kwargs or {}))
            args.model_init_kwargs = None
        compute_in_bf16(model, args)
        AcceleratorState._reset_state()  # a trainer before this one in the process may have computed otherwise
        if not has_routers(model):
            if args.router_aux_loss_coef:
                raise InputError(f"--router_aux_loss_coef {args.router_aux_loss_coef}: the model has no experts")
            args.router_aux_loss_coef = 0.0  # else TRL asks for a loss that cannot be computed
        # How `compute_loss` is to see the pass that it is called in; outside of any, as a direct call of its own.
        self._quiet = False
        self._micro_batches = 1
        self._window: Window | None = None
        text_config = model.config.get_text_config()
        asks_for_router_logits = getattr(text_config, "output_router_logits", None)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
        )
        if asks_for_router_logits is not None:
            # TRL turns it on for good, and a model cannot generate so. Passes that need the logits ask for them.
            text_config.output_router_logits = asks_for_router_logits
        keep_in_float32(self.model)
        # SFTTrainer computes the loss from the token count itself, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        self._refuse_unsupported_parallelism()
        check_optimizer(self)

    @classmethod
    def configured(cls, args: DefenseConfig | None) -> Any:
        """The configuration that was given, or a default one; InputError if it is that of another trainer."""
        args = args if args is not None else cls.config_class(output_dir="holdfast-output")
        if not isinstance(args, cls.config_class):
            raise InputError(f"{cls.__name__} needs a {cls.config_class.__name__}, got a {type(args).__name__}")
        return args

    # ------------------------------------------------------------------ what a method says

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[Tensor, ParameterVector]:
        """The loss to report and the gradient to hand to the optimizer; here g(θ; B)."""
        return self.loss_and_gradient(model, window)

    # ------------------------------------------------------------------ what a method builds on

    def backward(
        self, model: torch.nn.Module, window: Window, *, quiet: bool = True, router_loss: bool | None = None
    ) -> Tensor:
        """Add g(θ; B) of a window to `param.grad`, reduced over the ranks once; returns L(θ; B).

        The loss is this rank's share times the number of ranks, so that its mean over ranks is L.

        Args:
            model: The model as wrapped for training.
            window: What to take the loss on.
            quiet: Leave TRL's metrics alone. Only the train batch at θ itself is to be logged.
            router_loss: Whether the auxiliary loss of a Mixture-of-Experts model's routers is part of the loss; by
                default where the pass is not quiet.
        """
        losses = []
        for part in self.each_part(model, window):
            with self._pass(part, quiet=quiet, router_loss=router_loss):
                losses.append(super().training_step(model, dict(part.batches[0]), part.tokens))
        return torch.stack(losses).sum()

    def each_part(self, model: torch.nn.Module, window: Window) -> Iterator[Window]:
        """The parts of a window, for a loop whose backward passes are reduced over the ranks once, at last."""
        for index, part in enumerate(window.parts(), start=1):
            with nullcontext() if index == len(window) else self.accelerator.no_sync(model):
                yield part

    def forward(self, model: torch.nn.Module, part: Window, *, quiet: bool = True) -> Tensor:
        """This rank's share of the loss of one micro-batch, with its graph: the first half of `backward`."""
        with self.passing(model, part, quiet=quiet) as batch:
            return cast(Tensor, self.compute_loss(model, batch, num_items_in_batch=part.tokens))

    @contextmanager
    def passing(self, model: torch.nn.Module, part: Window, *, quiet: bool = True) -> Iterator[Batch]:
        """One micro-batch on the device, for a body that takes it through the model as training does."""
        model.train()
        [batch] = part.batches
        inputs = self._prepare_inputs(dict(batch))
        with self._pass(part, quiet=quiet), self.compute_loss_context_manager():
            yield inputs

    def loss_and_gradient(
        self, model: torch.nn.Module, window: Window, *, quiet: bool = False, router_loss: bool | None = None
    ) -> tuple[Tensor, ParameterVector]:
        """L(θ; B) and g(θ; B), the gradient moved out of `param.grad`. See `backward`."""
        loss = self.backward(model, window, quiet=quiet, router_loss=router_loss)
        return loss, take_gradient(self.model)

    def cross_entropy(self, loss: Tensor, window: Window) -> Tensor:
        """L(θ; B) alone, from the loss of the logged pass over a window that was taken last."""
        if not self.aux_loss_enabled:
            return loss
        router_loss: float = sum(self._metrics["train"]["aux_loss"][-len(window) :])  # means over the ranks
        return loss - self.router_aux_loss_coef * router_loss / window.micro_batches

    def count_tokens(self, window: Window) -> None:
        """Count the tokens of an update that is trained on in quiet passes alone, as TRL counts those that it logs."""
        here = torch.tensor(sum(int(all_tokens(batch).sum()) for batch in window.batches), device=self.args.device)
        self._total_train_tokens += int(self.accelerator.reduce(here, "sum"))
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def draw(self, batches: Iterator[Batch], size: int = 1) -> Window:
        """The next `size` micro-batches of a second data set as a window with its own token count. See `take`."""
        return self.as_window(self.take(batches, size))

    def take(self, batches: Iterator[Batch], size: int = 1) -> list[Batch]:
        """The next `size` micro-batches of a second data set.

        Raises:
            InputError: The batches have come to an end, or are no iterator.
        """
        if not isinstance(batches, Iterator):  # of a list every update would take the first ones again
            raise InputError(f"batches to draw from must be an endless iterator, got a {type(batches).__name__}")
        taken = list(itertools.islice(batches, size))
        if len(taken) < size:
            raise InputError(
                f"the batches to draw from have come to an end: {type(self).__name__} needs {size} for an update, "
                f"{len(taken)} were left; expected an endless iterator"
            )
        return taken

    def as_window(self, batches: list[Batch], tokens: Tensor | int | None = None) -> Window:
        """Micro-batches as a window; without a token count, their own completion tokens over all ranks are counted.

        Raises:
            InputError: There is none, or one lacks what a loss is computed from.
        """
        require_inputs(batches)
        tokens = self._get_num_items_in_batch(batches, self.args.device) if tokens is None else tokens
        return Window(batches, tokens, len(batches))

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
        return self.stream(self.prepared(dataset, name), name, batch_size)

    def prepared(self, dataset: Dataset, name: str) -> Dataset:
        """The rows of a second data set, prepared exactly as `train_dataset` was. See `batches_of`."""
        rows: Dataset = self._prepare_dataset(dataset, self.processing_class, self.args, self.args.packing, None, name)
        return rows

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
        self._window = self.as_window(batches, tokens) if batches else None
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
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self._metrics["train"]["passes"] = [self._rows_passed / rows]  # so far, as TRL's own `num_tokens`
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss and metrics; in quiet passes no metrics. Called directly, the batch is a whole window."""
        if not self._quiet:
            self.current_gradient_accumulation_steps = self._micro_batches  # TRL divides the routers' loss by it
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**inputs, **asked, use_cache=False, fused_lm_head=True)
        tokens = torch.as_tensor(num_items_in_batch).clamp(min=1)
        loss = -outputs.log_probs.sum() / tokens * (self.accelerator.num_processes // self.get_tp_size())
        return loss + self._router_loss(outputs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The base trainer's; a warm-up as long as the run is told of, for the rate asked for never comes."""
        warm_up = self.args.get_warmup_steps(num_training_steps)
        if self.args.lr_scheduler_type != SchedulerType.CONSTANT and warm_up >= num_training_steps:
            logger.warning(
                "--warmup_steps %d: the run has %d updates, so the learning rate never comes to %g",
                warm_up,
                num_training_steps,
                self.args.learning_rate,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Stop before an update that would break the weights, on all ranks alike: the norm is the same everywhere."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(grad_norm)):
            raise TrainingError(
                f"the loss or its gradient is not finite at step {self.state.global_step + 1}; "
                f"{kept(self.args.output_dir)}"
            )
        return grad_norm

    # ------------------------------------------------------------------ details

    @contextmanager
    def _pass(self, window: Window, *, quiet: bool, router_loss: bool | None = None) -> Iterator[None]:
        """What `compute_loss` computes inside. The base trainer calls it, so it cannot be told by arguments."""
        if torch.is_grad_enabled():  # what goes forwards alone is no pass
            self._rows_passed += sum(map(rows_in, window.batches))
        before = self._quiet, self._micro_batches, self.aux_loss_enabled
        self._quiet, self._micro_batches = quiet, window.micro_batches
        self.aux_loss_enabled &= not quiet if router_loss is None else router_loss
        try:
            yield
        finally:
            self._quiet, self._micro_batches, self.aux_loss_enabled = before

    def _router_loss(self, outputs: Any) -> Tensor | float:
        """A micro-batch's part of the auxiliary loss of a Mixture-of-Experts model's routers, as TRL adds it."""
        return self.router_aux_loss_coef * outputs.aux_loss / self._micro_batches if self.aux_loss_enabled else 0.0

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
