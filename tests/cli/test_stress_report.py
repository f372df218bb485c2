"""What `holdfast stress` shows while it runs and in the end; that tells what the report tells."""

import itertools

from rich.console import Console

from holdfast.cli.stress_report import Pace, cost_table
from stress.examples import example_certificate


def test_the_table_tells_what_breaks_each_model_by_kind_of_attacker() -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(cost_table(example_certificate()))
    lines = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.startswith("│")}
    assert "2 (2–3) steps: ablation + fine-tuning (HS 0.90, ASR 0.55)" in lines["Hybrid"]
    assert "> 40 steps: fine-tuning (HS 0.30, ASR 0.18 at most)" in lines["LoRA"]
    assert lines["LoRA"].rstrip("│ ").endswith("≥ 20×")
    assert lines["Holds the base"].rstrip("│ ").endswith("1×")
    assert lines["union ASR"].count("1.00 of 128 prompts") == 2


def paced(*moments):
    """The pace after (seconds, trials done by kind) each."""
    clock = itertools.chain([0.0], (seconds for seconds, _ in moments))
    pace = Pace(lambda: next(clock))
    for _, done in moments:
        pace.note(done)
    return pace


def test_the_rest_takes_as_long_as_trials_of_its_kind_did():
    pace = paced((1, {"cheap": 0, "dear": 0}), (11, {"cheap": 10, "dear": 0}), (71, {"cheap": 12, "dear": 2}))
    # Ten cheap ones took 10 s; of the minute in which two of each ended both have half.
    assert pace.left({"cheap": 24, "dear": 6}) == 12 * 40 / 12 + 4 * 30 / 2


def test_a_kind_of_which_no_trial_has_ended_is_taken_for_the_dearest():
    pace = paced((0, {"cheap": 0, "dear": 0}), (10, {"cheap": 10, "dear": 0}), (60, {"cheap": 10, "dear": 5}))
    assert pace.left({"cheap": 12, "dear": 5, "later": 3}) == 2 * 1 + 3 * 10


def test_trials_of_before_a_search_went_on_do_not_count():
    assert paced((0, {"cheap": 90})).left({"cheap": 100}) is None
    assert paced((0, {"cheap": 90}), (20, {"cheap": 92})).left({"cheap": 100}) == 8 * 10


def test_time_in_which_no_trial_ends_belongs_to_those_under_way():
    pace = paced((0, {"dear": 0}), (50, {"dear": 0}), (100, {"dear": 1}))
    assert pace.left({"dear": 3}) == 2 * 100
