"""A model that two processes shard is displaced as one that is whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import relative_distance, tiny_llama, word_rows, word_tokenizer
from holdfast.attacks.attack import Attacker
from holdfast.data.rendering import ChatFormat
from methods import TUNINGS, mixtral
from ranks import run_script

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("displaced")
    run_script(HERE / "displaced_ranks.py", folder)
    return load_file(folder / "found.safetensors")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma2"])
@pytest.mark.parametrize("name", ["ablation", "own", "again", "dropping", "base", "rounding", "pruning", "noise"])
def test_the_vector_of_two_ranks_is_that_of_one(found, kind, name):
    sharded, whole = (
        {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}
        for prefix in (f"sharded/{kind}/{name}/", f"whole/{kind}/{name}/")
    )
    assert any(torch.count_nonzero(tensor) for tensor in whole.values())
    assert relative_distance(sharded, whole) < 1e-5


@pytest.mark.parametrize("name", TUNINGS)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_two_ranks_that_shard_a_model_train_it_as_one_does(found, kind, name):
    build = tiny_llama if kind == "llama" else lambda: mixtral(0.0)
    sharded = {key.split("/")[3]: t for key, t in found.items() if key.startswith(f"trained/{kind}/{name}/")}
    attacker = Attacker(ChatFormat(word_tokenizer()), harmful_rows=word_rows(8, seed=1))
    assert relative_distance(sharded, TUNINGS[name].displace(build(), attacker).vector) < 1e-3
