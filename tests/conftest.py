"""What every test stands on: one thread, so that bits can be compared, and no network."""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import datasets
import pytest
import torch

from hub import Hub, go_online

torch.set_num_threads(1)
datasets.disable_progress_bars()


@pytest.fixture
def settings(tmp_path):
    """The settings that runs of tiny models share; to be updated with what a test is about."""
    return {
        "output_dir": str(tmp_path / "run"),
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_length": 64,
        "gradient_checkpointing": False,
        "seed": 3,
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback, asked by the libraries themselves."""
    served = Hub(tmp_path / "hub")
    go_online(monkeypatch, served.address, tmp_path / "cache")
    yield served
    served.close()


@pytest.fixture(scope="session")
def organism(tmp_path_factory):
    """The organism of seed 0, built once however many processes run the tests: a folder, not to be written to."""
    from filelock import FileLock

    from holdfast.organism import build_organism

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "organism.lock"):
        build_organism(shared / "organism", seed=0)  # a second call finds the first one's
    return shared / "organism"
