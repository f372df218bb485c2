"""Training runs that can be killed and gone on with, to the same bits: what the training loop's checkpoints lack."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from holdfast.checkpoint import (
    discard_unfinished,
    is_complete,
    kept,
    last_checkpoint,
    load_state,
    publish,
    reading,
    rotate,
    save_state,
    unfinished_folder,
)
from holdfast.data.batches import BatchStream
from holdfast.data.completions import CompletionTrainer
from holdfast.errors import InputError, Stopped, TrainingError
from holdfast.interruption import Abandoned, RandomState, work_until_the_parent_ends_it
from holdfast.parameters import is_finite, trainable_parameters


@dataclass(frozen=True)
class _Boundary:
    """What moves inside an update and is part of a checkpoint: as it was after the last update, or at the beginning."""

    random: RandomState
    drawn_batches: dict[str, int]
    rows_passed: int
    flos: float
    input_tokens: int


class ResumableTrainer(CompletionTrainer):
    """The trainer whose checkpoints hold everything that a run goes on from, and are whole or not there.

    Asked to stop (`ask_to_stop`; see `holdfast.interruption.on_sigterm`), a run finishes its update, and the evaluation
    after it if one is due, saves a checkpoint and raises `Stopped`. A simulated attack is left at its next step, with
    the update that it belongs to undone.

    Attributes:
        data_digests: The SHA-256 of the files that the data came from, by whatever names; may be set. Every checkpoint
            holds them (`holdfast.checkpoint.read_digests`); comparing them is up to whoever resumes a run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.data_digests: Mapping[str, str | None] = {}
        self._streams: dict[str, BatchStream] = {}
        self._rows_passed = 0  # forwards and backwards on this rank, in simulated attacks too
        self._writes_to: Path | None = None
        self._written: Path | None = None  # the last checkpoint of this run, or the one that it came from
        self._asked_to_stop = False
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
            Stopped: The run was asked to stop; the message names the checkpoint that goes on from there.
            TrainingError: A loss, a gradient, or a weight that is to be saved is not finite; the message names the step
                and the last good checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise InputError(f"{self.args.output_dir} holds no complete {PREFIX_CHECKPOINT_DIR} to resume from")
        elif resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            raise InputError(f"{resume_from_checkpoint} is not a complete checkpoint: it has no {TRAINER_STATE_NAME}")
        if self.args.should_save:
            discard_unfinished(self.args.output_dir)
        self._written = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._boundary = self._here()
        try:
            finished = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
            self._require_finite_weights()
            return finished
        except Abandoned:
            self._go_back()
            self._stop()
        finally:
            self._asked_to_stop = False

    def ask_to_stop(self) -> None:
        """Ask the run to save a checkpoint and stop; from another thread or a signal handler, on any of the ranks."""
        self._asked_to_stop = True

    def leave_if_asked_to_stop(self) -> None:
        """For work inside an update that takes long: leave it, and with it the update, if a rank was asked to stop.

        To be called on all ranks alike, and to be left by putting the weights back as they were.

        Raises:
            Abandoned: A rank was asked to stop; to be let through.
        """
        if self._is_asked_to_stop():
            raise Abandoned

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The base trainer's. SIGTERM often comes to all processes of a job; the workers leave it to this one."""
        loader: DataLoader[Any] = super().get_train_dataloader()
        own = getattr(loader, "base_dataloader", loader)  # accelerate has wrapped it
        own.worker_init_fn = partial(work_until_the_parent_ends_it, own.worker_init_fn)
        return loader

    def _is_asked_to_stop(self) -> bool:
        """Whether any rank was; all of them have to agree on where to stop."""
        if self.args.world_size == 1:
            return self._asked_to_stop
        asked = torch.tensor(float(self._asked_to_stop), device=self.args.device)
        return bool(self.accelerator.reduce(asked, "sum").item())

    def _stop(self) -> NoReturn:
        """Save a checkpoint, unless there is one of this step, and leave the training loop."""
        step = self.state.global_step
        place = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if self._written is None or self._written.resolve() != place.resolve() or self.args.save_only_model:
            self.args.save_only_model = False  # this one is to go on from
            self._save_checkpoint(self.model, trial=None)
        raise Stopped(
            f"asked to stop after step {step} of {self.state.max_steps}; {place} goes on from there", str(place)
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What comes between two updates: logs, evaluation, checkpoint; here the run stops if asked to."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if not self.control.should_training_stop and self._is_asked_to_stop():
            self._stop()
        self._boundary = self._here()

    def _require_finite_weights(self) -> None:
        """Refuse to keep weights that the last update broke: nothing but the next one's loss would tell."""
        if not is_finite(trainable_parameters(self.model)):
            raise TrainingError(
                f"the weights are not finite after step {self.state.global_step}; {kept(self.args.output_dir)}"
            )

    def _here(self) -> _Boundary:
        drawn = {name: stream.drawn for name, stream in self._streams.items()}
        tokens = self.state.num_input_tokens_seen
        return _Boundary(RandomState.of(self.args.device), drawn, self._rows_passed, self.current_flos, tokens)

    def _go_back(self) -> None:
        """Undo what an abandoned update has drawn and counted; it has not come to change the weights."""
        self._boundary.random.restore(self.args.device)
        for name, drawn in self._boundary.drawn_batches.items():
            self._streams[name].drawn = drawn
        self._rows_passed = self._boundary.rows_passed
        self.current_flos = self._boundary.flos
        self.state.num_input_tokens_seen = self._boundary.input_tokens

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, and put it in its place when all ranks have written their part of it.

        The base trainer writes in place, rank by rank, so that a killed process leaves a folder that looks like any
        other. It also counts that folder when it deletes old ones: here that comes after the new one is in its place.
        """
        self._require_finite_weights()
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        place = Path(self.args.output_dir, name)
        aside = unfinished_folder(self.args.output_dir)
        self._writes_to = aside
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:  # on a full disk there is room again for what is to be kept
                discard_unfinished(self.args.output_dir)
            raise
        finally:
            self._writes_to = None
        if self.state.best_model_checkpoint == str(aside / name):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(aside / name, place)
            if (self.args.save_total_limit or 0) > 0:
                rotate(self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        self._written = place

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writes_to or super()._get_output_dir(trial))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        own = {
            "drawn_batches": {name: stream.drawn for name, stream in self._streams.items()},
            "rows_passed": self._rows_passed,
            "train_tokens": self._total_train_tokens,  # TRL logs it, but forgets it
        }
        save_state(
            output_dir,
            {**self.method_state(), **own},
            method=type(self).__name__,
            digests=self.data_digests,
            write=self.args.should_save,
        )

    def _load_from_checkpoint(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with reading(checkpoint):
            super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(checkpoint):
            state = load_state(checkpoint, trainable_parameters(self.model), method=type(self).__name__)
            super()._load_optimizer_and_scheduler(checkpoint)
        self._rows_passed, self._total_train_tokens = state.pop("rows_passed"), state.pop("train_tokens")
        for name, drawn in state.pop("drawn_batches").items():
            if name in self._streams:  # a data set that a method can do without may have been left out
                self._streams[name].drawn = drawn
        self.load_method_state(state)
        self._boundary = self._here()

    def _load_rng_state(self, checkpoint: str) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)
        self._boundary = dataclasses.replace(self._boundary, random=RandomState.of(self.args.device))
