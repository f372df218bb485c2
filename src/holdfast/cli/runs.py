"""What commands that write a run share: the output folder of a run, where it can go on, and how it ends early."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, get_quantization_config

from holdfast.checkpoint import discard, is_complete, kept, last_checkpoint, read_digests
from holdfast.cli.arguments import LoadArguments, ModelArguments
from holdfast.cli.boundary import building, working
from holdfast.cli.console import ProgressReport, say, stderr, warn
from holdfast.config import DefenseConfig
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError, Stopped
from holdfast.evaluation.stopping import unseen_end
from holdfast.files import alone_in, claim_output_dir


class _Trainer(Protocol):
    args: Any
    model: Any
    processing_class: Any

    def train(self, resume_from_checkpoint: str | None = None) -> Any: ...
    def add_callback(self, callback: Any) -> None: ...
    def remove_callback(self, callback: Any) -> None: ...


@contextmanager
def output_dir(path: Path, *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Claim the folder of a run while it lasts; one that is refused or interrupted leaves no empty folder behind.

    Args:
        path: The folder, there or not.
        marker: The file that a finished run has.
        overwrite: Whether a finished run may be replaced.

    Raises:
        InputError: It holds a finished run, cannot be written, or is being written to by another run.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    claim_output_dir(path, finished_marker=marker, overwrite=overwrite)
    try:
        with alone_in(path, f"--output_dir {path}"):
            yield path
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # not empty: then it is not ours to remove
                folder.rmdir()
        raise


def keep_apart(output: Path, written: Path, model: str) -> None:
    """Refuse an output folder that would touch the model on disk.

    Args:
        output: The --output_dir.
        written: The folder that the new model will be saved to.
        model: The --model, or another one that is read: a folder or a name on the Hub.

    Raises:
        InputError: The output lies in the model's folder, the new model would replace it, or it is one of the output
            folder's checkpoints, which a new run discards.
    """
    source = Path(model).expanduser()
    if not source.is_dir():
        return
    source, output, written = source.resolve(), output.resolve(), written.resolve()
    is_checkpoint = source.parent == output and source.name.startswith("checkpoint-")
    if output.is_relative_to(source) or written == source or is_checkpoint:
        raise InputError(
            f"--output_dir {output}: this run would write into {model}, a model that it reads; choose another folder"
        )


def keep_models(folder: Path, *, overwrite: bool) -> None:
    """Refuse to put a model in the place of one that no run of ours left there whole.

    Raises:
        InputError: There is one, and nothing was said about it.
    """
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).exists() and not overwrite:
            raise InputError(
                f"--output_dir {folder} holds a model ({name}) that is no finished run; choose another --output_dir or "
                "pass --overwrite_output_dir"
            )


def starting_checkpoint(folder: Path, resume: str | None, *, overwrite: bool) -> str | None:
    """Decide where a run starts.

    Args:
        folder: The run's output folder.
        resume: --resume_from_checkpoint: None, `true` or `last` for the newest checkpoint in `folder`, or a path.
        overwrite: Whether checkpoints of an earlier, unfinished run may be discarded.

    Returns:
        The checkpoint to go on from, or None for a new run.

    Raises:
        InputError: The checkpoint is not there or not complete, or an unfinished run lies in the folder and nothing
            was said about it.
    """
    last = last_checkpoint(folder)
    if resume is None or resume.lower() == "false":
        if last is not None and not overwrite:
            raise InputError(
                f"--output_dir {folder}: holds an unfinished run ({Path(last).name}); go on with "
                "--resume_from_checkpoint last, or start anew with --overwrite_output_dir"
            )
        return None
    if resume.lower() in ("true", "last"):
        if last is None:
            raise InputError(f"--resume_from_checkpoint {resume}: {folder} holds no complete checkpoint")
        return last
    if not is_complete(resume):
        raise InputError(f"--resume_from_checkpoint {resume}: not a complete checkpoint, it has no trainer_state.json")
    return resume


def refuse_changed_data(
    checkpoint: str, sources: Mapping[str, str], digests: Mapping[str, str | None], *, method: str
) -> None:
    """Make sure that a run goes on with the data that it was started with.

    Args:
        checkpoint: Where it goes on from.
        sources: What is to be trained on, by flag.
        digests: What its files hold, as `holdfast.checkpoint.read_digests` has it; data of the Hub are not compared.
        method: The trainer's name.

    Raises:
        InputError: A file changed, or the checkpoint is not one of this method.
    """
    before = read_digests(checkpoint, method=method)
    for flag, source in sources.items():
        if flag in before and before[flag] != digests[flag]:
            raise InputError(
                f"--{flag} {source}: its content is not what it was in the run of {checkpoint}; "
                "bring that back, or pass --allow_changed_data"
            )


def discard_checkpoints(folder: Path) -> None:
    """Remove an earlier run's checkpoints, which a later resume could mistake for the new run's."""
    discard(folder, list(folder.glob("checkpoint-*")))


class AtBeginning(TrainerCallback):
    """Clears away an earlier run when a new one has begun: after its reporters, which may yet refuse it.

    To be given to a trainer when it is made, which puts it before all that a trainer of this project writes.

    Args:
        clear: Removes what the new run replaces; called on the first rank alone.
    """

    def __init__(self, clear: Callable[[], None]) -> None:
        self._clear = clear

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Clear away."""
        if state.is_world_process_zero:
            self._clear()


def train(trainer: _Trainer, *, title: str, folder: Path, checkpoint: str | None = None) -> None:
    """Train with a progress report.

    Args:
        trainer: Any trainer of this project.
        title: What the report calls the run.
        folder: Where its checkpoints are written.
        checkpoint: Where to go on from.

    Raises:
        InputError: A reporter refuses to begin.
        KeyboardInterrupt: Ctrl-C, with a sentence that names the last good checkpoint.
        Stopped: From the trainer, with a sentence that says how to go on.
        TrainingError: From the trainer; or the disk or memory is full.
    """
    report = ProgressReport(title)
    # These two print every log to standard output, where results belong.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(report)
    trainer.args.disable_tqdm = not stderr.is_terminal
    try:
        with working(folder, trainer.args):
            trainer.train(resume_from_checkpoint=checkpoint)
    except Stopped as stopped:
        raise Stopped(
            f"asked to stop; the checkpoint is {stopped.checkpoint}, and the same command with "
            "--resume_from_checkpoint last goes on from there",
            stopped.checkpoint,
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {kept(folder)}") from None
    finally:
        report.close()


def warn_of_unseen_end(trainer: _Trainer) -> None:
    """Warn, before training, that generation will not notice the end of the answers that are trained on.

    Where they have none, rendering says so.
    """
    written = ChatFormat.of(trainer.processing_class, trainer.args)
    if written.end_token is not None and (unseen := unseen_end(trainer.model, written)):
        warn(unseen)


def last_log(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the latest value of everything that was logged, without what JSON cannot hold (NaN)."""
    latest: dict[str, Any] = {}
    for entry in history:
        latest.update(entry)
    return {name: value for name, value in latest.items() if not isinstance(value, float) or math.isfinite(value)}


def model_keywords(model: ModelArguments, config: SFTConfig) -> dict[str, Any]:
    """Take the keywords of `load_model` out of the model flags and out of --model_init_kwargs.

    Raises:
        InputError: They ask for code that comes with a model, or for a quantization that there is not.
    """
    with building(config):
        quantization = get_quantization_config(model)
    keywords = {
        "base_model": model.base_model,
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "quantization_config": quantization,
        **(config.model_init_kwargs or {}),
    }
    config.model_init_kwargs = None
    if keywords.pop("trust_remote_code", False):
        raise InputError("--trust_remote_code is refused: Holdfast never runs code that comes with a model")
    return {name: value for name, value in keywords.items() if value is not None}


def load_keywords(load: LoadArguments) -> dict[str, Any]:
    """Take the keywords of `load_model` out of the flags of a command that does not train."""
    keywords = {
        "base_model": load.base_model,
        "revision": load.model_revision,
        "dtype": load.dtype,
        "attn_implementation": load.attn_implementation,
    }
    return {name: value for name, value in keywords.items() if value is not None}


def precision_record(loaded: torch.dtype, config: DefenseConfig) -> dict[str, str]:
    """Say in which precision a model came, and was trained (and is saved) and computed on; see `holdfast.precision`."""
    computed = "bfloat16" if config.bf16 else "float32"
    return {"loaded": str(loaded).removeprefix("torch."), "trained": "float32", "computed": computed}


def announce(folder: Path, *names: str) -> None:
    """Say where the run wrote."""
    say("wrote " + ", ".join(str(folder / name) for name in names))
