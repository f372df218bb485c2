"""DefenseConfig: what every Holdfast trainer can be told."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from holdfast.errors import InputError
from holdfast.files import with_keys_once

logger = logging.getLogger(__name__)

LARGEST = torch.finfo(torch.float32).max
"""What weights can be taken times."""
RAW_TEXT_HELP = "Take prompts and completions as they stand, in training as in evaluation, without the chat template."
_MAPPINGS = (
    "model_init_kwargs",
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "dataset_kwargs",
    "liger_kernel_config",
)
#: What transformers and `torch.utils.checkpoint.checkpoint` take that can be written as JSON.
_CHECKPOINTING = frozenset(
    {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "every_n_layers", "offload"}
)


@dataclass
class DefenseConfig(SFTConfig):
    """Configuration of every Holdfast trainer: TRL's `SFTConfig` and what follows.

    Where no accelerator is found, CPU and float32 are chosen; `bf16=True` then means bf16 autocast on the CPU. Weights
    that are trained are float32 in any case, and those of a model that comes in half precision are computed on in bf16
    (`holdfast.precision`). The loss always falls on assistant tokens only. A process trains on one GPU: for several,
    torchrun starts one for each.

    Args:
        num_train_epochs: Passes over the train data; by default 3, unless `max_steps` is given. -1 is none given.
        system_prompt: A system line for every conversation that has none.
        chat_template_kwargs: Keywords for the chat template, as a mapping or as JSON: `{"enable_thinking": false}`.
        raw_text: Take prompts and completions as they stand, without the chat template.
        drop_untrainable_rows: Leave out rows that truncation left without a completion token, instead of refusing them.

    Raises:
        InputError: A setting that no defense can work with; the message names it.
    """

    if TYPE_CHECKING:  # fields of SFTConfig that are set here
        bf16: bool | None
        mixed_precision: str
        assistant_only_loss: bool
        completion_only_loss: bool | None
        use_cpu: bool

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over the train data, for a run without --max_steps (default: 3)."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "A system line for every conversation that has none."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Keywords for the chat template as JSON, e.g. {"enable_thinking": false}.'}
    )
    raw_text: bool = field(default=False, metadata={"help": RAW_TEXT_HELP})
    drop_untrainable_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows without a completion token after truncation, instead of refusing them."},
    )

    def __post_init__(self) -> None:
        """Check what was given and choose a device and a precision."""
        require_positive(self, "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
        require_positive(self, "max_length", "dataloader_prefetch_factor", "per_device_eval_batch_size")
        self._choose_length()
        require_not_negative(self, "weight_decay", "max_grad_norm", "neftune_noise_alpha", "dataloader_num_workers")
        for name in _MAPPINGS:
            if isinstance(value := getattr(self, name), str) and not value.lstrip().startswith("{"):
                json_object(name, value)
        refused = {
            "trust_remote_code": "Holdfast never runs code that comes with a model",
            "fp16": "its loss scaling would scale simulated attacks too; use bf16",
            "label_smoothing_factor": "the loss of every method is plain cross-entropy",
            "deepspeed": "its gradients are out of reach; use FSDP2",
            "enable_jit_checkpoint": "SIGTERM is answered already, with a checkpoint after a whole update",
        }
        for name, reason in refused.items():
            if getattr(self, name):
                raise InputError(f"--{name} cannot be used: {reason}")
        if self.loss_type != "nll" or self.completion_only_loss is False:
            raise InputError(
                "--loss_type must be nll and --completion_only_loss true: the loss is that of the completions"
            )
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json_object("chat_template_kwargs", self.chat_template_kwargs)
        self.completion_only_loss = True
        self.assistant_only_loss = False  # answers are found without the markers that TRL would ask the template for
        self.bf16_was_ruled_out = self.bf16 is False
        if self.use_cpu or not torch.accelerator.is_available():
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
            self.dataloader_pin_memory = False
            if self.activation_offloading:
                raise InputError("--activation_offloading needs an accelerator to take the activations from")
        super().__post_init__()
        self._take_one_gpu()
        require_positive(self, "pad_to_multiple_of")
        if unknown := (self.activation_checkpointing_kwargs or {}).keys() - _CHECKPOINTING:
            raise InputError(
                f"--activation_checkpointing_kwargs has no {', '.join(sorted(unknown))}; "
                f"it takes {', '.join(sorted(_CHECKPOINTING))}"
            )
        if self.fsdp and self.fsdp_config.get("state_dict_type", "FULL_STATE_DICT") != "FULL_STATE_DICT":
            raise InputError("--fsdp_config state_dict_type must be FULL_STATE_DICT: others are read by unpickling")
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise InputError("--push_to_hub needs --hub_strategy end: only a finished model is published")

    def _take_one_gpu(self) -> None:
        """Of several GPUs that one process sees, transformers would take all by `nn.DataParallel`.

        Its replicas run the forward of the original model, as TRL patches it; and all else here runs on one device.
        """
        if self.n_gpu > 1:
            logger.warning(
                "%d GPUs are to be seen, and one process trains on the first of them alone; torchrun starts one for "
                "each, and CUDA_VISIBLE_DEVICES chooses",
                self.n_gpu,
            )
            self._n_gpu = 1

    def _choose_length(self) -> None:
        """Steps or epochs, whichever was given, and not both: transformers would take the steps without a word."""
        for name in ("max_steps", "num_train_epochs"):
            if getattr(self, name) != -1:
                require_positive(self, name)
        if self.max_steps == -1:
            self.num_train_epochs = 3.0 if self.num_train_epochs in (None, -1) else self.num_train_epochs
        elif self.num_train_epochs not in (None, -1):
            raise InputError(
                f"--max_steps {self.max_steps} and --num_train_epochs {self.num_train_epochs:g} both set the length of "
                "the run; give one of them (a recipe's is taken back with -1)"
            )
        else:
            self.num_train_epochs = -1


def require_positive(config: Any, *names: str) -> None:
    """Raise InputError for the first of these settings that is given and not above zero, or not finite in 32 bits."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name} must be greater than 0, got {value}")
        _require_finite(name, value)


def require_not_negative(config: Any, *names: str) -> None:
    """Raise InputError for the first of these settings that is given and below zero, or not finite in 32 bits."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise InputError(f"--{name} must not be negative, got {value}")
        _require_finite(name, value)


def _require_finite(name: str, value: float | None) -> None:
    if value is not None and value > LARGEST:
        raise InputError(f"--{name} must be a number that 32 bits can hold, got {value}")


def json_object(name: str, text: str) -> dict[str, Any]:
    """The mapping that a flag gives as JSON; InputError if it is no JSON object, or has a key twice."""
    try:
        parsed = json.loads(text, object_pairs_hook=with_keys_once)
    except json.JSONDecodeError:
        parsed = None
    except ValueError as error:
        raise InputError(f"--{name}: {error} in {text!r}") from error
    if not isinstance(parsed, dict):
        raise InputError(f"--{name} must be a JSON object, got {text!r}")
    return parsed
