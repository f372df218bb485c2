"""Every method on two processes with FSDP2, through the trainer's own settings, does what it does with DDP."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import PATCHERS, same_bits
from methods import METHODS
from ranks import run_script

every_method = pytest.mark.parametrize("method", ["sft", *PATCHERS, *METHODS])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_script(Path(__file__).parent / "sharded_ranks.py", folder)
    tensors = load_file(folder / "found.safetensors")

    def of(method, case):
        prefix = f"{method}/{case}/"
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return of


@every_method
def test_sharded_run_moves_the_weights_as_a_copied_one(found, method):
    begun, copied, sharded = (found(method, case) for case in ("begun", "copied", "sharded"))
    assert copied.keys() == sharded.keys()
    for name, tensor in copied.items():
        way = (tensor - begun[name]).abs().max()
        assert way > 0
        assert (sharded[name] - tensor).abs().max() <= 1e-4 * way


@every_method
def test_sharded_run_resumes_with_the_same_bits(found, method):
    assert same_bits(found(method, "resumed"), found(method, "sharded"))


@every_method
def test_sharded_model_is_saved_whole(found, method):
    saved, trained = found(method, "saved"), found(method, "sharded")
    assert saved
    for name, tensor in saved.items():
        assert torch.equal(tensor, trained[name])
