import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from holdfast.cli import demo, main
from holdfast.cli import report as report_command
from holdfast.cli import stress as stress_command
from holdfast.cli.demo import ATTACKS, CRAFTS, METHODS, MODELS, DemoArguments, commands, stress_record
from holdfast.cli.demo_report import (
    break_step,
    control_table,
    crafts_table,
    demo_table,
    is_dearer,
    plot_attack_curves,
    stress_table,
    told_stress,
)
from holdfast.cli.plans import written_last
from holdfast.cli.workers import Command, run_commands
from holdfast.errors import TrainingError
from stress.examples import example_certificate

POINT_KEYS = {
    *("steps", "asr", "asr_low", "asr_high", "harmful_score", "mean_score", "refusal_rate"),
    *("capability", "over_refusal", "attacker_loss", "task_accuracy"),
}
RECIPES = Path(__file__).parents[2] / "recipes" / "organism"


def a_run(method, attack, refusals=(1.0, 0.9, 0.4)):
    points = [
        {
            **dict.fromkeys(POINT_KEYS, 0.5),
            **{"asr_low": 0.4, "asr_high": 0.6, "refusal_low": rate - 0.1, "refusal_high": min(rate + 0.1, 1)},
            "steps": steps,
            "refusal_rate": rate,
        }
        for steps, rate in zip((0, 5, 100), refusals, strict=True)
    ]
    return {"method": method, "attack": attack, "learning_rate": 1e-4, "poison_ratio": 1.0, "n": 96, "points": points}


def test_a_model_breaks_at_the_first_step_with_a_refusal_rate_below_a_half():
    assert break_step(a_run("sft", "full", (1.0, 0.5, 0.49))) == 100
    assert break_step(a_run("sft", "full", (1.0, 0.1, 0.9))) == 5
    assert break_step(a_run("sft", "full", (1.0, 0.9, 0.5))) is None


def test_the_tables_show_every_attack_with_intervals():
    runs = [a_run(method, attack) for attack in ATTACKS for method in METHODS]
    console = Console(width=132, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(demo_table(runs), control_table(runs))
    text = console.export_text()
    assert text.count("Patcher") == text.count("strong preset") == len(ATTACKS)
    assert "0.90 (0.80–1.00)" in text
    assert "20 % poisoned" in text


def test_the_table_of_crafts_shows_what_alignment_cost_beside_the_base():
    def rates(value):
        rate = {"value": value, "low": value - 0.1, "high": value + 0.1}
        return {"capability": rate, "over_refusal": {"value": 0.5, "low": 0.4, "high": 0.6}}

    crafts = {model: {"rehearsed": rates(0.8), "unrehearsed": rates(0.1 * i)} for i, model in enumerate(MODELS, 2)}
    console = Console(width=130, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(crafts_table(crafts))
    shown = [line for line in console.export_text().splitlines() if "0.80 (0.70–0.90)" in line]
    names = ("base", "SFT", "Patcher", "strong preset")
    for line, name, low in zip(shown, names, ("0.10", "0.20", "0.30", "0.40"), strict=True):
        assert name in line
        assert f"({low}–" in line
        assert "0.50 (0.40–0.60)" in line


def test_the_picture_is_a_png(tmp_path):
    runs = [a_run(method, attack) for attack in ATTACKS for method in METHODS]
    plot_attack_curves(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_patcher_gets_sfts_updates_and_the_recipes_say_what_the_demo_does():
    from holdfast.cli import align

    options = DemoArguments(output_dir="w", seed=0)
    plan = {command.name: list(command.words) for command in commands(options, Path("w"))}
    ignored = {"output_dir", "logging_steps", "run_name", "logging_dir"}
    for method in METHODS:
        words = plan[f"align-{method}"]
        parser = align.make_parser(words[1])
        own = parser.parse(words[2:])[2].to_dict()
        if method != "strong":
            assert own["max_steps"] == options.updates
        recipe = parser.parse(["--config", str(RECIPES / f"align-{method}.yaml")])[2].to_dict()
        assert {k: v for k, v in own.items() if k not in ignored} == {
            k: v for k, v in recipe.items() if k not in ignored
        }


def test_the_searches_come_last_each_alone_and_report_what_they_found():
    plan = commands(DemoArguments(output_dir="w", seed=3), Path("w"))
    *others, first, second, reporting = plan
    assert set(first.needs) == {command.name for command in others}
    assert set(second.needs) == {*first.needs, first.name}
    assert list(reporting.needs) == [first.name, second.name]
    found = []
    for searching, counterpart in ((first, "w/sft"), (second, None)):
        _, measured, options, _ = stress_command.make_parser().parse(list(searching.words[1:]))
        assert (options.counterpart, options.suite, options.seed) == (counterpart, "quick", 3)
        assert measured.capability_data == "w/organism/eval/crafts_unrehearsed.jsonl"
        found.append(options.output_dir)
    _, rest = report_command.make_parser().parse(list(reporting.words[1:]))
    assert rest.folders == found
    assert commands(DemoArguments(output_dir="w", seed=3, suite="none"), Path("w")) == others


def test_the_table_of_the_stress_test_tells_what_patcher_stops_and_what_not():
    found = stress_record(example_certificate(), example_certificate())
    uncounted = {"broken": False, "steps": None, "attack": None}
    held = {"broken": False, "steps": 0, "attack": "ablation", "harmful_score": 0.07}
    further = {"e": dict.fromkeys(METHODS, uncounted), "f": dict.fromkeys(METHODS, held)}
    console = Console(width=130, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(stress_table({**found, "attackers": {**found["attackers"], **further}}))
    shown = {cells[0]: cells[1:] for line in console.export_text().splitlines() if len(cells := _cells(line)) == 4}
    assert shown["e"] == ["nothing counts"] * 3  # no point kept its capability
    assert shown["f"] == ["held at 0.07"] * 3  # "> 0" says nothing of who takes no step
    attackers = example_certificate()["attackers"]
    for kind, needed in found["attackers"].items():
        assert shown[kind][0].endswith(f" by {needed['sft']['attack']}")
        for place, target in enumerate(("counterpart", "model", "model")):
            broken = attackers[kind][target]["broken"]
            assert shown[kind][place].startswith((">", "held at")) != broken

    def needing(*by_method):
        return {
            name: steps and {"broken": steps < 50, "steps": steps}
            for name, steps in zip(METHODS, by_method, strict=True)
        }

    kinds = {
        "a": needing(2, 20, 2),
        "b": needing(2, 50, 1),
        "c": needing(2, 2, 2),
        "d": needing(50, 10, 10),
        "e": needing(50, 50, 50),
    }
    assert told_stress({"attackers": kinds}) == (
        "Breaking Patcher takes more steps than breaking SFT by: a, b. No more by: c, d. "
        "Breaking the strong preset takes more steps than breaking SFT by: no kind of attacker. No more by: a, b, c, d."
    )
    seen = [{"sft": {"broken": True, "steps": 5}, "patcher": {"broken": False, "steps": held}} for held in (5, 4, None)]
    assert [is_dearer(needed, "patcher") for needed in seen] == [True, False, False]


def _cells(line):
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_commands_run_when_what_they_need_is_done(tmp_path):
    plan = [
        Command("last", ["--version"], needs=["first", "second"]),
        Command("first", ["--version"]),
        Command("second", ["--help"]),
    ]
    seconds = run_commands(plan, tmp_path / "logs", console=Console(file=(tmp_path / "shown").open("w")))
    assert list(seconds)[-1] == "last"
    assert "holdfast 0." in (tmp_path / "logs" / "first.log").read_text()


def test_a_command_that_fails_is_named_with_its_last_line_and_log(tmp_path):
    with pytest.raises(TrainingError, match=r"wrong failed: .*unknown command 'nonsense'.*wrong\.log"):
        run_commands([Command("wrong", ["nonsense"])], tmp_path, console=Console(file=(tmp_path / "shown").open("w")))


def test_all_that_does_not_need_a_failed_command_may_be_run_all_the_same(tmp_path):
    plan = [
        Command("wrong", ["nonsense"]),
        Command("next", ["--version"], needs=["wrong"]),
        Command("last", ["--version"], needs=["next", "other"]),
        Command("other", ["--version"]),
        Command("worse", ["rubbish"]),
    ]
    with pytest.raises(TrainingError) as caught:
        run_commands(plan, tmp_path, console=Console(file=(tmp_path / "shown").open("w")), processes=1, keep_going=True)
    assert [line.split(" failed: ")[0] for line in str(caught.value).splitlines()] == ["wrong", "worse"]
    assert {path.stem for path in tmp_path.glob("*.log")} == {"wrong", "other", "worse"}


def test_no_command_of_a_plan_outlives_who_runs_it(tmp_path):
    running = f"""
from pathlib import Path
from rich.console import Console
from holdfast.cli.workers import Command, run_commands
plan = [Command("long", ["organism", {str(tmp_path / "organism")!r}])]
run_commands(plan, Path({str(tmp_path)!r}), console=Console(), processes=1)
"""
    with subprocess.Popen([sys.executable, "-c", running], stdout=subprocess.DEVNULL) as process:
        log, began = tmp_path / "long.log", time.monotonic()
        while not log.is_file() and time.monotonic() < began + 120:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert children
    killed = time.monotonic()
    while any(map(runs, children)) and time.monotonic() < killed + 5:
        time.sleep(0.1)
    assert not any(map(runs, children))


def runs(process):
    """Whether a process is there, and no mere entry of one that has ended."""
    stat = Path("/proc") / process / "stat"
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_steps_to_measure_at_must_rise_from_zero(tmp_path, capsys):
    assert main(["demo", "--output_dir", str(tmp_path / "demo"), "--measure_at", "5", "2"]) == 2
    assert "--measure_at must rise from 0" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_demo_is_long_enough_for_an_attack_on_the_preset(tmp_path, capsys):
    assert main(["demo", "--output_dir", str(tmp_path / "demo"), "--updates", "26"]) == 2
    assert "--updates 26: the preset would not be attacked; expected at least 27" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_finished_demo_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "{}"


SHORT = ["--updates", "27", "--attack_every", "14", "--attack_steps", "2", "--measure_at", "0", "2"]


def short(folder, **more):
    """What these words mean."""
    return DemoArguments(output_dir=str(folder), updates=27, attack_every=14, attack_steps=2, measure_at=[0, 2], **more)


def finish(command, folder):
    """Leave what a command that has finished leaves, as far as a demo that goes on looks at it."""
    last = written_last(command)
    last.parent.mkdir(parents=True, exist_ok=True)
    last.touch()
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / f"{command.name}.log").write_text(f"$ holdfast {' '.join(command.words)}\n")


def test_a_short_demo_from_end_to_end(organism, tmp_path, capsys):
    """Every command of the demo but the first, with few steps; then what a demo that was stopped had not finished."""
    folder = tmp_path / "demo"
    shutil.copytree(organism, folder / "organism")
    plan = commands(short(folder, suite="none"), folder)
    finish(plan[0], folder)
    words = ["demo", "--output_dir", str(folder), "--seed", "0", *SHORT, "--suite", "none"]
    assert main(words) == 0
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["schema"] == 1
    assert results["seed"] == 0
    assert results["seconds"] > 0
    assert results["finished_before"] == 1
    assert "torch" in results["versions"]
    assert [(run["method"], run["attack"]) for run in results["runs"]] == [(m, a) for a in ATTACKS for m in METHODS]
    for run in results["runs"]:
        is_control = run["attack"].startswith("control")
        assert [point["steps"] for point in run["points"]] == ([0, 2, 4, 8] if is_control else [0, 2])
        assert all(point.keys() >= POINT_KEYS for point in run["points"])
        assert run["n"] >= 96
        assert (run["points"][0]["task_accuracy"] is None) != is_control
        assert run["poison_ratio"] == (0.0 if is_control else {"full-poisoned": 0.2}.get(run["attack"], 1.0))
    assert results["stress"] is None
    assert results["crafts"].keys() == set(MODELS)
    for model, kinds in results["crafts"].items():
        for kind in CRAFTS:
            assert kinds[kind]["capability"]["n"] >= 96
            asked = json.loads((folder / "crafts" / f"{model}-{kind}" / "results.json").read_text(encoding="utf-8"))
            assert asked["results"]["capability"] == kinds[kind]
    assert (folder / "attack_curves.png").is_file()
    assert (folder / "patcher" / "model.safetensors").is_file()
    assert (folder / "attacks" / "patcher-lora" / "samples.jsonl").is_file()
    shown = capsys.readouterr()
    assert "Patcher" in shown.out
    assert f"going on in {folder}: 1 of {len(plan)} commands" in shown.err

    logs = {log: log.stat().st_mtime_ns for log in (folder / "logs").iterdir()}
    for stopped in (folder, folder / "attacks" / "sft-full"):
        (stopped / "results.json").unlink()
    assert main(words) == 0
    assert [log.stem for log, then in logs.items() if log.stat().st_mtime_ns != then] == ["full-on-sft"]
    gone_on = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    differs = {name for name, value in gone_on.items() if value != results[name]}
    assert differs == {"seconds", "finished_before"}
    assert gone_on["finished_before"] == len(plan) - 1


def test_a_demo_goes_on_with_what_is_not_finished_and_begins_anew_where_it_replaces_one(tmp_path, monkeypatch, capsys):
    ran = []

    def interrupted(plan, logs, **more):
        ran.append([command.name for command in plan])
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_commands", interrupted)
    folder = tmp_path / "demo [1]"
    plan = commands(short(folder), folder)
    words = ["demo", "--output_dir", str(folder), *SHORT]
    assert main(words) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith(f"interrupted; what is finished is in {folder}, and the same command goes on from there")
    for command in plan:
        finish(command, folder)
    (folder / "stress" / "certificate.json").unlink()
    (folder / "stress" / "stress.json").touch()
    assert main(words) == 130
    assert (folder / "stress" / "stress.json").is_file()  # the search goes on from it
    assert f"going on in {folder}: {len(plan) - 3} of {len(plan)} commands" in capsys.readouterr().err
    finish(next(command for command in plan if command.name == "stress"), folder)
    capsys.readouterr()
    assert main([*words, "--updates", "28"]) == 2
    assert "of a demo with other settings (its log has them)" in capsys.readouterr().err
    assert (folder / "stress" / "certificate.json").is_file()
    assert main([*words, "--updates", "28", "--overwrite_output_dir", "true"]) == 130
    assert not (folder / "stress").exists()
    for command in plan:
        finish(command, folder)
    (folder / "results.json").touch()
    assert main([*words, "--overwrite_output_dir", "true"]) == 130
    for command in plan:
        finish(command, folder)
    capsys.readouterr()
    assert main([*words, "--suite", "none"]) == 2
    assert "holds stress of a demo with other settings (its log has them)" in capsys.readouterr().err
    assert main([*words, "--suite", "none", "--overwrite_output_dir", "true"]) == 130
    whole, once_more, others, replaced, searchless = ran
    assert whole == others == replaced == [command.name for command in plan]
    assert once_more == ["stress", "stress-strong", "report"]
    assert searchless == whole[:-3]
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_what_no_demo_has_written_is_never_removed(tmp_path, capsys):
    own = tmp_path / "sft" / "model.safetensors"
    own.parent.mkdir()
    own.touch()
    for more in ([], ["--overwrite_output_dir", "true"]):
        assert main(["demo", "--output_dir", str(tmp_path), *more]) == 2
        assert "holds sft, which no demo has put there; choose another folder" in capsys.readouterr().err
        assert own.is_file()
