"""Training runs that can be killed and gone on with, to the same bits: what the training loop's checkpoints lack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from holdfast.checkpoint import (
    discard_unfinished,
    is_complete,
    last_checkpoint,
    load_state,
    publish,
    save_state,
    unfinished_folder,
)
from holdfast.data.batches import BatchStream
from holdfast.data.completions import CompletionTrainer
from holdfast.errors import InputError
from holdfast.parameters import trainable_parameters


class ResumableTrainer(CompletionTrainer):
    """The trainer whose checkpoints hold everything that a run goes on from, and are whole or not there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._streams: dict[str, BatchStream] = {}
        self._writes_to: Path | None = None
        super().__init__(*args, **kwargs)

    # ------------------------------------------------------------------ what a method says

    def method_state(self) -> dict[str, Any]:
        """What the method must remember across a checkpoint: parameter vectors and values that JSON can hold."""
        return {}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `method_state` returned before the checkpoint."""

    # ------------------------------------------------------------------ the run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train; `resume_from_checkpoint` is a checkpoint folder, or True for the last complete one.

        Raises:
            InputError: There is no such checkpoint.
            TrainingError: A loss or gradient is not finite; the message names the step and the last good checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise InputError(f"{self.args.output_dir} holds no complete {PREFIX_CHECKPOINT_DIR} to resume from")
        elif resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            raise InputError(f"{resume_from_checkpoint} is not a complete checkpoint: it has no {TRAINER_STATE_NAME}")
        if self.args.should_save:
            discard_unfinished(self.args.output_dir)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, and put it in its place when all ranks have written their part of it.

        The base trainer writes in place, rank by rank, so that a killed process leaves a folder that looks like any
        other. It also counts that folder when it deletes old ones: here that comes after the new one is in its place.
        """
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        place = Path(self.args.output_dir, name)
        aside = unfinished_folder(self.args.output_dir)
        self._writes_to = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writes_to = None
        if self.state.best_model_checkpoint == str(aside / name):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(aside / name, place)
            rotate_checkpoints(
                self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writes_to or super()._get_output_dir(trial))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        own = {
            "drawn_batches": {name: stream.drawn for name, stream in self._streams.items()},
            "train_tokens": self._total_train_tokens,  # TRL logs it, but forgets it
        }
        save_state(output_dir, {**self.method_state(), **own}, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = load_state(checkpoint, trainable_parameters(self.model))
        self._total_train_tokens = state.pop("train_tokens")
        for name, drawn in state.pop("drawn_batches").items():
            self._streams[name].drawn = drawn
        self.load_method_state(state)
