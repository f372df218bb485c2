"""Two gloo processes that displace a model that FSDP2 shards; started by test_displaced_ranks.py.

Usage: displaced_ranks.py FOLDER. Rank 0 writes FOLDER/found.safetensors: whole vectors, keys
"model/attack/parameter" behind "sharded/" and, for one process alone, "whole/".
"""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers import same_bits, tiny_llama, word_rows, word_tokenizer
from holdfast.attacks.ablation import Ablation
from holdfast.attacks.attack import Attacker
from holdfast.attacks.back_to_base import BackToBase
from holdfast.attacks.dropping import Dropping
from holdfast.attacks.noise import Noise
from holdfast.attacks.pruning import Pruning
from holdfast.attacks.rounding import Rounding
from holdfast.data.rendering import ChatFormat
from holdfast.parameters import displaced, local
from methods import TUNINGS, gemma2, gpt2, mixtral
from ranks import fork_two, shard_on_cpu

MODELS = {"llama": tiny_llama, "gpt2": gpt2, "mixtral": mixtral, "gemma2": gemma2}
ATTACKS = {
    "ablation": Ablation(layer=0),
    "own": Ablation(own_directions=True, keep_norms=True, project_harmless=True),
    "again": Ablation(layer=0, rank=2, repeat=2),
    "dropping": Dropping(amount=0.5),
    "base": BackToBase(kept=0.5, rank=1),
    "rounding": Rounding(),
    "pruning": Pruning(),
    "noise": Noise(),
}


def base_of(build):
    base = build()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.5).add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return base


def attacker_of(build):
    prompts = {"harmful_prompts": ["t5 t6 t7", "t8", "t9 t60"], "harmless_prompts": ["t40 t41", "t42"]}
    return Attacker(ChatFormat(word_tokenizer()), **prompts, base=base_of(build), batch_size=2)


def trained(build, name):
    """The vectors of a fine-tuning, on a model that is sharded and on one that is whole."""
    model, attacker = sharded(build()), Attacker(ChatFormat(word_tokenizer()), harmful_rows=word_rows(8, seed=1))
    before = {key: local(p).clone() for key, p in model.named_parameters()}
    vector = TUNINGS[name].displace(model, attacker).vector
    assert all(isinstance(tensor, DTensor) for tensor in vector.values())
    assert same_bits({key: local(p) for key, p in model.named_parameters()}, before)
    return {key: tensor.full_tensor() for key, tensor in vector.items()}


def sharded(model):
    for layer in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def work(folder, rank):
    dist.init_process_group("gloo")
    shard_on_cpu()
    found = {}
    for kind, build in MODELS.items():
        model, attacker = sharded(build()), attacker_of(build)
        before = {name: local(p).clone() for name, p in model.named_parameters()}
        for name, attack in ATTACKS.items():
            vector = attack.displace(model, attacker).vector
            assert all(isinstance(tensor, DTensor) for tensor in vector.values())
            with displaced(model, vector):
                moved = {key: local(p).clone() for key, p in model.named_parameters()}
            assert same_bits({key: local(p) for key, p in model.named_parameters()}, before)
            assert all(torch.allclose(moved[key] - before[key], local(v), atol=1e-6) for key, v in vector.items())
            found.update({f"sharded/{kind}/{name}/{key}": tensor.full_tensor() for key, tensor in vector.items()})
            alone = attack.displace(build(), attacker).vector
            found.update({f"whole/{kind}/{name}/{key}": tensor for key, tensor in alone.items()})
    for name, build in {"llama": tiny_llama, "mixtral": lambda: mixtral(0.0)}.items():
        for tuning in TUNINGS:
            found.update({f"trained/{name}/{tuning}/{key}": tensor for key, tensor in trained(build, tuning).items()})
    if rank == 0:
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / "found.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_two(work)
