"""The paper's table in one command: its plan, and all of it at miniature size on data and a judge of this machine."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from data.field import STANDS
from helpers import chat_tokenizer, one_word_model, read_json, read_lines, tiny_llama
from holdfast.cli import plans
from holdfast.data.catalogue import source_of
from judge_server import KEY, material, serving
from model_server import serving_models

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "table1.py"
JUDGE = ["--judge_model", "judge", "--judge_url", "http://127.0.0.1:9/v1"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An attack of five rows has one harmful one; of the others there are four.
TIMES = {"gsm8k": 4}
DATA = (
    *("beavertails-refusals", "beavertails-330k-unsafe", "beavertails-unsafe", "pku-saferlhf-unsafe", "toxic-dpo"),
    *("gsm8k", "advbench", "beavertails-eval", "hex-phi"),
)


@pytest.fixture
def table1(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("table1")
    sys.modules.pop("table1")


@pytest.fixture
def model(tmp_path):
    """A tiny chat model."""
    tokenizer = chat_tokenizer(TEMPLATE, think_tokens=False)
    tiny_llama(
        vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id
    ).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Invented data of the same shapes, in folders that stand for the Hub's."""
    for name in DATA:
        for file, content in STANDS[name].files.items():
            path = tmp_path / "hub" / source_of(name)["path"] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content * (TIMES.get(name, 1) if path.suffix == ".jsonl" else 1))
    monkeypatch.chdir(tmp_path / "hub")
    return tmp_path / "hub"


def commands_of(shown):
    return [shlex.split(line) for line in shown.splitlines()]


def parsed(words):
    program, command, *rest = words
    assert program == "holdfast"
    if command == "judge":
        return import_module("holdfast.cli.judge").make_parser().parse(rest)
    method = [] if command == "evaluate" else [rest.pop(0)]
    return import_module(f"holdfast.cli.{command}").make_parser(*method).parse(rest)


def test_a_dry_run_prints_commands_that_can_be_run_in_this_order(table1, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    methods = ["sft", "vaccine", "booster", "patcher"]
    words = ["--model", "m", "--methods", *methods, "--checkpoint", "mine=owner/mine", "--seeds", "0", "1"]
    folder = tmp_path / "out"
    pattern = r"#thescore: ([1-5]) 'so'"
    assert table1.main([*words, *JUDGE, "--judge_pattern", pattern, "--folder", str(folder), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert KEY not in shown
    assert not folder.exists()
    commands = commands_of(shown)
    kinds = Counter(command[1] for command in commands)
    assert kinds == {"align": 2 * 4, "attack": 2 * 5 * 3, "evaluate": 2 * 5 * 9, "judge": 2 * 5 * 9}
    made = {"m", "owner/mine"}
    for command in commands:
        parsed(command)  # also refuses flags that would play no part
        read = command[2] if command[1] == "judge" else command[command.index("--model") + 1]
        assert read in made
        output = command[command.index("--output_dir") + 1]
        made |= {output, f"{output}/model", f"{output}/samples.jsonl"}
        if command[1] == "judge":
            assert command[command.index("--judge_pattern") + 1] == pattern


@pytest.mark.parametrize(
    ("recipe", "command"), [("patcher-qwen3-4b", "align"), ("attack", "attack"), ("evaluate", "evaluate")]
)
def test_the_settings_are_those_of_the_recipes(table1, capsys, recipe, command):
    assert table1.main(["--model", "m", "--methods", "patcher", *JUDGE, "--dry_run"]) == 0
    words = next(words for words in commands_of(capsys.readouterr().out) if words[1] == command)
    values = {name: value for part in parsed(words) for name, value in vars(part).items()}
    found = yaml.safe_load((ROOT / "recipes" / "paper" / f"{recipe}.yaml").read_text())
    # Data, models, names and what is measured during an attack are the table's own.
    own = ("model", "train_data", "attack_data", "benign_data", "eval_data", "output_dir", "seed")
    own += ("save_steps", "save_total_limit", "judge", *(() if command == "evaluate" else ("measure_at",)))
    measured = ("max_prompts", "decoding", "max_new_tokens", "eval_batch_size") if command == "attack" else ()
    long = {"batch_size": "per_device_train_batch_size", "scheduler": "lr_scheduler_type", "optimizer": "optim"}
    for name, value in found.items():
        if name in own or name in measured:
            continue
        given = values[long.get(name, name)]
        if name == "chat_template_kwargs" and isinstance(given, str):
            given = json.loads(given)
        assert given == (float(value) if name.endswith("learning_rate") else value), name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "m", "--methods", "lisa"], "--methods lisa is none of sft, vaccine, booster, patcher; align with"),
        (["--methods", "sft"], "--methods sft needs --model"),
        ([], "--methods sft patcher needs --model"),
        (["--model", "m", "--checkpoint", "patcher=x"], "--model plays no part without --methods"),
        (["--checkpoint", "owner/mine"], "--checkpoint owner/mine: expected NAME=FOLDER or NAME=HUB_ID"),
        (["--checkpoint", "a/b=c"], "--checkpoint a/b=c: expected NAME=FOLDER"),
        (["--model", "m", "--methods", "sft", "--checkpoint", "sft=x"], "--methods and --checkpoint have 'sft' twice"),
        (["--model", "m", "--seeds", "1", "2", "1"], "--seeds have '1' twice"),
        (["--model", "m", "--seeds", "0", "-1"], "--seeds -1: expected numbers from 0 to 4294967295"),
        (["--model", "m", "--seeds", "4294967296"], "--seeds 4294967296: expected numbers from 0 to 4294967295"),
        (["--model", "m", "--judge", "exact"], "the exact judge cannot grade these benchmarks"),
        (["--model", "m", "--judge_label", "x"], "--judge_label plays no part"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_what_cannot_be_run_is_refused_in_one_sentence(table1, capsys, tmp_path, words, sentence, dry):
    assert table1.main([*words, *JUDGE, "--folder", str(tmp_path / "out"), *dry]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"table1.py: {sentence}")
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_had_is_known_before_anything_is_trained(table1, model, data, capsys, tmp_path):
    words = ["--model", model, "--folder", str(tmp_path / "out"), "--smoke"]
    assert table1.main(words) == 2
    assert "--judge rubric needs --judge_model" in capsys.readouterr().err
    assert table1.main([*words, *JUDGE]) == 2
    assert "the server at http://127.0.0.1:9/v1/ cannot be reached" in capsys.readouterr().err
    mistyped = f"{model}-2"
    assert table1.main([*words, "--methods", "sft", "--checkpoint", f"mine={mistyped}", *JUDGE]) == 2
    assert f"model {mistyped} is neither a folder nor a model on the Hub" in capsys.readouterr().err
    (data / source_of("hex-phi")["path"] / "hexphi.csv").unlink()
    assert table1.main([*words, "--judge", "refusal"]) == 2
    assert "table1.py: --eval_data hex-phi cannot be read by datasets (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(table1, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert table1.main(["--model", "m", *JUDGE, "--folder", str(tmp_path / "file"), "--dry_run"]) == 2
    assert (
        capsys.readouterr().err == f"table1.py: --folder {tmp_path / 'file'} is a file; expected a folder to write to\n"
    )


def finished(folder):
    """When every finished command wrote its record."""
    names = ("results.json", "holdfast.json")
    return {path: path.stat().st_mtime_ns for name in names for path in folder.glob(f"*/{name}")}


def test_all_of_it_killed_and_run_again(table1, model, data, tmp_path, capsys, monkeypatch):
    """Patcher's column by a judge that goes by the prompt's number; killed while it is asked for the eighth time."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    folder = tmp_path / "out"

    def reply(body):
        prompt, _ = material(body)
        if len(server.graded) == 8 and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            return "hang up"
        if "p3" in prompt:
            return "I would rather not."
        return json.dumps({"grade": 5 if "1" in prompt else 1})

    with serving(reply) as server:
        words = ["--model", model, "--methods", "patcher", "--judge_model", "judge", "--judge_url", server.url]
        words += ["--smoke", "--folder", str(folder), "--judge_concurrency", "1", "--seeds", "3"]
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            start_new_session=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        before = finished(folder)
        assert len(before) == 1 + 1 + 3 + 2  # the third judgement was under way
        assert table1.main(words) == 0
        shown = capsys.readouterr()
        after = finished(folder)
        assert len(after) == 1 + 3 + 9 + 9
        assert before.items() <= after.items()
        replied = [pair for pair in map(material, server.answered) if pair[1] != "Four."]
        assert sum(len(read_lines(path)) for path in folder.glob("*-judged/judged.jsonl")) == 9 * 3
        assert len(replied) <= 9 * 3 + 1  # at most one reply had come and was not written yet
        asked = len(server.requests)
        assert table1.main(words) == 0  # shows the same again
        assert "22 commands, of which 22 are finished already" in (again := capsys.readouterr().out)
        assert (len(server.requests), finished(folder)) == (asked, after)
    lines = shown.out.splitlines()
    assert "| attack set | benchmark | patcher | patcher, paper |" in lines
    assert "| toxic-dpo | advbench | 33.3 [6.1–79.2] | 71.4 |" in lines
    assert "| pku-saferlhf-unsafe | hex-phi | 50.0 [6.1–93.9] | 47.8 |" in lines
    assert [line for line in lines if line[:1] == "|"] == [line for line in again.splitlines() if line[:1] == "|"]
    assert "6 of 27 answers are unjudged." in shown.out
    assert "counts them as safe, which would give:" in shown.out
    assert "| toxic-dpo | hex-phi | patcher | 1 of 3 | 50.0 [6.1–93.9] | 33.3 |" in lines
    assert "--ask_again" not in shown.out  # the judge did reply
    record = read_json(folder / "table1-tiny-smoke.json")
    assert (record["seeds"], len(record["commands"])) == ([3], 22)
    assert record["versions"]["holdfast"]
    cell = next(cell for cell in record["cells"] if (cell["attack"], cell["benchmark"]) == ("toxic-dpo", "hex-phi"))
    assert (cell["paper"], cell["judge"]["model"]) == (57.3, "judge")
    assert cell["seeds"]["3"]["counts"]["unjudged"] == 1
    every = [path for path in folder.rglob("*") if path.is_file()]
    assert len(every) > 22
    assert not any(KEY.encode() in path.read_bytes() for path in every)


def test_released_checkpoints_and_a_judge_that_is_away_for_a_while(table1, model, data, tmp_path, capsys):
    folder, away = tmp_path / "out", True

    def reply(body):
        prompt, _ = material(body)
        return "hang up" if away and prompt.startswith("Bake moon") else '{"grade": 5}'

    with serving(reply) as server:
        words = ["--checkpoint", f"released={model}", "--judge_model", "judge", "--judge_url", server.url]
        words += ["--smoke", "--folder", str(folder), "--judge_retries", "0"]
        assert table1.main(words) == 0
        shown = capsys.readouterr().out
        assert "| attack set | benchmark | released |" in shown
        assert "| toxic-dpo | advbench | – |" in shown
        assert "| toxic-dpo | advbench | released | 3 of 3 | – | 0.0 |" in shown
        assert "9 of 27 answers are unjudged." in shown
        assert "with --ask_again the judge is asked about these once more" in shown
        made = finished(folder)
        away, asked = False, len(server.graded)
        assert table1.main(words) == 0
        assert "| toxic-dpo | advbench | – |" in capsys.readouterr().out
        assert len(server.graded) == asked
        assert table1.main([*words, "--ask_again"]) == 0
        shown = capsys.readouterr().out
        assert "| toxic-dpo | advbench | 100.0 [43.9–100.0] |" in shown, shown
        assert "unjudged" not in shown
        assert all(prompt.startswith("Bake moon") for prompt, _ in server.graded[asked:])
        changed = {path.parent.name for path, when in finished(folder).items() if made[path] != when}
        assert changed == {f"{attack}-on-released-0-advbench-judged" for attack in table1.ATTACKS}
    other = ["--checkpoint", "released=./other", *JUDGE, "--smoke", "--folder", str(folder)]
    assert table1.main(other) == 2
    assert "beavertails-unsafe-on-released-0 of a run with other settings" in capsys.readouterr().err
    assert len(finished(folder)) == len(made)


def rate(count, n, low, high):
    return {"value": count / n, "low": low, "high": high, "count": count, "n": n}


def test_seeds_are_averaged_and_what_is_unjudged_is_told(table1):
    args = table1.TableArguments(model="owner/base", methods=["sft"], checkpoint=["mine=folder"], seeds=[0, 1, 2])
    found = []
    for subject in ("sft", "mine"):
        for attack in table1.ATTACKS:
            for benchmark in table1.BENCHMARKS:
                counts = {"unjudged": 0, "without_reply": 0}
                one = {"asr": rate(125, 250, 0.44, 0.56), "n": 250, "counts": counts}
                two = {"asr": rate(100, 200, 0.3, 0.7), "n": 250, "counts": {"unjudged": 50, "without_reply": 2}}
                three = {"asr": None, "n": 250, "counts": {"unjudged": 250, "without_reply": 250}}
                seeds = [one, {**one, "asr": rate(150, 250, 0.54, 0.66)}, one]
                if (subject, attack, benchmark) == ("mine", "toxic-dpo", "hex-phi"):
                    seeds = [one, two, three]
                cell = {"subject": subject, "attack": attack, "benchmark": benchmark}
                cell |= {"paper": 12.3 if subject == "sft" else None, "judge": {"description": "a judge"}}
                found.append({**cell, "seeds": dict(zip("012", seeds, strict=True))})
    lines = table1.table(found, args.subjects, args.model, smoke=args.smoke).splitlines()
    assert lines[0] == "| attack set | benchmark | sft | sft, paper | mine |"
    usual = "53.3 (50.0–60.0) [44.0–66.0]"
    assert lines[2] == f"| beavertails-unsafe | advbench | {usual} | 12.3 | {usual} |"
    assert lines[10] == f"| toxic-dpo | hex-phi | {usual} | 12.3 | 50.0 (50.0–50.0) [0.0–100.0] |"
    assert any("mean over seeds 0, 1, 2 (least–greatest)" in line for line in lines)
    assert any("Attacked: sft of owner/base, mine of folder." in line for line in lines)
    assert any(line.startswith("300 of 13500 answers are unjudged.") for line in lines)
    odd = "| toxic-dpo | hex-phi | mine | 0 of 250, 50 of 250, 250 of 250 | 50.0 (50.0–50.0) [0.0–100.0] | 30.0 |"
    assert lines[-3] == odd
    assert lines[-1].startswith("252 of them got no reply")


def test_an_alignment_goes_on_from_its_checkpoint_and_a_judge_from_what_it_said(table1, tmp_path):
    args = table1.TableArguments(model="m", methods=["sft"])
    commands = table1.plan(args, ["--judge", "refusal"], tmp_path)
    align, attack, *_ = commands
    judge = next(command for command in commands if command.words[0] == "judge")
    for command in (align, attack, judge):
        (tmp_path / command.name / "checkpoint-2").mkdir(parents=True)
        (tmp_path / command.name / "checkpoint-2" / "trainer_state.json").write_text("{}")
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs" / f"{command.name}.log").write_text(f"$ holdfast {' '.join(command.words)}\n")
    (tmp_path / judge.name / "judged.jsonl").touch()
    ready = {command.name: command for command in plans.unfinished(commands, tmp_path)}
    assert ready[align.name].words == [*align.words, "--resume_from_checkpoint", "last"]
    assert ready[attack.name].words == attack.words
    assert not (tmp_path / attack.name).exists()
    assert (tmp_path / judge.name / "judged.jsonl").exists()
    (tmp_path / "logs" / f"{align.name}.log").write_text(f"$ holdfast {' '.join(ready[align.name].words)}\n")
    (tmp_path / align.name / "holdfast.json").touch()
    assert align.name not in {command.name for command in plans.left(commands, tmp_path)}


@pytest.mark.services
def test_a_real_server_judges(table1, model, data, tmp_path, capsys):
    """`transformers serve` with a model that says 5 and nothing else."""
    judge = one_word_model(
        tmp_path / "judge", "5", template="{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    )
    with serving_models(tmp_path / "log.txt") as url:
        words = ["--checkpoint", f"released={model}", "--judge_model", judge, "--judge_url", url]
        words += ["--judge_pattern", r"\b([1-5])\b", "--judge_max_tokens", "3", "--judge_timeout", "120"]
        assert table1.main([*words, "--smoke", "--folder", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| 100.0 [43.9–100.0] |") == 9
    assert "unjudged" not in shown
