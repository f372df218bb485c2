"""Jobs of two gloo processes and of one hand each other weights: sharded (FSDP2, HSDP) and plain (DDP), bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import same_bits
from holdfast.exchange import Exchange
from ranks import run_script

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HERE = Path(__file__).parent
FINGERPRINT = {"model": "a", "tokenizer": "b", "trained parameters": "c"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = ["fsdp", "hsdp", "ddp"]


def odd_model(dtype, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1)).to(dtype)
    return {name: p.detach() for name, p in model.named_parameters()}


class Found:
    """What the ranks have written."""

    def __init__(self, folder):
        self.exchange = folder / "exchange"
        self.tensors = [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]
        self.values = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]

    def vectors(self, case):
        """The vector of each rank."""
        return [{k.partition("/")[2]: t for k, t in own.items() if k.startswith(f"{case}/")} for own in self.tensors]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with Exchange(folder / "exchange", origin="defender", run="one", fingerprint=FINGERPRINT):
        for name, dtype in DTYPES.items():
            with Exchange(folder / "exchange", origin=f"single-{name}", run=None, fingerprint=FINGERPRINT) as exchange:
                exchange.publish(odd_model(dtype), step=0)
    run_script(HERE / "exchange_ranks.py", folder)
    return Found(folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_read_what_one_has_written(ranks, layout, dtype):
    for found in ranks.vectors(f"{layout} {dtype} from one"):
        assert same_bits(found, odd_model(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_read_what_two_have_written(ranks, layout, dtype):
    for found, values in zip(ranks.vectors(f"{layout} {dtype} from two"), ranks.values, strict=True):
        assert same_bits(found, odd_model(DTYPES[dtype], seed=1))
        assert values[f"{layout} {dtype} placed"]


@pytest.fixture
def reader(ranks, tmp_path):
    """One process at a copy of the exchange."""
    shutil.copytree(ranks.exchange, tmp_path / "exchange")
    with Exchange(tmp_path / "exchange", origin="reader", run=None, fingerprint=FINGERPRINT) as exchange:
        yield exchange


def blank(dtype):
    return {name: torch.zeros_like(tensor) for name, tensor in odd_model(dtype).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_reads_what_two_ranks_have_written(reader, layout):
    version = reader.newest(layout)
    assert (version.number, version.step, version.facts) == (2, 1, {"dtype": "bfloat16"})
    assert same_bits(reader.load(version, blank(torch.bfloat16)), odd_model(torch.bfloat16, seed=1))
    shutil.rmtree(version.path)
    version = reader.newest(layout)
    assert (version.number, version.step, version.facts) == (1, 0, {"dtype": "float32"})
    assert same_bits(reader.load(version, blank(torch.float32)), odd_model(torch.float32, seed=1))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_without_their_neighbours_are_not_used(reader, layout, rank):
    """What is left still names every tensor, some of them with their whole size."""
    version = reader.newest(layout)
    (file,) = version.path.glob(f"shard-0000{rank}-*")
    file.unlink()
    assert reader.load(version, blank(torch.bfloat16)) is None


@pytest.mark.parametrize(("origin", "files"), [("fsdp", 2), ("hsdp", 2), ("ddp", 2), ("lone", 1)])
def test_manifest_lists_what_the_ranks_have_written(ranks, origin, files):
    """Also where one of them had nothing to write."""
    folder = ranks.exchange / origin / "000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["files"]) == files
    assert {*manifest["files"], "manifest.json"} == {path.name for path in folder.iterdir()}


def test_ranks_agree_on_who_has_published(ranks):
    for values in ranks.values:
        assert values["lone"] == [1.0] * 3
        assert values["origins"] == ["ddp", "fsdp", "hsdp", "lone", "single-bfloat16", "single-float32"]


def test_collectives_of_training_reading_and_writing_do_not_mix(ranks):
    for values in ranks.values:
        assert values["busy"] == [[3.0, 3.0]] * 20
        assert values["unseen while written"]
        assert values["seen when written"] == 1


def test_failure_on_one_rank_is_known_to_both(ranks):
    for values in ranks.values:
        assert values["failures"] == 1
        assert values["after failing"] == ["000001"]
        assert values["unreadable on one rank"]
        assert values["lease released"]
        assert values["recovered"] == [1, 4.0]
    assert not ranks.values[1]["warnings"]
    published, loaded = ranks.values[0]["warnings"]
    assert "the weights of step 1 cannot be published" in published
    assert "(No space left on device); training goes on" in published
    assert loaded.endswith("000001 cannot be loaded: Stale file handle")


def test_misfit_is_refused_on_both_ranks(ranks):
    assert all("was not opened with the same tokenizer as misfit has" in values["refused"] for values in ranks.values)
