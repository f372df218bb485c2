"""Jobs as processes: killed at every place of a publication, racing for one folder, reading what another wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import same_bits
from holdfast.exchange import Exchange

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HERE = Path(__file__).parent
FINGERPRINT = {"model": "a", "tokenizer": "b", "trained parameters": "c"}
WEIGHTS = {"w": torch.arange(15.0).reshape(5, 3) / 7, "b": torch.tensor([0.1, -3e38]).bfloat16()}


def join(folder, origin="defender"):
    return Exchange(folder, origin=origin, run="one" if origin == "defender" else None, fingerprint=FINGERPRINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with join(folder / "shared") as exchange:
        exchange.publish(WEIGHTS, step=1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HERE / "processes.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("place", "visible"),
    [
        ("writing", ["000001"]),
        ("describing", ["000001"]),
        ("renaming", ["000001"]),
        ("renamed", ["000001", "000002"]),
        ("deleting", ["000002", "000003", "000004"]),
    ],
)
def test_killed_defender_leaves_whole_versions_and_goes_on(folder, place, visible):
    own = folder / place / "defender"
    hidden = [path for path in own.iterdir() if path.name.startswith(".")]
    assert len(hidden) == (place != "renamed")  # it was in the middle of something
    assert sorted(path.name for path in own.iterdir() if path not in hidden) == visible
    with join(folder / place, "attacker") as attacker:
        version = attacker.newest("defender")
        assert version.path.name == visible[-1]
        expected = {"000001": 1.0, "000002": 2.0, "000004": 2.0}[visible[-1]]
        assert attacker.load(version, {"w": torch.zeros(3)})["w"].tolist() == [expected] * 3
    with join(folder / place) as again:
        assert sorted(path.name for path in own.iterdir()) == visible
        again.publish({"w": torch.full((3,), 9.0)}, step=2)
        again.wait()
        assert again.failures == 0
        with join(folder / place, "attacker") as attacker:
            assert attacker.newest("defender").number == int(visible[-1]) + 1


def test_one_of_two_racing_defenders_wins(folder):
    one, two = (json.loads((folder / f"race-{run}.json").read_text()) for run in ("one", "two"))
    for race, outcomes in enumerate(zip(one, two, strict=True)):
        owner = json.loads((folder / f"race{race}" / "exchange.json").read_text())["run"]
        loser = {"one": "two", "two": "one"}[owner]
        assert outcomes[["one", "two"].index(owner)] == "won"
        assert f"belongs to the run {owner}, not to {loser}" in outcomes[["one", "two"].index(loser)]
        assert {path.name for path in (folder / f"race{race}").iterdir()} == {"exchange.json", "defender"}


def test_another_process_reads_the_same_bits(folder):
    assert same_bits(load_file(folder / "read.safetensors"), WEIGHTS)
