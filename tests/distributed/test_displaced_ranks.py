"""A model that two processes shard is displaced as one that is whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import relative_distance
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
