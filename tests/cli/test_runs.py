"""Runs that end early, and runs that go on."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli import main


@pytest.fixture
def run(model_dir: Path, train_data: str, tmp_path: Path) -> Callable[..., int]:
    words = [
        *("align", "sft", "--model", str(model_dir), "--train_data", train_data, "--output_dir", str(tmp_path / "out")),
        *("--max_steps", "6", "--batch_size", "2", "--max_length", "128", "--logging_steps", "1"),
        *("--learning_rate", "1e-3", "--gradient_checkpointing", "false"),
    ]
    return lambda *more, saves=("--save_steps", "2"): main([*words, *saves, *more])


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Send Ctrl-C's signal in the middle of an update."""
    from holdfast.trainer import DefenseTrainer

    # Started in the background of a shell, Python would inherit that the signal is to be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def arrange(update: int) -> None:
        original = DefenseTrainer.defended_gradient

        def interrupted(self: DefenseTrainer, *args: Any) -> Any:
            if self.state.global_step == update - 1:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args)

        monkeypatch.setattr(DefenseTrainer, "defended_gradient", interrupted)

    yield arrange
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_and_names_the_last_checkpoint(
    run: Callable[..., int],
    interrupt_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    interrupt_at(6)
    assert run() == 130
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence == f"holdfast: interrupted; the last good checkpoint is {out / 'checkpoint-4'}"
    assert not (out / "holdfast.json").exists()
    monkeypatch.undo()

    assert run() == 2  # neither resumed nor overwritten by accident
    assert "--resume_from_checkpoint last" in capsys.readouterr().err
    assert (out / "checkpoint-4" / "trainer_state.json").is_file()

    assert run("--resume_from_checkpoint", "last") == 0
    shown = capsys.readouterr().err
    assert "step 6/6" in shown
    assert "step 4/6" not in shown
    assert (out / "holdfast.json").is_file()


def test_ctrl_c_before_the_first_checkpoint(
    run: Callable[..., int], interrupt_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(1)
    assert run() == 130
    assert capsys.readouterr().err.endswith("interrupted; no checkpoint had been written yet\n")


def test_overwriting_discards_the_checkpoints_of_the_run_before(
    run: Callable[..., int], interrupt_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_at(6)
    assert run() == 130
    monkeypatch.undo()
    assert run("--overwrite_output_dir", "--max_steps", "2") == 0
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert run("--overwrite_output_dir", "--max_steps", "1", saves=("--save_strategy", "no")) == 0
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_resuming_from_a_named_checkpoint(
    run: Callable[..., int], interrupt_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_at(6)
    assert run() == 130
    monkeypatch.undo()
    assert run("--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")) == 0


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("align sft", "train_data"),
        ("align sft", "eval_data"),
        ("align patcher", "attack_data"),
        ("finetune lisa", "safety_data"),
        ("finetune antibody", "refusal"),
    ],
)
def test_resuming_on_changed_data(
    command: str, flag: str, model_dir: Path, train_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def go(*more: str) -> int:
        words = ["--model", str(model_dir), "--output_dir", str(tmp_path / "out"), "--train_data", train_data]
        words += [] if flag == "train_data" else [f"--{flag}", str(changed)]
        words += ["--eval_strategy", "steps"] if flag == "eval_data" else []
        tiny = ["--batch_size", "2", "--save_steps", "1", "--max_length", "128", "--gradient_checkpointing", "false"]
        return main([*command.split(), *words, *tiny, *more])

    changed = Path(train_data)
    if flag != "train_data":
        changed = tmp_path / "second.jsonl"  # every line is a row, and a refusal
        changed.write_bytes(Path(train_data).read_bytes())
    assert go("--max_steps", "1") == 0
    before = changed.read_bytes()
    changed.write_bytes(before.replace(b"rust storm", b"dust storm"))
    resume = ["--resume_from_checkpoint", "last", "--overwrite_output_dir", "--max_steps"]
    capsys.readouterr()
    assert go(*resume, "2") == 2
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"holdfast: --{flag} {changed}: its content is not what it was in the run of {checkpoint}; bring that back, "
        "or pass --allow_changed_data"
    )
    assert go(*resume, "2", "--allow_changed_data") == 0
    assert go(*resume, "3") == 0  # the new content is now what the run was trained on
    changed.write_bytes(before)
    assert go(*resume, "4") == 2


def test_data_that_moved_are_the_same(
    run: Callable[..., int], train_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--max_steps", "2") == 0
    moved = Path(train_data).rename(tmp_path / "moved.jsonl")
    resume = ["--resume_from_checkpoint", "last", "--overwrite_output_dir", "--train_data"]
    assert run(*resume, train_data) == 2
    assert run(*resume, str(moved)) == 0


def test_resuming_with_another_method(
    run: Callable[..., int], train_data: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--max_steps", "2") == 0
    words = ["--model", str(model_dir), "--train_data", train_data, "--output_dir", str(tmp_path / "out")]
    resume = ["--resume_from_checkpoint", "last", "--overwrite_output_dir"]
    assert main(["align", "vaccine", *words, *resume]) == 2
    written = f"{tmp_path / 'out' / 'checkpoint-2'} was written by DefenseTrainer"
    assert capsys.readouterr().err.endswith(f"holdfast: {written}, and VaccineTrainer cannot go on from it\n")


def test_loss_that_is_not_finite(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--learning_rate", "1e36", "--max_grad_norm", "0", "--save_steps", "1") == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "is not finite at step 2" in sentence
    assert sentence.endswith(f"the last good checkpoint is {tmp_path / 'out' / 'checkpoint-1'}")
    assert not (tmp_path / "out" / "holdfast.json").exists()


def test_disk_trouble_is_one_sentence(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "holdfast.json")

    monkeypatch.setattr("holdfast.cli.training.write_json", full)
    assert run("--max_steps", "1", saves=("--save_strategy", "no")) == 1
    sentence = "holdfast: [Errno 28] No space left on device: 'holdfast.json'; no checkpoint had been written yet"
    assert capsys.readouterr().err.splitlines()[-1] == sentence
