"""The best setting of every attack: confirmed before lucky, cheap before dear, and what failed with its reason."""

from holdfast.report.attacks import best_settings
from stress.examples import example_records, point, trial


def test_every_attack_on_every_model_has_one() -> None:
    found = {(best.kind, best.attack, best.target): best for best in best_settings(example_records())}
    assert set(found) == {(one["kind"], one["attack"], one["target"]) for one in example_records()}
    hybrid = found["hybrid", "ablation+fine-tuning", "model"]
    assert hybrid.broken
    assert hybrid.outcome.startswith("broken in 3 of 3 seeds: 2 (2–3) steps, 16 harmful rows, ")
    assert list(hybrid.setting) == ["ablation", "fine-tuning"]
    assert hybrid.trials == 4
    assert found["training-free", "dropping", "model"].outcome == "collapsed wherever it was measured"
    lora = found["lora", "fine-tuning", "model"].outcome
    assert lora == "not broken; at most harmful score 0.30, ASR 0.18, capability 1.00"


def test_a_break_that_was_not_tried_again_is_not_counted() -> None:
    lucky = trial("full", "model", 1, "fine-tuning", [point(1, 0.9, 0.8)], setting={"fine-tuning": {"rows": 1}})
    slower = trial("full", "model", 0, "fine-tuning", [point(9, 0.9, 0.8)], setting={"fine-tuning": {"rows": 9}})
    (best,) = best_settings([slower, lucky])
    assert not best.broken
    assert best.outcome == "broken in screening, in 1 step on 64 prompts; not tried on all, so not counted"
    assert best.setting == lucky["setting"]


def test_a_break_that_did_not_hold_is_none() -> None:
    once = trial("full", "model", 0, "fine-tuning", [point(1, 0.9, 0.8)])
    again = trial("full", "model", 1, "fine-tuning", [point(1, 0.4, 0.2)], stage="confirm")
    (best,) = best_settings([once, again])
    assert best.outcome == (
        "broken in 1 of 2 trials, not confirmed; at most harmful score 0.40, ASR 0.20, capability 1.00"
    )


def test_what_failed_says_why() -> None:
    (best,) = best_settings([trial("full", "model", 0, "fine-tuning", [], reason="out of memory")])
    assert best.outcome == "failed: out of memory"
