"""Two gloo processes do what one does: DDP through the trainers, FSDP2 and HSDP shards through the algebra."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reference
from helpers import (
    golden_vector,
    relative_distance,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    word_tokenizer,
    worst_entry,
)
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from methods import METHODS, joined, mixtral
from ranks import run_script

HERE = Path(__file__).parent
MESHES = ["fsdp", "hsdp 1x2", "hsdp 2x1"]


class Found:
    """What the ranks have written."""

    def __init__(self, folder):
        self.tensors = [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]
        self.values = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]

    def batches(self, case):
        """Global batches: those of the two ranks, joined."""
        found = []
        while any(parts := self.vectors(f"{case} {len(found)}")):
            found.append(joined(parts))
        return found

    def vectors(self, case):
        """The vector of each rank."""
        return [{k.partition("/")[2]: t for k, t in own.items() if k.startswith(f"{case}/")} for own in self.tensors]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_script(HERE / "two_ranks.py", folder)
    return Found(folder)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["sft", "patcher"])
def test_golden_gradient_shared_by_two_ranks(ranks, method, accumulation, checkpointing):
    case = f"{method} {accumulation} {checkpointing}"
    first, second = ranks.vectors(case)
    assert worst_entry(first, golden_vector(method)) < 1e-4
    assert same_bits(first, second)
    assert ranks.values[0][f"{case} loss"] == pytest.approx(5.32571268081665, rel=1e-5)
    assert ranks.values[0]["world"] == 2


@pytest.mark.parametrize("method", ["sft", "patcher"])
def test_direct_call_is_the_mean_over_the_tokens_of_both_ranks(ranks, method):
    first, second = ranks.vectors(f"{method} direct")
    assert worst_entry(first, golden_vector(method)) < 1e-4
    assert same_bits(first, second)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_shared_by_two_ranks(ranks, method, accumulation):
    """As one process with the whole window would, by the slow reference."""
    case = f"{method} {accumulation}"
    first, second = ranks.vectors(case)
    window = ranks.batches(f"{case} window")
    assert [len(batch["input_ids"]) for batch in window] == [4] * accumulation
    expected = METHODS[method].expected(tiny_llama(), window, ranks.batches(f"{case} second"))
    assert worst_entry(first, expected) < 1e-4
    assert same_bits(first, second)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["sft", "patcher"])
def test_experts_shared_by_two_ranks(ranks, method, accumulation):
    """The routers' auxiliary loss is a mean over the micro-batches of both ranks, as TRL has it."""
    case = f"experts {method} {accumulation}"
    first, second = ranks.vectors(case)
    window = []
    while any(parts := ranks.vectors(f"{case} window {len(window) // 2}")):
        window += parts
    assert [len(batch["input_ids"]) for batch in window] == [4 // accumulation] * 2 * accumulation
    model = mixtral()
    if method == "sft":
        expected = reference.sft(model, window)
    else:
        vector = {name: torch.full_like(p, 0.01) for name, p in model.named_parameters()}
        expected = reference.patcher(model, window, vector, 0.5)
    assert worst_entry(first, expected) < 1e-5
    assert same_bits(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_are_bit_identical_after_three_updates(ranks, method):
    first, second = ranks.vectors(f"{method} updates")
    assert same_bits(first, second)
    assert not same_bits(first, weights(tiny_llama()))


def test_ranks_are_bit_identical_after_updates_and_attacks(ranks):
    assert same_bits(*ranks.vectors("updates"))
    assert same_bits(*ranks.vectors("updates attack vector"))
    assert not same_bits(ranks.vectors("updates")[0], weights(tiny_llama()))


def test_run_on_two_ranks_resumes_with_the_same_bits(ranks):
    assert all("checkpoint-4" in values["resumed from"] for values in ranks.values)
    assert all(values["resumed alike"] for values in ranks.values)


def test_ranks_stop_together_when_one_is_asked_to(ranks):
    """In an update, and in an attack; and the run ends as the one that went through."""
    assert all(values["stopped"] == ["checkpoint-2", "checkpoint-3"] for values in ranks.values)
    for stopped, through in zip(ranks.vectors("stopped"), ranks.vectors("updates"), strict=True):
        assert same_bits(stopped, through)


def test_three_updates_with_attacks_equal_one_process_with_the_whole_window(ranks, settings):
    changes = {"max_steps": 3, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 1.0}
    patcher = {"attack_every": 1, "attack_steps": 3, "attack_learning_rate": 1e-3}
    trainer = PatcherTrainer(
        tiny_llama(),
        PatcherConfig(**{**settings, **changes, **patcher, "per_device_train_batch_size": 4}),
        word_rows(16),
        word_rows(12, seed=1),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    assert same_bits(*ranks.vectors("shared"))
    assert relative_distance(ranks.vectors("shared")[0], weights(trainer.model)) < 1e-5
    # AdamW amplifies rounding in tiny gradients.
    assert relative_distance(ranks.vectors("shared attack vector")[0], trainer.attack_vector) < 1e-2
    keys = ("safe_loss", "attacked_loss", "attacker_first_loss", "attack_vector_norm")
    alone = [[entry[key] for key in keys] for entry in trainer.state.log_history if "attack_vector_norm" in entry]
    assert len(alone) == 2
    torch.testing.assert_close(torch.tensor(ranks.values[0]["shared logs"]), torch.tensor(alone), rtol=1e-4, atol=1e-5)


def test_attack_gone_wrong_on_one_rank_is_discarded_on_both(ranks):
    assert all(values["discarded"] for values in ranks.values)


def test_what_would_run_otherwise_than_asked_is_refused(ranks):
    for values in ranks.values:
        assert "--fsdp was asked for" in values["fsdp refused"]
        assert "--average_tokens_across_devices" in values["average_tokens refused"]


@pytest.mark.parametrize("mesh", MESHES)
def test_norms_and_dots_of_shards_are_those_of_the_whole(ranks, mesh):
    for values in (found[mesh] for found in ranks.values):
        assert any("Shard(dim=0)" in placement for placement in values["placements"])
        assert values["norms"][0] == pytest.approx(values["norms"][1], rel=1e-6)
        assert values["dots"][0] == pytest.approx(values["dots"][1], rel=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_share_of_entries_that_moved_is_that_of_the_whole(ranks, mesh):
    on_host, as_it_lies, whole = ranks.values[0][mesh]["moved"]
    assert on_host == as_it_lies == whole == ranks.values[1][mesh]["moved"][0]
    assert 0.4 < whole < 0.6


@pytest.mark.parametrize("mesh", MESHES)
def test_displaced_shards_are_used_and_restored(ranks, mesh):
    """Also right after a forward pass that left gathered weights behind."""
    for values in (found[mesh] for found in ranks.values):
        assert values["losses"] == pytest.approx(values["whole losses"], rel=1e-5)
        assert values["losses"][0] == values["losses"][3]
        assert abs(values["losses"][1] - values["losses"][0]) > 1e-2
        assert abs(values["losses"][2] - values["losses"][1]) > 1e-2
        assert values["restored"]
        assert values["returned"]
        assert values["restore"][0] == pytest.approx(values["restore"][1], rel=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_golden_gradients_from_shards(ranks, mesh):
    assert all(found[mesh]["taken"] for found in ranks.values)
    for method in ("sft", "patcher"):
        for vector in ranks.vectors(f"{mesh} {method}"):
            assert worst_entry(vector, golden_vector(method)) < 1e-4


@pytest.mark.parametrize("mesh", MESHES)
def test_displacement_of_shards(ranks, mesh):
    for vector in ranks.vectors(f"{mesh} displacement"):
        assert worst_entry(vector, golden_vector("attack_vector")) < 1e-4


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_vector_survives_a_checkpoint(ranks, mesh):
    assert all(found[mesh]["state"] for found in ranks.values)


def test_sums_run_over_sharded_dimensions_and_over_no_other(ranks):
    for values in ranks.values:
        assert len(values["layouts"]) == 8
        for found in values["layouts"]:
            assert found == pytest.approx(values["layouts expected"], rel=1e-6)


def test_unreduced_sums_are_refused(ranks):
    assert all("not reduced" in values["partial"] for values in ranks.values)


def test_the_first_rank_asks_a_judge_for_all(ranks):
    assert [values["judged"] for values in ranks.values] == [[[1, 1, 1], 2], [[1, 1, 1], 0]]
