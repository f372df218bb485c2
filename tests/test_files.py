"""Files are written whole or not at all, and finished runs are not overwritten."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import pytest
import torch
from trl import SFTConfig

from holdfast.errors import InputError
from holdfast.files import (
    alone_in,
    append_jsonl,
    claim_output_dir,
    digest,
    read_text,
    run_record,
    versions,
    whole_lines,
    write_json,
    write_jsonl,
    write_text,
)


class Color(StrEnum):
    RED = "red"


@dataclass
class Settings:
    path: Path = Path("a/b")
    color: Color = Color.RED
    dtype: torch.dtype = torch.bfloat16
    rate: float = float("inf")
    names: set[str] = field(default_factory=lambda: {"b", "a"})
    steps: tuple[int, ...] = (1, 2)
    nothing: None = None


def test_a_text_file_is_read_whatever_editor_wrote_it(tmp_path):
    path = tmp_path / "a.txt"
    for content in ("é\nb\n", "é\r\nb\r\n"):
        for encoding in ("utf-8", "utf-8-sig"):
            path.write_bytes(content.encode(encoding))
            assert read_text(path) == "é\nb\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read (No such file or directory)"), (b"ab\xe9", "is not UTF-8 text (byte 2)")],
)
def test_a_text_file_that_is_none_is_refused(tmp_path, content, problem):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_text(path)
    assert str(caught.value) == f"{path}: {problem}"
    with pytest.raises(InputError) as caught:
        read_text(path, named="--refusal a.txt", expected="a list")
    assert str(caught.value) == f"--refusal a.txt: {problem}; expected a list"


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_text_is_written_with_missing_folders_and_replaces_what_was_there(tmp_path):
    target = tmp_path / "new" / "file.txt"
    write_text(target, "first")
    write_text(target, "θ\nsecond")
    assert target.read_bytes() == "θ\nsecond".encode()
    assert names(target.parent) == ["file.txt"]


def test_files_get_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_nan_is_refused_and_the_old_file_kept(tmp_path):
    target = tmp_path / "results.json"
    write_json(target, {"asr": 0.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(target, {"asr": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_jsonl(target, [{"asr": 1.0}, {"asr": float("inf")}])
    assert json.loads(target.read_text()) == {"asr": 0.5}
    assert names(tmp_path) == ["results.json"]


def test_a_failing_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    target = tmp_path / "results.json"
    write_text(target, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


def test_jsonl_has_one_object_per_line(tmp_path):
    rows = [{"a": "x\ny"}, {"a": "ü"}]
    write_jsonl(tmp_path / "rows.jsonl", iter(rows))
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_an_output_folder_is_created(tmp_path):
    folder = claim_output_dir(tmp_path / "a" / "b", finished_marker="results.json", overwrite=False)
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_an_unfinished_run_may_be_written_over(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    assert claim_output_dir(tmp_path, finished_marker="results.json", overwrite=False) == tmp_path


def test_a_finished_run_is_kept_unless_told(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds a finished run.*--overwrite_output_dir"):
        claim_output_dir(tmp_path, finished_marker="results.json", overwrite=False)
    claim_output_dir(tmp_path, finished_marker="results.json", overwrite=True)
    assert (tmp_path / "results.json").read_text() == "{}"


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"file is a file, but a folder is expected"):
        claim_output_dir(tmp_path / "file", finished_marker="results.json", overwrite=True)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output_dir .* cannot be written \(Not a directory\)"):
        claim_output_dir(tmp_path / "file" / "sub", finished_marker="results.json", overwrite=False)


def test_a_folder_is_written_to_by_one_run_at_a_time(tmp_path):
    """Also after a run that raised; the file of the lock goes with it."""
    for error in (None, ZeroDivisionError):
        with suppress(ZeroDivisionError), alone_in(tmp_path, "--output_dir out"):
            sentence = rf"--output_dir out is being written to by another run \(process {os.getpid()}\); choose another"
            with pytest.raises(InputError, match=sentence), alone_in(tmp_path, "--output_dir out"):
                pytest.fail("two at once")
            assert names(tmp_path) == ["_lock"]
            if error is not None:
                raise error
        assert names(tmp_path) == []


def test_a_lock_ends_with_its_process(tmp_path):
    """However that ends, and though it has left its file, and another process that it forked off."""
    script = (
        "import os, sys, time; from pathlib import Path; from holdfast.files import alone_in\n"
        "with alone_in(Path(sys.argv[1]), 'x'):\n"
        "    child = os.fork()\n"
        "    if child: print(child, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        with pytest.raises(InputError, match=rf"\(process {process.pid}\)"), alone_in(tmp_path, "x"):
            pytest.fail("two at once")
        process.kill()
        process.wait()
        try:
            with alone_in(tmp_path, "x"):
                assert (tmp_path / "_lock").read_text().startswith(f"{os.getpid()} ")
        finally:
            os.kill(child, signal.SIGKILL)
    assert names(tmp_path) == []


def test_the_first_rank_locks_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with alone_in(tmp_path, "x"), alone_in(tmp_path, "x"):
        assert names(tmp_path) == []


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with alone_in(tmp_path, "--output_dir out"):
        pass
    [record] = caplog.records
    assert record.message.startswith("--output_dir out is on a file system without locks")
    assert names(tmp_path) == []


def test_versions_name_all_that_results_depend_on():
    assert set(versions()) == {"python", "holdfast", "torch", "transformers", "trl", "peft", "datasets", "accelerate"}
    assert versions()["torch"] in torch.__version__


def test_a_record_of_any_dataclass_is_json():
    record = run_record(Settings(), seed=3)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["seed"] == 3
    assert record["config"] == {
        "path": "a/b",
        "color": "red",
        "dtype": "torch.bfloat16",
        "rate": "inf",
        "names": ["a", "b"],
        "steps": [1, 2],
        "nothing": None,
    }


def test_a_record_hides_access_tokens(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), hub_token="hf_secret", use_cpu=True, bf16=False)
    assert "hf_secret" not in json.dumps(run_record(config, seed=0))


def test_digest_is_of_the_content(tmp_path):
    (tmp_path / "empty").touch()
    assert digest(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "empty")


def test_what_does_not_fit_is_not_added_in_part(tmp_path):
    path = tmp_path / "points.jsonl"
    append_jsonl(path, [{"steps": 0}])
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_jsonl(path, [{"steps": 1}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    append_jsonl(path, [{"steps": 1}])
    assert path.read_text() == '{"steps": 0}\n{"steps": 1}\n'


def test_half_a_line_is_taken_off_the_lines_that_were_added(tmp_path):
    path = tmp_path / "points.jsonl"
    assert whole_lines(path) == []
    append_jsonl(path, [{"said": "one\u2028line"}, {"said": "2"}])
    before = path.read_bytes()
    path.write_bytes(before + b'{"said": "hal')
    assert [json.loads(line)["said"] for line in whole_lines(path)] == ["one\u2028line", "2"]
    assert path.read_bytes() == before
    path.write_bytes(b'{"said": "hal')
    assert whole_lines(path) == []
    assert path.read_bytes() == b""
