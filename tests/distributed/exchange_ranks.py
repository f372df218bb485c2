"""Two gloo processes that are one job of an exchange; started by test_exchange_ranks.py.

Usage: exchange_ranks.py FOLDER. FOLDER/exchange holds one version of the defender's for each dtype, from one
process. The ranks read them, publish as attackers, and write what they have found to FOLDER/rank{0,1}.safetensors (keys
"case/parameter") and FOLDER/rank{0,1}.json.
"""

import errno
import json
import logging
import os
import threading

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from holdfast.errors import InputError
from holdfast.exchange import Exchange
from holdfast.parameters import trainable_parameters
from ranks import fork_two

FINGERPRINT = {"model": "a", "tokenizer": "b", "trained parameters": "c"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def odd_model(dtype, seed=0):
    """Sizes that two ranks cannot share evenly; some shards are empty."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1)).to(dtype)


def sharded(model, mesh):
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Notes:
    """What a rank has found: tensors by case, values, and the warnings it gave."""

    def __init__(self, folder, rank):
        self.folder, self.rank = folder, rank
        self.tensors, self.values, self.warnings = {}, {}, []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.warnings.append(record.getMessage())
        logging.getLogger().addHandler(handler)

    def vector(self, case, vector):
        for name, tensor in vector.items():
            self.tensors[f"{case}/{name}"] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()

    def write(self):
        save_file(self.tensors, self.folder / f"rank{self.rank}.safetensors")
        (self.folder / f"rank{self.rank}.json").write_text(json.dumps({**self.values, "warnings": self.warnings}))


def join(notes, origin, **changes):
    settings = {"origin": origin, "run": None, "fingerprint": FINGERPRINT, **changes}
    return Exchange(notes.folder / "exchange", **settings)


def to_and_fro(notes, layout, build):
    """Read the single process's versions, publish one's own, and read that."""
    with join(notes, layout) as exchange:
        for after, (name, dtype) in enumerate(DTYPES.items()):
            like = trainable_parameters(build(odd_model(dtype, seed=9)))
            loaded = exchange.load(exchange.newest(f"single-{name}"), like)
            notes.vector(f"{layout} {name} from one", loaded)
            exchange.publish(trainable_parameters(build(odd_model(dtype, seed=1))), step=after, facts={"dtype": name})
            exchange.wait()
            again = exchange.load(exchange.newest(layout, after=after), like)
            notes.vector(f"{layout} {name} from two", again)
            notes.values[f"{layout} {name} placed"] = all(
                type(again[key]) is type(like[key].data)
                and getattr(again[key], "placements", None) == getattr(like[key], "placements", None)
                for key in like
            )


def one_tensor(notes):
    """Plain and the same on both ranks: one of them has nothing to write."""
    with join(notes, "lone") as exchange:
        exchange.publish({"w": torch.ones(3)}, step=0)
        exchange.wait()
        loaded = exchange.load(exchange.newest("lone"), {"w": torch.zeros(3)})
        notes.values["lone"] = loaded["w"].tolist()
        notes.values["origins"] = exchange.origins()


def training_beside_writing(notes):
    """Collectives of training, of reading and of writing at the same time."""
    release, save = threading.Event(), safetensors.torch.save
    safetensors.torch.save = lambda *args, **kwargs: release.wait(60) and save(*args, **kwargs)
    try:
        with join(notes, "busy") as exchange:
            exchange.publish({"w": torch.ones(4), "v": torch.ones(4)}, step=0)
            seen = []
            for _ in range(20):
                total = torch.tensor([1.0 + notes.rank])
                dist.all_reduce(total)
                version = exchange.newest("lone")
                seen.append([total.item(), exchange.load(version, {"w": torch.zeros(3)})["w"].sum().item()])
            notes.values["unseen while written"] = exchange.newest("busy") is None
            release.set()
            exchange.wait()
            notes.values["seen when written"] = exchange.newest("busy").number
            notes.values["busy"] = seen
    finally:
        safetensors.torch.save = save


def failing_rank(notes):
    """Rank 1 cannot write its file, then not read one: both know."""
    weights = {"w": torch.ones(4), "v": torch.ones(4)}
    with join(notes, "failing") as exchange:
        exchange.publish(weights, step=0)
        exchange.wait()
        fsync, safe_open = os.fsync, safetensors.safe_open

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def gone(*_, **__):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        if notes.rank == 1:
            os.fsync = full
        exchange.publish(weights, step=1)
        exchange.wait()
        os.fsync = fsync
        dist.barrier()
        notes.values["failures"] = exchange.failures
        notes.values["after failing"] = sorted(path.name for path in (exchange.folder / "failing").iterdir())
        dist.barrier()
        version = exchange.newest("failing")
        if notes.rank == 1:
            safetensors.safe_open = gone
        notes.values["unreadable on one rank"] = exchange.load(version, weights) is None
        safetensors.safe_open = safe_open
        dist.barrier()
        notes.values["lease released"] = not list((exchange.folder / "leases").iterdir())
        exchange.publish(weights, step=2)
        exchange.wait()
        loaded = exchange.load(exchange.newest("failing", after=1), weights)
        notes.values["recovered"] = [exchange.failures, loaded["v"].sum().item()]


def refused(notes):
    try:
        join(notes, "misfit", fingerprint={**FINGERPRINT, "tokenizer": "x"})
    except InputError as error:
        notes.values["refused"] = str(error)


def work(folder, rank):
    dist.init_process_group("gloo")
    notes = Notes(folder, rank)
    mesh = init_device_mesh("cpu", (2,))
    copies = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "shard"))
    to_and_fro(notes, "fsdp", lambda model: sharded(model, mesh))
    to_and_fro(notes, "hsdp", lambda model: sharded(model, copies))
    to_and_fro(notes, "ddp", lambda model: torch.nn.parallel.DistributedDataParallel(model).module)
    one_tensor(notes)
    training_beside_writing(notes)
    failing_rank(notes)
    refused(notes)
    notes.write()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_two(work)
