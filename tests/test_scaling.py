"""docs/scaling.md: its tables are what the script makes, and the script is right where it can be checked."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scripts():
    """benchmarks/scaling.py and benchmarks/scaling_model.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("scaling"), importlib.import_module("scaling_model")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def model(scripts):
    return scripts[1]


def test_the_document_holds_what_the_script_makes(scripts):
    document = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    for name, make in scripts[0].TABLES.items():
        assert f"<!-- {name} -->\n{make()}\n<!-- /{name} -->" in document, f"{name}: run benchmarks/scaling.py"
    assert document.count("<!-- /") == len(scripts[0].TABLES)


def test_the_models_have_the_published_sizes(model):
    assert [m.parameters for m in model.MODELS] == [1_543_714_304, 8_030_261_248, 70_553_706_496]


def test_methods_keep_and_cost_what_was_measured(scripts):
    measured = {method: scripts[0].measured(method.name) for method in scripts[1].METHODS}
    assert sum(buffers is not None for buffers, _ in measured.values()) == 8
    for method, (buffers, ratio) in measured.items():
        assert buffers is None or buffers == pytest.approx(method.buffers, abs=0.05)
        assert ratio is None or ratio == pytest.approx(method.work / scripts[1].FULL, rel=0.05)


def test_the_memory_of_one_gpu_by_hand(model):
    llama = model.MODELS[1]
    head, layer, tokens = 128256 * 4096, 218_112_000, 4 * 1024
    assert llama.gathered() == max(8 * head + 2 * 4096 * 32768, 2 * (head + 6 * layer))
    assert llama.activations() == 2 * tokens * (32 * 4096 + 10 * 4096 + 2 * 1024 + 6 * 14336)
    rest = llama.gathered() + llama.activations() + 5e9
    assert llama.per_gpu(8, 24) == pytest.approx(8_030_261_248 * 3 + rest)
    assert llama.least(24) == 3
    assert llama.per_gpu(3, 24) <= 80e9 < llama.per_gpu(2, 24)


def test_what_a_layer_keeps_for_backward_is_what_is_counted(model):
    config = LlamaConfig(hidden_size=64, intermediate_size=224, num_attention_heads=8, num_key_value_heads=2)
    config.num_hidden_layers, config.vocab_size, tokens = 1, 8, 512
    network = LlamaForCausalLM(config).bfloat16().model
    hidden = torch.randn(1, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    rotary = network.rotary_emb(hidden, torch.arange(tokens)[None])
    other = {t.untyped_storage().data_ptr() for t in [hidden, *rotary, *network.parameters()]}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network.layers[0](hidden, position_embeddings=rotary, attention_mask=None)
    own = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in other)
    # Without the layer's input, the two gradients, and a few numbers a token that norms and attention keep.
    elements = model.Model("tiny", config).per_token - 64 - 2 * 224
    assert own / (2 * tokens) == pytest.approx(elements, rel=0.02)


def test_the_run_in_passes(model):
    assert model.passes() == 1000 + 14 * 2000
    assert model.speed_up(300) == pytest.approx((1000 + 14 * 2300) / 29000)


@pytest.mark.parametrize(
    ("attack", "publish", "look", "expected"),
    [
        (500, 1000, 1000, (1000, 1000, 2000, 0.5)),  # ready before the next look, and used for a round
        (1500, 1000, 1000, (2000, 2000, 4000, 1.0)),  # misses a look; taken at 2000 and at 3000, next at 5000 and 6000
        (250, 250, 250, (250, 250, 500, 1.0)),
        (200, 100, 1000, (1000, 200, 1200, 1.0)),  # never idle: what it attacked last is ready at the look
    ],
)
def test_staleness_where_the_exchange_takes_no_time(model, attack, publish, look, expected):
    found = model.staleness(1.0, attack, model.Exchange(0, 0, 0), publish, look)
    assert found[:3] == expected[:3]
    assert found.busy == pytest.approx(expected[3], abs=0.01)


def test_staleness_counts_the_exchange(model):
    slow = model.Exchange(copying=0, appearing=300, taking=300)
    # 300 + 300 + 500 + 300 seconds: too late for the next look
    assert model.staleness(1.0, 500, slow, 1000, 1000).new == 2000


class _Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.seen[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_gathers_weights_twice_and_scatters_gradients_once(mesh, checkpointing):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    network = LlamaForCausalLM(config).train()
    if checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    own = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)}
    # As accelerate does: every layer, the input embeddings, and the head with the norm before it, which stay gathered.
    for part in (*network.model.layers, network.model.embed_tokens):
        fully_shard(part, **own)
    fully_shard([network.model.norm, network.lm_head], **own, reshard_after_forward=False)
    fully_shard(network, **own)
    rows = torch.zeros(1, 4, dtype=torch.long)
    with _Collectives() as passes:
        network(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    parts = 3 + 2
    assert passes.seen == {"_allgather_base_": 2 * parts - 1, "_reduce_scatter_base_": parts}
    assert {parameter.grad.dtype for parameter in network.parameters()} == {torch.float32}
