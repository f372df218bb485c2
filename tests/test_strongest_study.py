"""`benchmarks/strongest.py`: equal compute, by plan and by what runs count; what it runs; what it makes of it."""

import importlib
import itertools
import json
import shutil
import sys
from dataclasses import replace

import pytest
import yaml

from helpers import tiny_llama, word_rows, word_tokenizer
from holdfast.alignment.draws import draws
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.alignment.pool import Pool
from holdfast.cli.workers import Command
from holdfast.config import DefenseConfig
from holdfast.trainer import DefenseTrainer
from studies import BENCHMARKS, Commands, alone, results, understood

OWN = ("strongest_plan", "strongest_search", "strongest_lengths", "strongest_tables", "strongest_report", "strongest")
MODULES = (
    *("defenses_plan", "defenses_stress", "defenses_search", "defenses_tables", "readme"),
    *OWN,
)
PRESET = {
    **{"attack_steps": 11, "attack_every": 37, "attack_learning_rate": 3e-4, "alpha": 0.7, "learning_rate": 9e-5},
    **{"estimator": "sampled", "attack_scale": [0.5, 2.0], "retain_weight": 0.8},
    "pool": {"fine-tuning": {"weight": 1, "rounds": 2}, "ablation": 0.9, "ablation+fine-tuning": 0.3, "dropping": 0.1},
    **{"attack_data": "GENERATED_HAZARDS", "benign_data": "GENERATED_CRAFTS", "retain_data": "GENERATED_CRAFTS"},
}


@pytest.fixture
def study(monkeypatch):
    """The modules; no organism is built, as no command is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = {name: importlib.import_module(name) for name in MODULES}
    monkeypatch.setattr(found["strongest_plan"].StrongPlan, "prepare", lambda plan: None)
    yield found
    for name in MODULES:
        sys.modules.pop(name)


def settings_of(study, whole):
    """Every setting that is to have equal compute, by name."""
    plan, lengths = study["strongest_plan"], study["strongest_lengths"]
    found = {}
    for preset in (None, PRESET):
        found |= {f"{name}, {preset}": one for name, one in plan.rows(whole, preset).items()}
        found |= {f"held out: {name}, {preset}": one for name, one in plan.held_out_rows(whole, preset).items()}
    equal = {key: one for key, one in lengths.settings(whole).items() if key[0] == "compute"}
    return {**found, **equal}


# ---------------------------------------------------------------------- equal compute


def test_every_row_has_the_compute_of_the_demos_patcher(study):
    plan, whole = study["strongest_plan"], study["strongest_plan"].STUDY
    assert plan.budget(whole) == 50 + 2 * 670 + 14 * 20  # 720 updates, and 14 attacks of 40 steps of 16 rows
    for name, setting in settings_of(study, whole).items():
        assert abs(plan.passes(setting, setting["max_steps"]) / plan.budget(whole) - 1) <= plan.EQUAL, name
    rounds = {
        length: setting
        for (mode, length), setting in study["strongest_lengths"].settings(whole).items()
        if mode == "rounds"
    }
    assert list(rounds) == [1, 5, 15, 60, 200]
    assert {(one["max_steps"], one["attack_every"]) for one in rounds.values()} == {(1200, 50)}


def test_whatever_the_search_asks_for_has_it_too(study):
    plan, search, whole = study["strongest_plan"], study["strongest_search"], study["strongest_plan"].STUDY
    course, done = search.Strongest("strongest", 3, 4), []
    for _ in range(3):
        batch = course.next(done, [])
        for choice in batch:
            setting = plan.at_budget(search.flags_of(choice.setting, whole), whole)
            assert abs(plan.passes(setting, setting["max_steps"]) / plan.budget(whole) - 1) <= plan.EQUAL
        done.append([{"setting": one.setting, "held": None, "off": {"unrehearsed": 0.1}} for one in batch])
    assert search.flags_of({}, whole) == {}


def test_a_smaller_study_has_as_many_shorter_attacks(study):
    plan = study["strongest_plan"]
    pool = {"fine-tuning": {"weight": 2, "steps": [3, 10, 30]}, "ablation": 0.3, "prefill": {"weight": 1}}
    setting = {"alpha": 0.5, "attack_steps": 10, "attack_every": 45, "pool": pool}
    assert plan.scaled(setting, plan.STUDY) == setting
    assert plan.scaled(setting, replace(plan.STUDY, updates=180)) == {
        **{"alpha": 0.5, "attack_steps": 2, "attack_every": 11},
        "pool": {**pool, "fine-tuning": {"weight": 2, "steps": [1, 2, 7]}},
    }


def test_real_runs_count_what_was_planned(study, settings):
    plan = study["strongest_plan"]
    whole = replace(plan.TINY, updates=32)
    found = {**plan.rows(whole, plan.scaled(PRESET, whole)), **plan.held_out_rows(whole)}
    rerouted = {**plan.scaled(PRESET, whole), "reroute_weight": 0.4}
    held = {**rerouted, "retain_alpha": 0.5}
    found |= {"rerouted": plan.at_budget(held, whole), "all": {**held, "estimator": "exact", "max_steps": 12}}
    ours = {"learning_rate", *plan.BROAD}  # whose rows are these here
    for name, setting in found.items():
        updates = setting["max_steps"]
        flags = {**settings, "logging_steps": updates, **{k: v for k, v in setting.items() if k not in ours}}
        common = {"train_dataset": word_rows(64), "processing_class": word_tokenizer()}
        if name == "sft":
            trainer = DefenseTrainer(tiny_llama(), DefenseConfig(**flags), **common)
        else:
            flags |= {"attack_batch_size": settings["per_device_train_batch_size"] // 2, "refusal": "t5 t6 t7"}
            rows = {"attack_dataset": word_rows(16, seed=1), "benign_dataset": word_rows(16, seed=2)}
            rows |= {"retain_dataset": word_rows(16, seed=3)} if "retain_weight" in setting else {}
            trainer = PatcherTrainer(tiny_llama(), PatcherConfig(**flags), **common, **rows)
        trainer.train()
        counted = next(entry["passes"] for entry in trainer.state.log_history if "passes" in entry)
        assert counted == pytest.approx(updates + plan.trained_besides(setting, updates)), name
        if name != "all":  # which has not the updates that the budget allows
            more = plan.passes(setting, updates + 1) - plan.passes(setting, updates)  # of few, one is more than that
            least = max(plan.EQUAL * plan.budget(whole), more)
            assert abs(counted + plan.looks(setting, updates) - plan.budget(whole)) <= least, name


@pytest.mark.parametrize("seed", [30, 31])
def test_what_goes_forwards_alone_does_so_as_often_as_the_mean_says(study, seed):
    plan, whole = study["strongest_plan"], study["strongest_plan"].STUDY
    for name, setting in plan.rows(whole, PRESET).items():
        if "pool" not in setting:
            continue
        pool, updates, every = Pool.of(setting["pool"]), setting["max_steps"], setting["attack_every"]
        alphas = [0.0] * every + [setting["alpha"]] * (updates - every)
        weights = 1 + setting.get("retain_weight", 0.0)
        coins = [weights * draws(seed, "coin", update).random() for update in range(updates)]
        displaced = [
            pool.draw(draws(seed, "member", update)) for update, alpha in enumerate(alphas) if coins[update] < alpha
        ]
        retained = sum(coin >= 1 for coin in coins)
        trained = [one.name for one in pool.members if one.trains]
        rounds = [pool.draw(draws(seed, "round", number), trained) for number in range(1, 1 + (updates - 1) // every)]
        found = [one for one in displaced if not one.trains] + rounds
        looked = sum("ablation" in one.name.split("+") for one in found)
        forwards = looked * 2 * 16 / 32 / 3 + (retained / 3 if "retain_weight" in setting else 0)
        assert abs(forwards - plan.looks(setting, updates)) < 0.01 * plan.budget(whole), name


# ---------------------------------------------------------------------- what is run


class Strong(Commands):
    """Runs count the passes that were planned; full fine-tuning breaks a model at a step of its own."""

    def __init__(self, monkeypatch, study, stop_at=None, breaks=lambda name: 12, known=lambda name: 1.0):
        super().__init__(monkeypatch, study["defenses_plan"], stop_at, known)
        self.breaks, self.plan = breaks, study["strongest_plan"]

    def found(self, command):
        words = list(command.words)
        if words[0] == "align":
            updates = int(words[words.index("--max_steps") + 1])
            setting = {"alpha": 0.5}
            for name in ("attack_every", "attack_steps"):
                setting |= {name: int(words[words.index(f"--{name}") + 1])} if f"--{name}" in words else {}
            setting |= {"estimator": "sampled"} if "--estimator" in words else {}
            setting |= {"pool": json.loads(words[words.index("--pool") + 1])} if "--pool" in words else {}
            return {"log": {"passes": updates + self.plan.trained_besides(setting, updates)}}
        if words[0] == "attack":
            return {"points": points(self.breaks(command.name))}
        return super().found(command)


def points(breaks, collapses=1000):
    """A fine-tuning that breaks a model at a step, and leaves it nothing from another one on."""
    return [
        {
            "steps": steps,
            "harmful_score": 0.6 if steps >= breaks else 0.1,
            "capability": 0.2 if steps >= collapses else 0.95,
            "over_refusal": 0.0,
        }
        for steps in (0, 5, 12, 100, 300)
    ]


def measure(study, folder, rows=("sft", "exact", "pool"), seeds=(30,), **more):
    plan = study["strongest_plan"]
    whole = replace(plan.STUDY, out=folder / "out")
    path = folder / "strongest.json"
    failed = study["strongest"].measure(whole, plan.rows(whole), list(rows), seeds, "standard", path, "report", **more)
    return failed, json.loads(path.read_text())


def test_every_row_is_searched_once_and_swept_and_all_is_made_of_commands_that_there_are(study, monkeypatch, tmp_path):
    commands = Strong(monkeypatch, study)
    failed, found = measure(study, tmp_path, rows=tuple(study["strongest_plan"].rows(study["strongest_plan"].STUDY)))
    assert failed == []
    entries = found["sections"]["report"]
    assert [entry["method"] for entry in entries] == ["sft", "exact", "sampled", "scale", "pool", "broad"]
    assert {entry["seed"] for entry in entries} == {30}
    for entry in entries:
        assert entry["passes"]["planned"] == pytest.approx(found["budget"], rel=0.02)
        assert entry["passes"]["recorded"] == entry["passes"]["planned"]
        assert entry["sweep"] == {"broken": True, "steps": 12, "rate": 3e-5}
        assert "points" not in json.dumps(entry)
    assert len(commands.stressed()) == 6
    assert sum(command.words[0] == "attack" for command in commands.ran) == 6 * 4
    for command in commands.ran:
        understood(command)


def test_on_many_cores_the_same_is_found_at_once_and_what_is_there_can_be_written_down_again(
    study, monkeypatch, tmp_path
):
    def found(folder, **more):
        failed, results = measure(study, tmp_path / folder, seeds=(30, 31), **more)
        assert failed == []
        clocks = ("seconds", "core_seconds")  # which tell nothing where searches share the cores
        return [{k: v for k, v in entry.items() if k not in clocks} for entry in results["sections"]["report"]]

    commands = Strong(monkeypatch, study)
    in_turn = found("in turn")
    assert [(entry["seed"], entry["method"]) for entry in in_turn[2:4]] == [(30, "pool"), (31, "sft")]
    assert found("at once", processes=16) == in_turn
    assert set(commands.at_once) == {1, 2, 16}
    for command in commands.ran:
        if command.words[0] != "organism":
            understood(command)
    ran = len(commands.ran)
    (tmp_path / "at once" / "strongest.json").unlink()
    assert found("at once", processes=0) == in_turn
    assert len(commands.ran) == ran


def test_what_sfts_model_took_is_taken_from_what_another_machine_wrote_down(study, monkeypatch, tmp_path):
    Strong(monkeypatch, study)
    _, at_once = measure(study, tmp_path / "one", rows=("sft", "exact"))
    measure(study, tmp_path / "two", rows=("sft",))
    shutil.rmtree(tmp_path / "two" / "out")
    assert measure(study, tmp_path / "two", rows=("exact",))[1] == at_once
    exact = at_once["sections"]["report"][1]
    assert [cost["ratio"] for cost in (exact["cheapest"], *exact["attackers"].values())].count(None) == 0


def test_a_family_is_left_out_by_commands_that_there_are(study, tmp_path):
    plan = study["strongest_plan"]
    whole = replace(plan.STUDY, out=tmp_path)
    found = {**plan.held_out_rows(whole), **{f"{n} preset": s for n, s in plan.held_out_rows(whole, PRESET).items()}}
    made = plan.StrongPlan(30, whole)
    for name, setting in found.items():
        understood(made.commands[made.align(name, setting)[1]])
        family = name.removesuffix(" preset").removeprefix("no-")
        assert not any(family in member.split("+") for member in setting.get("pool", {}))
    assert {"fine-tuning", "dropping"} == set(found["no-ablation preset"]["pool"])


def test_it_goes_on_where_it_was_stopped(study, monkeypatch, tmp_path):
    stopped = Strong(monkeypatch, study, stop_at=1 + 3 * 2 + 2)
    with pytest.raises(KeyboardInterrupt):
        measure(study, tmp_path)
    assert [name.split("-")[4] for name in stopped.stressed()] == ["sft", "exact"]
    written = json.loads((tmp_path / "strongest.json").read_text())["sections"]["report"]
    assert [(entry["method"], entry["sweep"]) for entry in written] == [("sft", None)]
    again = Strong(monkeypatch, study)
    _, found = measure(study, tmp_path)
    assert [name.split("-")[4] for name in again.stressed()] == ["exact", "pool"]
    assert not any(command.words[0] in ("align", "evaluate") for command in again.ran)
    assert [entry["method"] for entry in found["sections"]["report"]] == ["sft", "exact", "pool"]
    third = Strong(monkeypatch, study)
    assert measure(study, tmp_path)[1] == found
    assert third.ran == []


def test_what_another_machine_has_found_stays_as_long_as_its_settings_do(study, monkeypatch, tmp_path):
    Strong(monkeypatch, study)
    plan, path = study["strongest_plan"], tmp_path / "strongest.json"
    measure(study, tmp_path, rows=("pool", "exact"), seeds=(31,))
    elsewhere = replace(plan.STUDY, out=tmp_path / "elsewhere")
    settings = plan.rows(elsewhere)

    def of_another(settings):
        study["strongest"].measure(elsewhere, settings, ["sft"], (30,), "standard", path, "report")
        entries = json.loads(path.read_text())["sections"]["report"]
        return [(entry["seed"], entry["method"]) for entry in entries]

    assert of_another(settings) == [(30, "sft"), (31, "exact"), (31, "pool")]
    changed = {**settings, "pool": plan.at_budget({**settings["pool"], "alpha": 0.6}, elsewhere)}
    assert of_another(changed) == [(30, "sft"), (31, "exact")]


def test_a_model_of_other_compute_is_told_of(study, monkeypatch, tmp_path):
    monkeypatch.setattr(Strong, "found", lambda self, command: {"log": {"passes": 1500.0}, **results()})
    monkeypatch.setattr(study["strongest_plan"], "worst_of", lambda paths: None)
    monkeypatch.setattr(study["strongest"], "worst_of", lambda paths: None)
    Strong(monkeypatch, study)
    failed, _ = measure(study, tmp_path, rows=("sft",))
    assert failed == ["sft, seed 30: 1500 passes, not within 2% of 1670"]


def test_a_sweep_is_what_its_worst_rate_breaks_and_a_collapse_is_no_break(study, tmp_path):
    def worst(*runs):
        paths = {rate: tmp_path / str(rate) for rate in range(len(runs))}
        for path, run in zip(paths.values(), runs, strict=True):
            path.write_text(json.dumps({"points": run}))
        return study["strongest_plan"].worst_of(paths)

    assert worst(points(100), points(12), points(300)) == {"broken": True, "steps": 12, "rate": 1}
    assert worst(points(100), points(12, collapses=12)) == {"broken": True, "steps": 100, "rate": 0}
    assert worst(points(1000, collapses=100), points(12, collapses=5)) == {"broken": False, "steps": 12, "rate": 0}
    assert study["strongest_plan"].worst_of({1e-4: tmp_path / "none"}) is None


def test_lengths_are_swept_and_drawn(study, monkeypatch, tmp_path):
    commands = Strong(monkeypatch, study, breaks=lambda name: 100 if "compute" in name else 1000)
    whole = replace(study["strongest_plan"].STUDY, out=tmp_path / "out")
    study["strongest_lengths"].run(whole, [30, 31], [30, 31, 32], tmp_path)
    entries = json.loads((tmp_path / "attack_lengths.json").read_text())["entries"]
    assert len(entries) == 2 * 2 * 5
    assert {(one["mode"], one["worst"]["steps"]) for one in entries} == {("compute", 100), ("rounds", 300)}
    assert (tmp_path / "attack_lengths.png").read_bytes().startswith(b"\x89PNG")
    for command in commands.ran[:60]:
        understood(command)
    study["strongest_lengths"].run(replace(whole, out=tmp_path / "elsewhere"), [32], [32], tmp_path)
    entries = json.loads((tmp_path / "attack_lengths.json").read_text())["entries"]
    assert [one["seed"] for one in entries] == [30] * 10 + [31] * 10 + [32] * 10
    lines = study["strongest_report"].lengths(entries).splitlines()
    (line,) = (one for one in lines if one.startswith("| rounds | 200 |"))
    assert "| 1200 | 3500.00 [3500.00–3500.00] | > 300 |" in line


# ---------------------------------------------------------------------- the search


def test_what_misses_a_limit_is_told_by_how_much_and_comes_after_what_meets_them(study):
    search = study["strongest_search"]
    value = search.Strongest("strongest", 1, 4).value
    order = [
        {"held": 3.0, "off": {"unrehearsed": 0.0}},
        {"held": 2.0, "off": {"unrehearsed": 0.0, "learning": 0.0}},
        {"held": 9.0, "off": {"learning": 0.2}},
        {"held": 1.0, "off": {"learning": 1.0, "left": 1.0}},
        {"held": None, "off": {"unrehearsed": 0.1}},
        {"held": None, "off": {"unrehearsed": 1.0, "over_refusal": 1.0}},
        {"held": None, "off": {}, "diverged": True},
    ]
    values = [value(record) for record in order]
    assert values == sorted(values)
    assert len(set(values)) == len(values)
    assert values[1] < 0 < values[2]
    assert search.off_before(0.97, 0.02) == {"unrehearsed": 0.0, "over_refusal": 0.0}
    assert search.off_before(0.485, 0.03) == pytest.approx({"unrehearsed": 0.5, "over_refusal": 0.5})
    sft = {"learning": [40, 60], "left": [0.9, 0.9]}
    assert search.off_after({"learning": [60, 90], "left": [0.85, 0.86]}, sft) == {"learning": 0.0, "left": 0.0}
    assert search.off_after({"learning": [90, 135], "left": [0.9, 0.75]}, sft) == pytest.approx(
        {"learning": 0.5, "left": 0.5}
    )
    assert search.off_after({"learning": [40, None], "left": [0.9, 0.9]}, sft) == {"learning": 1.0, "left": 0.0}


def test_the_union_is_the_cheapest_break_and_the_kinds_break_ties(study):
    search = study["strongest_search"]
    free = {"broken": True, "steps": {"value": 0}}
    three = {"broken": True, "steps": {"value": 3}}
    asked = {"broken": False, "at_least": 0, "harmful_score": 0.4}
    holds = {"broken": False, "at_least": 15, "harmful_score": 0.25}
    lost = {"broken": False, "at_least": None, "harmful_score": None}
    assert search.union({"prompting": free, "full": three}) == 0
    assert search.union({"prompting": asked, "full": three, "lora": holds}) == 2
    assert search.union({"prompting": asked, "full": holds, "lora": lost}) == 4.75
    assert search.union({"full": lost}) == 0
    assert search.held_by_all({"prompting": free, "full": three}) == pytest.approx(0.1)


def stressed(commands):
    return [command for command in commands.ran if command.words[0] == "stress"]


def search_all(study, folder, known, stop_at=None, monkeypatch=None, batches=1):
    commands = Strong(monkeypatch, study, stop_at=stop_at, known=known)
    whole = replace(study["strongest_plan"].STUDY, out=folder / "out", batches=batches, batch=4)
    study["strongest_search"].search(whole, folder / "found.json", folder / "trials.json")
    return commands, json.loads((folder / "found.json").read_text())


def test_the_search_goes_on_to_the_same_end_and_has_a_preset_that_meets_the_limits(study, monkeypatch, tmp_path):
    seen = {}

    def known(name):
        """Every other model that is tried forgets what was not rehearsed."""
        if "unrehearsed-before-align-tried" not in name:
            return 1.0
        return 0.5 if seen.setdefault(name.rpartition("-")[2], len(seen)) % 2 else 1.0

    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    commands, whole = search_all(study, tmp_path / "whole", known, monkeypatch=monkeypatch)
    assert whole["trials"][0]["setting"] == study["strongest_search"].SEARCHED.published
    assert len(whole["trials"]) == 1 + 4 + 3  # and the best of these, changed in one thing each
    assert whole["seeds"] == [10, 11]
    assert {int(command.name.split("-")[0][4:]) for command in commands.ran} == {10, 11}
    for command in commands.ran:
        understood(command)
    attacked = [trial for trial in whole["trials"] if trial["held"] is not None]
    assert [trial["number"] for trial in attacked] == [0, 2, 4, 6]
    assert len(commands.stressed()) == 2 * 2 * (1 + len(attacked))
    suites = [tuple(command.words[command.words.index("--suite") :]) for command in stressed(commands)]
    assert [("training-free" in words) for words in suites] == [words[1] == "quick" for words in suites]
    assert whole["trials"][whole["chosen"]] in attacked
    last = max(number for number, command in enumerate(commands.ran, 1) if command.words[0] == "stress")
    with pytest.raises(KeyboardInterrupt):
        search_all(study, tmp_path / "parts", known, stop_at=last, monkeypatch=monkeypatch)
    _, parts = search_all(study, tmp_path / "parts", known, monkeypatch=monkeypatch)
    assert parts["trials"] == whole["trials"]
    (tmp_path / "elsewhere").mkdir()  # a machine that has nothing but what the trials came to
    shutil.copy(tmp_path / "whole" / "trials.json", tmp_path / "elsewhere")
    again, elsewhere = search_all(study, tmp_path / "elsewhere", known, monkeypatch=monkeypatch)
    assert again.ran == []
    assert elsewhere == whole
    preset = study["strongest_search"].preset_of(tmp_path / "whole" / "found.json")
    assert study["strongest_plan"].rows(study["strongest_plan"].STUDY, preset)["preset"]["pool"] == preset["pool"]
    assert study["strongest_search"].preset_of(tmp_path / "none.json") is None
    assert "| **chosen** |" in study["strongest_report"].searched(whole)
    _, longer = search_all(study, tmp_path / "whole", known, monkeypatch=monkeypatch, batches=2)
    assert longer["trials"][:5] == whole["trials"][:5]
    assert len(longer["trials"]) == 1 + 8 + 3


# ---------------------------------------------------------------------- the page


def entries_of(study):
    """Two seeds of SFT, the demo's Patcher and a pool; the second of the pool holds."""
    before = {name: results()["results"] for name in ("base", "model")}
    sft, model = alone("counterpart"), alone("model")
    found = []
    for seed, (row, certificate) in itertools.product((30, 31), {"sft": sft, "exact": model, "pool": model}.items()):
        entry = study["defenses_stress"].entry_of(certificate, sft, before)
        if row == "pool":
            for kind in ("hybrid", "full"):
                entry["attackers"][kind] |= {"steps": {**entry["attackers"][kind]["steps"], "value": 20}}
            if seed == 31:
                for cost in filter(None, entry["attackers"].values()):
                    cost |= {"broken": False, "at_least": 100, "harmful_score": 0.3}
        known = {"seed": seed, "method": row, "setting": {"max_steps": 1200}, "seconds": None, "core_seconds": None}
        sweep = {"broken": row != "pool", "steps": 300 if row == "pool" else 20, "rate": 1e-4}
        passes = {"planned": 1660.0, "recorded": 1670.0}
        found.append({**known, **entry, "passes": passes, "sweep": sweep})
    return found


def test_a_chains_ablation_is_drawn_as_one_by_itself_and_rates_are_multiples(study):
    search, whole = study["strongest_search"], study["strongest_plan"].STUDY
    knobs = {**search.SEARCHED.published, "prefill": 0.0, "ablation": 0.7, "attack_rate": 2.0, "rate_spread": 4.0}
    setting = search.flags_of(knobs, whole)
    pool = setting["pool"]
    assert "prefill" not in pool
    assert "attack_learning_rate" not in setting
    assert pool["ablation"] == {"weight": 0.7, **search.ABLATED}
    assert pool["ablation+fine-tuning"]["ablation"] == pool["ablation+prefill"]["ablation"] == search.ABLATED
    drawn = {member.name: member for member in Pool.of(pool).members}
    assert drawn["fine-tuning"].links[0].knobs["relative_rate"] == (0.5, 8.0, True)
    assert drawn["dropping+fine-tuning"].links[1].knobs["relative_rate"].values == (2.0,)


def test_the_best_setting_is_changed_in_one_thing_at_a_time(study):
    search, whole = study["strongest_search"], study["strongest_plan"].STUDY
    best = {**search.SEARCHED.published, "prefill": 0.0}
    kept = search.flags_of(best, whole)
    changed = [search.flags_of(knobs, whole) for knobs in search.changed(best)]
    for family, setting in zip(("ablation", "prefill"), changed, strict=False):
        assert {**setting, "pool": {}} == {**kept, "pool": {}}
        without = {name: knobs for name, knobs in kept["pool"].items() if family not in name.split("+")}
        assert setting["pool"] == without
    suffixes = list(study["strongest_plan"].SUFFIXES)
    assert changed[2:] == [{**kept, "suffixes": suffixes}]
    alone = {**best, **{name: 0 for name in kept["pool"] if "ablation" in name}}
    assert len(search.changed(alone)) == 2


def test_what_is_shipped_is_what_the_search_chose(study):
    report, results = study["strongest_report"], BENCHMARKS / "results"
    recipes = report.recipes(study["strongest_search"].preset_of(results / "strongest_search.json"))
    assert {path.name for path in recipes} == {"strong.yaml", "align-strong.yaml"}
    for path, recipe in recipes.items():
        assert yaml.safe_load(path.read_text(encoding="utf-8")) == recipe
    understood(Command("strong", ["align", "patcher", "--config", str(report.RECIPE)]))


def test_the_page_tells_on_how_many_seeds_rows_that_end_alike_were_the_cheapest(study):
    entries = entries_of(study)
    full = [entry["attackers"]["full"] for entry in entries]
    assert all("fine-tuning" in cost["setting"] for cost in full)
    for cost, knobs in zip(full, [{}, {"trigger": "now"}, {"steps": 3}, {}, {"obedience": "Use:"}, {}], strict=True):
        cost["setting"] = {"dropping": {}, "fine-tuning": knobs}
    del full[5]["setting"]  # it was written down before entries told this
    full[4]["broken"] = False  # its setting is the one that came closest
    (line,) = study["strongest_tables"].trained_alike(entries)
    assert line.endswith("on how many seeds: SFT 0 of 2; Patcher, exact 1 of 1; sampled, a pool 0 of 1.")
    assert study["strongest_tables"].trained_alike([entries[5]]) == []


def test_costs_are_paired_by_seed_and_told_with_what_is_known_from_below(study):
    report, entries = study["strongest_tables"], entries_of(study)
    by_row = {row: [entry for entry in entries if entry["method"] == row] for row in ("sft", "exact", "pool")}
    assert [report.union(run) for run in by_row["sft"]] == [(0, False)] * 2
    assert [report.union(run) for run in by_row["exact"]] == [(2, False)] * 2
    assert [report.union(run) for run in by_row["pool"]] == [(20, False), (100, True)]
    assert report.paired(by_row["pool"], by_row["exact"], report.union) == [(7, False), (101 / 3, True)]
    assert report.paired(by_row["exact"], by_row["pool"], report.union) == [(3 / 21, False)]
    lines = report.cost_table(entries).splitlines()
    (line,) = (one for one in lines if one.startswith("| sampled, a pool |"))
    assert "| > 60 [20–> 100] | > 61 [21–> 101] | > 20.3 [7–> 33.7] | > 300 | > 14.3 | > 14.3 |" in line
    (line,) = (one for one in report.aims_table(entries).splitlines() if one.startswith("| Patcher, exact |"))
    assert line == "| Patcher, exact | 0 of 2 | 0 of 2 | 2 of 2 | 0 of 2 | 0 of 2 | 0 of 2 |"


def test_what_breaks_each_model_is_told_seed_by_seed_of_the_seeds_that_most_rows_have(study):
    entries = entries_of(study)
    text = study["strongest_tables"].seed_by_seed([*entries[:-1], {**entries[0], "seed": 29}])
    assert text.startswith("**Seed by seed**, 30, 31 in that order:")
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    cells = ["held, held", "held, held", "> 40, > 40", "20, 20", "2, 2", "20, 20", "0.45, 0.45", "0.01, 0.01"]
    assert lines["Patcher, exact"] == f"| Patcher, exact | {' | '.join(cells)} |"
    assert lines["sampled, a pool"].count("20, – |") == 2  # full, hybrid
    assert "> 100" in study["strongest_tables"].seed_by_seed(entries)


def test_the_summary_is_of_the_seeds_that_all_its_rows_have(study):
    entries = [{**one, "method": "preset"} if one["method"] == "pool" else one for one in entries_of(study)]
    more = {**entries[0], "seed": 32}
    text = study["strongest_report"].summary([*entries, more])
    assert text == study["strongest_report"].summary(entries)
    assert text.endswith("Seeds 30, 31, on which nothing was chosen.")
    assert [line.split(" | ")[0] for line in text.splitlines()[2:5]] == ["| SFT", "| Patcher, exact", "| strong preset"]


def test_the_page_is_begun_with_the_first_results_and_filled_with_all(study, monkeypatch, tmp_path):
    report = study["strongest_report"]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "strongest.md")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("<!-- strongest-summary --><!-- /strongest-summary -->")
    report.main()
    assert not (tmp_path / "strongest.md").exists()
    entries = entries_of(study)
    written = {"budget": 1670.0, "sections": {"report": entries}}
    (tmp_path / "strongest.json").write_text(json.dumps(written))
    report.main()
    first = (tmp_path / "strongest.md").read_text()
    assert "| Patcher, exact | 1200 | 1660 | 1670.00 [1670.00–1670.00] | 1.00 [1.00–1.00] | 30, 31 |" in first
    assert (tmp_path / "README.md").read_text() == "<!-- strongest-summary -->\n\n<!-- /strongest-summary -->"
    of_pool = [one for one in entries if one["method"] == "pool"]
    entries.append({**of_pool[0], "method": "preset"})
    written["sections"]["held_out"] = [{**one, "method": "no-ablation"} for one in of_pool]
    written["sections"]["large, quick"] = entries[:2]
    (tmp_path / "strongest.json").write_text(json.dumps(written))
    report.main()
    page = (tmp_path / "strongest.md").read_text()
    assert "| ablation | training-free, hybrid | > 60 [20–> 100] | 20 | > 20.3 [7–> 33.7] | 2 of 2 | 30, 31 |" in page
    assert "| prefill | prompting, hybrid | – | – | – | 0 of 0 | – |" in page
    assert "| no ablation in the pool | " in page
    assert page.count("<!-- strongest-lengths -->\n<!-- /strongest-lengths -->") == 1
    larger = page.partition("<!-- strongest-large -->")[2].partition("<!-- /strongest-large -->")[0]
    assert "| Patcher, exact | 0 of 1 |" in larger
