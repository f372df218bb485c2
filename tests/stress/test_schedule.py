"""What is tried next hangs on what was found before, and on nothing else."""

from dataclasses import replace

from holdfast.stress.schedule import Schedule
from holdfast.stress.spaces import families
from holdfast.stress.suites import BATCH, SUITES, Scene, grids
from stress.made import TINY, found, point, record, schedule, settings

SCENE = Scene(layers=4, rows=64, openers=("Use:", "Sure, here is"), base=True, harmless_rows=False)


def run(one: Schedule, harm, others=()):
    """The trials of a study whose trials do so much harm, by batch."""
    done, trials = [], []
    while batch := one.next(done, others):
        trials.append(batch)
        done.append([found(trial, harm(trial)) for trial in batch])
    return trials


def test_the_grid_goes_first_then_the_best_is_confirmed():
    batches = run(schedule(), lambda trial: 0.6 if trial.setting == settings(6)[4] else 0.1)
    assert [len(batch) for batch in batches] == [BATCH, 2, TINY.seeds]
    trials = [trial for batch in batches for trial in batch]
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert [trial.setting for trial in trials[:6]] == settings(6)
    assert [trial.setting for trial in trials[6:8]] == [settings(6)[4]] * 2
    assert [trial.seed for trial in trials] == [5, 6, 7, 8, 9, 10, 5, 6]
    assert [(trial.batch, trial.place, trial.size) for trial in trials[3:7]] == [
        (0, 3, 4),
        (1, 0, 2),
        (1, 1, 2),
        (2, 0, 2),
    ]


def test_a_lucky_trial_is_followed_by_the_next_candidate():
    first, strong = settings(6)[0], settings(6)[5]

    def harm(trial):
        if trial.stage == "confirm":
            return 0.9 if trial.setting == strong else 0.3
        return {str(first): 0.5, str(strong): 0.9}.get(str(trial.setting), 0.0)

    confirmed = [batch[0].setting for batch in run(schedule(), harm) if batch[0].stage == "confirm"]
    assert confirmed == [first, strong]


def test_what_looks_cheaper_than_one_that_held_is_tried_still():
    """What was screened at 1e9 FLOPs and confirmed at 3e9 is no cheaper than what was screened at 2e9."""
    one = schedule(3)
    lucky, cheap, dear = one.next([], [])
    costs = {str(lucky.setting): 1e9, str(cheap.setting): 2e9, str(dear.setting): 4e9}
    done = [[found(trial, 0.9, asr=0.9, flops=costs[str(trial.setting)]) for trial in (lucky, cheap, dear)]]
    confirmed = []
    while batch := one.next(done, []):
        confirmed.append(batch[0].setting)
        flops = {**costs, str(lucky.setting): 3e9}
        done.append([found(trial, 0.9, asr=0.9, flops=flops[str(trial.setting)]) for trial in batch])
    assert confirmed == [lucky.setting, cheap.setting]


def test_success_is_confirmed_as_well_as_harm():
    """Where what does harm does not answer in full, what does is tried again, too."""
    one = schedule(2)
    grid = one.next([], [])
    done = [[found(grid[0], 0.9), found(grid[1], 0.8, asr=0.7, flops=1e9)]]
    done.append([found(trial, 0.9) for trial in one.next(done, [])])
    assert done[1][0]["setting"] == settings(2)[0]
    batch = one.next(done, [])
    assert [trial.setting for trial in batch] == [settings(2)[1]] * TINY.seeds
    done.append([found(trial, 0.8, asr=0.7) for trial in batch])
    assert one.next(done, []) == []


def test_hybrids_of_other_studies_are_candidates():
    other = record(point(0.9), number=1003, setting={"fine-tuning": {"steps": 2}, "prefill": {"opener": "Use:"}})
    batches = run(schedule(2, kind="hybrid"), lambda trial: 0.1 if trial.stage == "grid" else 0.9, [other])
    assert [batch[0].setting for batch in batches[1:]][:1] == [other["setting"]]


def test_a_kind_of_which_nothing_could_be_measured_is_done():
    one = schedule(2)
    grid = one.next([], [])
    failed = [record(number=trial.number, setting=trial.setting) for trial in grid]
    assert one.next([failed], []) == []


def searched(seed=0, target="model"):
    suite = replace(SUITES["quick"], batches={"training-free": 2})
    grid = grids(suite, SCENE)["training-free"]
    return Schedule("training-free", target, suite, grid, families(suite, SCENE)["training-free"], (), seed)


def test_tpe_asks_the_same_of_the_same_records():
    harm = lambda trial: 0.3 + 0.01 * (trial.number % 7)  # noqa: E731
    batches = run(searched(), harm)
    assert batches == run(searched(), harm)
    asked = [trial for batch in batches for trial in batch if trial.stage == "tpe"]
    assert len(asked) == 2 * BATCH
    assert len({str(trial.setting) for trial in asked}) == len(asked)
    for other in (searched(seed=1), searched(target="counterpart")):
        assert [t.setting for b in run(other, harm) for t in b if t.stage == "tpe"] != [t.setting for t in asked]


def test_tpe_learns_from_the_grid():
    """Where the grid's last layer does harm, that is where most of what follows is."""
    harm = lambda trial: 0.45 if trial.setting.get("ablation", {}).get("layer", 0) == -1 else 0.0  # noqa: E731
    asked = [trial for batch in run(searched(), harm) for trial in batch if trial.stage == "tpe"]
    assert sum(trial.setting["ablation"]["layer"] == -1 for trial in asked) > len(asked) / 2
