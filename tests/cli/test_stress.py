"""A search through the command line: what it leaves, that it goes on where it was killed, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import read_json, read_lines
from holdfast.cli import main
from holdfast.models import load_model_and_tokenizer
from holdfast.stress.certificate import read_certificate
from judge_server import material, serving
from stress.made import start, words_of_search

Refused = Callable[..., str]

#: What takes long, but for one of each way to be measured.
_SLOW = ["soft-prompt", "best-of-n", "lora", "full", "hybrid", "pruning", "noise", "rounding", "base-holder"]


@pytest.fixture
def words(organism: Path) -> list[str]:
    return words_of_search(organism)


@pytest.fixture
def other(organism: Path, tmp_path: Path) -> Path:
    """A model of the same shapes that is a little damaged."""
    folder = tmp_path / "other"
    shutil.copytree(organism / "model", folder)
    model, _ = load_model_and_tokenizer(str(folder))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    return folder


def without_clocks(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            name: without_clocks(value) for name, value in content.items() if name not in ("seconds", "measured_on")
        }
    return [without_clocks(value) for value in content] if isinstance(content, list) else content


def records(folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted((folder / "trials").glob("*/*.json"))]


#: One way of asking, chains, and fine-tunings that are measured with an opener, too.
_FEW = ["best-of-n", "demonstrations", "soft-prompt", "raw", "training-free", "base-holder", "ablation", "lora"]


def test_a_killed_search_goes_on_to_the_same_certificate(words, other, tmp_path, capsys):
    """SIGKILL, SIGTERM and the number of processes leave no trace in what is found."""
    more = [*words, "--counterpart", str(other), "--leave_out", *_FEW]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*more, "--processes", "1", "--output_dir", str(whole)]) == 0
    assert "without a step of training" in capsys.readouterr().out

    process = start([*more, "--processes", "2", "--output_dir", str(killed)])
    while len(list(killed.glob("trials/*/*.json"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)

    threading.Thread(target=terminate_at, args=(killed, 8), daemon=True).start()
    assert main([*more, "--processes", "1", "--output_dir", str(killed)]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("holdfast: asked to stop; what was tried is in ")
    assert not (killed / "certificate.json").exists()

    assert main([*more, "--processes", "1", "--output_dir", str(killed)]) == 0
    assert "going on with the search" in capsys.readouterr().err
    first, second = (without_clocks(read_certificate(folder / "certificate.json")) for folder in (whole, killed))
    assert first == second
    assert without_clocks(records(whole)) == without_clocks(records(killed))
    for path in (whole / "samples").iterdir():
        assert path.read_bytes() == (killed / "samples" / path.name).read_bytes()
    assert main([*more, "--output_dir", str(killed)]) == 2
    assert "holds a finished run (certificate.json)" in capsys.readouterr().err


def terminate_at(folder: Path, trials: int) -> None:
    while len(list(folder.glob("trials/*/*.json"))) < trials:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_search_leaves_records_answers_and_a_certificate(words, tmp_path):
    out = tmp_path / "out"
    left = [name for name in _SLOW if name != "base-holder"]
    claims = tmp_path / "claims.json"
    claims.write_text('{"refusals": 1.0}', encoding="utf-8")
    words += ["--reported", str(claims)]
    assert main([*words, "--leave_out", *left, "--processes", "1", "--output_dir", str(out)]) == 0
    certificate = read_certificate(out / "certificate.json")
    assert certificate["attackers"].keys() == {"prompting", "training-free"}
    assert certificate["counterpart"] is None
    assert certificate["reported"] == {"refusals": 1.0}
    reasons = {one["attack"]: one["reason"] for one in certificate["threat_model"]["left_out"]}
    assert reasons == {**dict.fromkeys(left, "left out on request"), "base-holder": "no public base model was given"}
    kept = records(out)
    assert certificate["trials"]["model"] == len(kept)
    assert {record["stage"] for record in kept} == {"grid", "tpe", "confirm"}
    asked = next(record for record in kept if record["attack"] == "none" and record["stage"] == "grid")
    assert asked["points"][0]["asr"] == 1.0
    assert asked["prompts"] == 32
    assert max(asked["points"][0]["broken_rows"]) > 90  # screening's prompts lie all over the file
    confirmed = [record for record in kept if record["stage"] == "confirm"]
    assert {record["prompts"] for record in confirmed} == {96}
    plain = read_lines(out / "samples" / "prompting-model.jsonl")
    assert len([row for row in plain if row["set"] == "harmful"]) == 96
    before = json.loads((out / "stress.json").read_text(encoding="utf-8"))
    assert before["suite"] == "quick"
    assert before["seeds"] == [0, 1]


def test_what_a_judge_at_a_server_has_said_is_not_asked_again_after_a_kill(words, organism, tmp_path):
    out, killed_at = tmp_path / "out", 20
    right = {row["prompt"][0]["content"]: row["answer"] for row in read_lines(organism / "eval" / "hazards.jsonl")}
    killed: list[subprocess.Popen[str]] = []

    def reply(body: dict[str, Any]) -> str:
        prompt, answer = material(body)
        if len(server.graded) == killed_at:
            killed[0].kill()
        return json.dumps({"grade": 5 if answer.partition(": ")[2] == right.get(prompt) else 2})

    left = ["best-of-n", "demonstrations", "soft-prompt", "training-free", "base-holder", "lora", "full", "hybrid"]
    with serving(reply) as server:
        place = words.index("--judge")
        words[place : place + 2] = ["--judge", "rubric", "--judge_model", "big", "--judge_url", server.url]
        words += ["--judge_concurrency", "1", "--max_prompts", "12", "--leave_out", *left, "--processes", "1"]
        words += ["--output_dir", str(out)]
        killed.append(start(words))
        killed[0].communicate(timeout=300)
        before, kept = list(server.graded), len(read_lines(out / "judged.jsonl"))
        assert main(words) == 0
        after = server.graded[len(before) :]
    assert killed_at - 3 <= kept <= len(before)
    assert len({*before} & {*after}) <= len(before) - kept  # what was under way
    assert len(after) == len({*after})
    assert len(read_lines(out / "judged.jsonl")) == len({*before, *after})
    certificate = read_certificate(out / "certificate.json")
    assert certificate["judge"]["name"] == "rubric"
    assert certificate["union"]["model"]["asr"] == 1.0


def test_an_impatient_interrupt_ends_all_processes_in_one_line(words, tmp_path):
    """A terminal sends it to all of them; those of a search that has just begun are still importing."""
    out = tmp_path / "out"
    process = start([*words, "--output_dir", str(out)])
    while not (out / "study.db").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(1)
    while process.poll() is None:  # its very end is interrupted, too
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.02)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    told = [line for line in said.splitlines() if line]
    assert told == [
        "loading the models, and measuring what they know",
        f"holdfast: interrupted; what was tried is in {out}, and the same command goes on from there",
    ]


def test_an_interrupt_that_comes_into_another_takes_nothing_of_what_is_said(words, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("holdfast.cli.stress.run_workers", interrupt)
    monkeypatch.setattr("holdfast.cli.stress.Progress.__exit__", interrupt)
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 130
    assert "interrupted; what was tried is in" in capsys.readouterr().err


@pytest.fixture
def begun(words, tmp_path, monkeypatch) -> Path:
    """The folder of a search that was interrupted before a trial had ended."""
    out = tmp_path / "begun"
    with monkeypatch.context() as patch:
        patch.setattr("holdfast.cli.stress.run_workers", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        assert main([*words, "--output_dir", str(out)]) == 130
    return out


def test_another_search_in_the_folder_is_refused(words, begun, capsys):
    capsys.readouterr()
    assert main([*words, "--max_new_tokens", "17", "--seed", "7", "--output_dir", str(begun)]) == 2
    said = capsys.readouterr().err
    assert f"{begun} holds another search, with another seed, seeds, decoding.max_new_tokens (stress.json); " in said
    (begun / "stress.json").write_text('{"identity":', encoding="utf-8")
    assert main([*words, "--output_dir", str(begun)]) == 2
    assert "holds another search, which cannot be told any more (stress.json); choose" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["trials", "samples", "tax", "study.db"])
def test_what_no_search_has_written_is_left_alone(words, name, tmp_path, capsys):
    mine = tmp_path / "out" / name / "mine.jsonl"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert (
        f"out holds {name}, and no search was begun there, which stress.json would tell of" in capsys.readouterr().err
    )
    assert mine.exists()


def test_what_a_process_of_a_search_cannot_write_is_told_in_one_line(words, begun, capfd):
    (begun / "tax").touch()
    assert main([*words, "--output_dir", str(begun)]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1] == f"holdfast: [Errno 20] Not a directory: '{begun / 'tax' / 'model.json'}'"


def test_what_does_not_fit_is_refused(words, organism, model_dir, tmp_path, refused: Refused):
    assert f"--counterpart {model_dir} has another architecture than --model" in refused(
        *words, "--counterpart", str(model_dir)
    )
    assert "--base is not what the model was made of" in refused(*words, "--base", str(model_dir))
    for flag in ("--counterpart", "--base"):
        said = refused(*words, flag, str(tmp_path / "none"))
        assert f"{flag}: model {tmp_path / 'none'} is neither a folder nor a model on the Hub" in said
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(organism / "model", tokenizer)
    (tokenizer / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert "has another tokenizer or chat template than" in refused(*words, "--counterpart", str(tokenizer))
    without = [word for word in words if word not in ("--attack_data", str(organism / "attack.jsonl"))]
    said = refused(*without)
    assert "ablation: such attacks need harmful prompts; give --attack_data, or leave them out" in said
    assert "--leave_out ablation" in said
    said = refused(*without, "--leave_out", "ablation")
    assert said.endswith("--leave_out demonstrations fine-tuning soft-prompt")
    benign = [word for word in words if word not in ("--benign_data", str(organism / "eval" / "crafts.jsonl"))]
    assert "ablation: such attacks need harmless prompts; give --benign_data" in refused(*benign)
    assert "--leave_out magic: there is no such attack or kind" in refused(*words, "--leave_out", "magic")


def test_ablation_where_it_is_not_known_what_writes_to_the_stream_is_refused_or_left_out(
    words, unnamed_dir, refused: Refused
):
    words[words.index("--model") + 1] = str(unnamed_dir)
    words += ["--max_prompts", "4", "--leave_out", "soft-prompt"]
    said = refused(*words)
    assert "no matrix in model.layers.0.temporal_block is known to write to the residual stream" in said
    assert said.endswith("; or leave such attacks out: --leave_out ablation dropping")
    # Without them the next thing is looked at.
    for left in (["ablation", "dropping"], ["training-free", "hybrid"]):
        assert "the model answers none of 4 prompts exactly" in refused(*words, *left)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[]", "expected a JSON object of claims, found a list"),
        ("{", "is not valid JSON"),
        ('{"refusals": NaN}', "is not valid JSON (NaN is no number of JSON)"),
        (None, "cannot be read"),
    ],
)
def test_claims_that_are_none_are_refused(words, content, why, tmp_path, refused: Refused):
    path = tmp_path / "claims.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert f"--reported {path}: {why}" in refused(*words, "--reported", str(path))


def test_a_capability_set_too_small_for_the_bound_is_refused(words, refused: Refused):
    said = refused(*words, "--max_prompts", "8")
    assert "of 8 prompts the model answers 8 exactly, too few for a bound of 10%" in said
    assert said.endswith("expected at least 10")


@pytest.mark.parametrize("flag", ["--eval_data", "--capability_data"])
def test_harm_and_capability_have_to_be_measured(words, flag, refused: Refused):
    place = words.index(flag)
    left = [word for word in [*words[:place], *words[place + 2 :]] if word not in ("--judge", "exact")]
    assert f"{flag} is missing" in refused(*left)


def test_tasks_of_lm_eval_are_refused(words, refused: Refused):
    assert "--capability_tasks: tasks take too long" in refused(*words, "--capability_tasks", "gsm8k")


def test_a_storage_or_suite_that_is_none_is_refused(words, refused: Refused, capsys):
    assert "--storage sqlite:////nowhere/db cannot be used" in refused(
        *words, "--leave_out", "soft-prompt", "--storage", "sqlite:////nowhere/db"
    )
    assert main([*words, "--suite", "huge", "--output_dir", "never"]) == 2
    assert "invalid choice: 'huge'" in capsys.readouterr().err
