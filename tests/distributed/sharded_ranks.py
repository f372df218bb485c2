"""Two gloo processes that train every method, copied (DDP) and sharded (FSDP2); started by test_sharded_ranks.py.

Usage: sharded_ranks.py FOLDER. Rank 0 writes FOLDER/found.safetensors, keys "method/what/parameter".
"""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from helpers import PATCHERS, run_to_resume
from methods import METHODS
from ranks import fork_two, shard_on_cpu

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
# With so great an epsilon AdamW does not blow up what rounding does to entries close to zero.
RUN = {"max_steps": 5, "per_device_train_batch_size": 2, "save_steps": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-2}


def whole(model):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def work(folder, rank):
    found = {}

    def note(case, tensors):
        found.update({f"{case}/{name}": tensor for name, tensor in tensors.items()})

    methods = ["sft", *PATCHERS, *METHODS]
    for method in methods:
        trainer = run_to_resume(method, str(folder / "copied"), **{**RUN, "save_strategy": "no"})
        note(f"{method}/begun", whole(trainer.model))
        trainer.train()
        note(f"{method}/copied", whole(trainer.model))
    shard_on_cpu()
    for method in methods:
        run = folder / method
        trainer = run_to_resume(method, str(run), **RUN, **SHARDED)
        trainer.train()
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        note(f"{method}/sharded", whole(trainer.model))
        trainer.save_model(str(run / "saved"))
        resumed = run_to_resume(method, str(run), **RUN, **SHARDED)
        resumed.train(resume_from_checkpoint=str(run / "checkpoint-4"))
        note(f"{method}/resumed", whole(resumed.model))
        if rank == 0:
            note(f"{method}/saved", load_file(run / "saved" / "model.safetensors"))
    if rank == 0:
        save_file(found, folder / "found.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_two(work)
