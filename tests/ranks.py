"""Processes that are the ranks of one job, over gloo: what torchrun tells them, and scripts that fork themselves."""

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent


def environments(count: int) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each rank; nothing for a single one."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def run_script(script: Path, folder: Path) -> None:
    """Run a script that calls `fork_two`, on a folder, from a test."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run([sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def fork_two(work: Callable[[Path, int], None]) -> None:
    """Call `work(folder, rank)` in two processes forked off this one, so that the libraries are imported once."""
    import torch

    torch.set_num_threads(1)
    children = []
    for rank, environment in enumerate(environments(2)):
        child = os.fork()
        if child == 0:
            os.environ.update(environment)
            try:
                work(Path(sys.argv[1]), rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)  # gloo then fails on the other rank as well
        children.append(child)
    if any(ended := [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]):
        raise SystemExit(f"a rank failed: the exit codes are {ended}")


def shard_on_cpu() -> None:
    """From now on, accelerate shards a job of several CPU processes with FSDP where that is asked for, as on GPUs.

    By itself it makes it DDP without a word, which `DefenseTrainer` therefore refuses.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def as_on_gpus(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_on_gpus
