"""Antidote prunes what the plain formula prunes, on every layout of weights, and nothing else."""

from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import WORDS, golden_batch, golden_vector, same_bits, tiny_llama, weights
from holdfast.errors import InputError
from holdfast.repair.antidote import prune_harmful, pruned_per_row, wanda_mask
from methods import jamba, lfm2, mixtral, qwen2_moe, qwen3_5, qwen3_next

TINY = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# Settings that architectures name otherwise.
CHANGES = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "deepseek_v3": {
        **{"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4},
        **{"qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 2},
    },
}


def tiny(model_type, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**TINY, **CHANGES.get(model_type, {}), **changes})
    )


def with_lora(model, **changes):
    settings = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.5, "init_lora_weights": False}
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **changes}))


def harmful():
    return golden_batch("harmful")


def single_rows(batch):
    """Every row of a batch alone, without its padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        {"input_ids": ids[None, :length], "attention_mask": torch.ones(1, length, dtype=torch.long)}
        for ids, length in zip(batch["input_ids"], lengths, strict=True)
    ]


def reference_masks(model, names, ratio):
    """The formula as it stands, slowly, and without a line of Holdfast's.

    Rows go through one by one, unpadded; all inputs are kept, in float64; scores are sorted output by output.
    """
    seen = {name: [] for name in names}
    model.eval()
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen[name].append(inputs[0].detach()[0].double())
        )
        for name in names
    ]
    for row in single_rows(harmful()):
        model(input_ids=row["input_ids"])
    for hook in hooks:
        hook.remove()
    masks = {}
    for name in names:
        module = model.get_submodule(name)
        transposed = type(module).__name__ == "Conv1D"
        weight = module.weight.detach().double()
        weight = weight.T if transposed else weight
        norms = torch.cat(seen[name]).square().sum(0).sqrt()
        columns = weight.shape[1]
        kept = int(Decimal(columns) * (1 - Decimal(str(ratio))))
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        for row in range(weight.shape[0]):
            scores = [(abs(weight[row, c]) * norms[c]).item() for c in range(columns)]
            for column in sorted(range(columns), key=scores.__getitem__)[kept:]:
                mask[row, column] = True
        masks[name] = mask.T if transposed else mask
    return masks


def names_of(model, *endings):
    return [name for name, _ in model.named_modules() if name.endswith(endings)]


def test_the_golden_mask():
    case = golden_vector("antidote")
    assert case["inputs"].dim() == 3
    for inputs in (case["inputs"], case["inputs"].flatten(0, 1), case["inputs"][:, None]):
        mask = wanda_mask(case["weight"], inputs, ratio=0.1)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, case["mask"].bool())


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_batches_of_inputs_are_so_many_tokens(batch, length, rows, seed):
    """Also where a batch's length is the weight's number of rows, to which it could be broadcast."""
    torch.manual_seed(seed)
    weight, inputs = torch.randn(rows, 6), torch.randn(batch, length, 6)
    scores = weight.abs() * torch.stack([token for row in inputs for token in row]).norm(dim=0)
    expected = torch.zeros(rows, 6).scatter(1, scores.topk(2).indices, 1).bool()
    assert torch.equal(wanda_mask(weight, inputs, 0.3), expected)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4)])
def test_inputs_that_do_not_fit_the_weight(shape):
    with pytest.raises(InputError, match=r"do not fit a weight of shape \(2, 5\)"):
        wanda_mask(torch.ones(2, 5), torch.ones(shape), 0.1)


@pytest.mark.parametrize(
    ("columns", "ratio", "expected"),
    [(20, 0.1, 2), (100, 0.1, 10), (100, 0.9, 90), (4096, 1e-5, 1), (100_000, 1e-5, 1), (100_001, 1e-5, 2)],
)
def test_pruned_weights_of_a_row(columns, ratio, expected):
    assert pruned_per_row(columns, ratio) == expected


@given(st.integers(1, 20_000), st.integers(1, 9_999))
def test_pruned_weights_of_a_row_are_those_of_the_formula(columns, ten_thousandths):
    kept = columns * (10_000 - ten_thousandths) // 10_000
    assert pruned_per_row(columns, ten_thousandths / 10_000) == columns - kept


def test_of_equal_scores_the_later_columns_are_taken():
    mask = wanda_mask(torch.ones(2, 5), torch.ones(3, 5), ratio=0.4)
    assert mask.tolist() == [[False, False, False, True, True]] * 2


SEPARATE = (".q_proj", ".k_proj", ".v_proj")
LORA = (".lora_A.default", ".lora_B.default")
CASES = {
    "llama": (lambda: tiny_llama(), SEPARATE, 0.1),
    "llama, one weight a row": (lambda: tiny_llama(), SEPARATE, 1e-5),
    "qwen2": (lambda: tiny("qwen2", tie_word_embeddings=True), SEPARATE, 0.3),
    "gpt2": (lambda: tiny("gpt2"), (".c_attn",), 0.1),
    "qwen2_moe": (qwen2_moe, SEPARATE, 0.2),
    "mixtral": (mixtral, SEPARATE, 0.2),
    "lora on mixtral": (lambda: with_lora(mixtral(), target_modules=["q_proj", "o_proj"]), LORA, 0.1),
    "lora on llama": (lambda: with_lora(tiny_llama()), LORA, 0.1),
    "lora on gpt2": (lambda: with_lora(tiny("gpt2"), fan_in_fan_out=True), LORA, 0.3),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(",", "").replace(" ", "-"))
@pytest.mark.parametrize("restore", [False, True], ids=["zero", "aligned"])
def test_exactly_the_reference_is_pruned(case, restore):
    build, endings, ratio = CASES[case]
    model = build()
    before = weights(model)
    aligned = None
    if restore:
        aligned = build()
        with torch.no_grad():
            for parameter in aligned.parameters():
                parameter.add_(1)
    expected = reference_masks(model, names_of(model, *endings), ratio)
    model.train()

    repair = prune_harmful(model, [harmful()], ratio=ratio, aligned=aligned)

    assert repair.pruned == {name: int(mask.sum()) for name, mask in expected.items()}
    assert repair.weights == {name: mask.numel() for name, mask in expected.items()}
    assert repair.total == sum(repair.pruned.values()) > 0
    assert repair.tokens == int(harmful()["attention_mask"].sum())
    for name, weight in weights(model).items():
        layer = name.removesuffix(".weight")
        if layer in expected:
            replaced = torch.zeros_like(weight) if aligned is None else weights(aligned)[name]
            assert torch.equal(weight, torch.where(expected[layer], replaced, before[name]))
        else:
            assert torch.equal(weight, before[name])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_default_ratios():
    assert prune_harmful(tiny_llama(), [harmful()]).ratio == 1e-5
    assert prune_harmful(with_lora(tiny_llama()), [harmful()]).ratio == 0.1


def test_batches_of_any_size_come_to_the_same():
    whole, streamed = tiny_llama(), tiny_llama()
    prune_harmful(whole, [harmful()], ratio=0.2)
    rows = single_rows(harmful())
    repair = prune_harmful(streamed, iter(rows), ratio=0.2)
    assert repair.tokens == sum(row["input_ids"].numel() for row in rows)
    assert same_bits(weights(whole), weights(streamed))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    plain, padded = tiny_llama(), tiny_llama()
    (row, *_) = single_rows(harmful())
    prune_harmful(plain, [row], ratio=0.2)
    # An embedding of huge entries at the padding would take every mask over, if it counted.
    noise = torch.full((1, 9), 96)
    for model in (plain, padded):
        model.model.embed_tokens.weight.data[96] = 1e4
    parts = {"input_ids": noise, "attention_mask": torch.zeros(1, 9, dtype=torch.long)}
    batch = {
        name: torch.cat([parts[name], tensor] if side == "left" else [tensor, parts[name]], dim=1)
        for name, tensor in row.items()
    }
    assert prune_harmful(padded, [batch], ratio=0.2).tokens == row["input_ids"].numel()
    assert same_bits(weights(plain), weights(padded))


@pytest.mark.parametrize(
    ("model_type", "endings"),
    [
        ("mistral", SEPARATE),
        ("gemma2", SEPARATE),
        ("opt", SEPARATE),
        ("phi3", (".qkv_proj",)),
        ("gpt_neox", (".query_key_value",)),
        ("falcon", (".query_key_value",)),
        ("bloom", (".query_key_value",)),
        ("mpt", (".Wqkv",)),
        ("deepseek_v3", (".q_a_proj", ".q_b_proj", ".kv_a_proj_with_mqa", ".kv_b_proj")),
    ],
)
def test_query_key_and_value_of_every_architecture(model_type, endings):
    model = tiny(model_type)
    expected = names_of(model, *endings)
    assert len(expected) == 2 * len(endings)
    repair = prune_harmful(model, [harmful()])
    assert list(repair.pruned) == expected
    assert all(repair.pruned[name] == model.get_submodule(name).weight.shape[0] for name in expected)


@pytest.mark.parametrize(
    ("build", "linear"), [(qwen3_5, "in_proj_qkv"), (qwen3_next, "in_proj_qkvz")], ids=["qwen3_5", "qwen3_next"]
)
def test_query_key_and_value_of_linear_attention(build, linear):
    repair = prune_harmful(build(), [harmful()])
    attention = [f"model.layers.1.self_attn{ending}" for ending in SEPARATE]
    assert list(repair.pruned) == [f"model.layers.0.linear_attn.{linear}", *attention]


@pytest.mark.parametrize(("build", "mixer"), [(lfm2, "conv"), (jamba, "mamba")], ids=["lfm2", "jamba"])
def test_layers_without_query_key_and_value_are_not_left_out_silently(build, mixer):
    message = f"1 of the model's 2 modules that mix tokens have no query, .* as model.layers.0.{mixer}; .* --targets"
    refused(build(), message)
    assert len(prune_harmful(build(), [harmful()], targets="[qkv]_proj$").pruned) == 3


def test_targets_are_searched_for_in_names():
    repair = prune_harmful(tiny_llama(), [harmful()], targets=r"layers\.1\.mlp\.(up|down)")
    assert list(repair.pruned) == ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]


def test_of_a_lora_model_only_the_adapter_is_a_target():
    model = with_lora(tiny_llama())
    repair = prune_harmful(model, [harmful()], targets="q_proj")
    assert repair.pruned.keys() == set(names_of(model, *(f".q_proj{ending}" for ending in LORA)))


def test_adapter_that_is_not_used_stays_as_it_is():
    model = with_lora(tiny_llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = weights(model)
    repair = prune_harmful(model, [harmful()])
    unused = names_of(model, ".lora_A.other", ".lora_B.other")
    assert len(unused) == 4
    assert all(repair.pruned[name] == 0 for name in unused)
    assert all(torch.equal(weights(model)[f"{name}.weight"], before[f"{name}.weight"]) for name in unused)


def test_bf16_weights_keep_their_type():
    model = tiny_llama().to(torch.bfloat16)
    before = weights(model)
    repair = prune_harmful(model, [harmful()], ratio=0.1)
    changed = sum(int((before[name] != weight).sum()) for name, weight in weights(model).items())
    assert {weight.dtype for weight in weights(model).values()} == {torch.bfloat16}
    assert changed == repair.total


# ------------------------------------------------------------------ what cannot be used


def refused(model, match, batches=None, **arguments):
    """Refused with one sentence, and nothing of the model has changed."""
    before = weights(model)
    with pytest.raises(InputError, match=match) as caught:
        prune_harmful(model, [harmful()] if batches is None else batches, **arguments)
    assert "\n" not in str(caught.value)
    for name, weight in weights(model).items():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_ratio_outside_its_range(ratio):
    refused(tiny_llama(), "--ratio must lie between 0 and 1", ratio=ratio)
    with pytest.raises(InputError, match="--ratio"):
        wanda_mask(torch.ones(2, 2), torch.ones(2, 2), ratio)


def test_mask_of_numbers_that_are_not_finite():
    with pytest.raises(InputError, match="weight"):
        wanda_mask(torch.tensor([[1.0, float("nan")]]), torch.ones(3, 2), 0.1)
    with pytest.raises(InputError, match="inputs"):
        wanda_mask(torch.ones(1, 2), torch.tensor([[1.0, float("inf")]]), 0.1)


def test_targets_that_match_no_linear_layer():
    refused(tiny_llama(), "--targets 'input_layernorm' matches no linear layer", targets="input_layernorm")
    refused(with_lora(tiny_llama()), "--targets 'lm_head' matches no linear layer", targets="lm_head")


def test_targets_that_are_no_regular_expression():
    refused(tiny_llama(), r"--targets '\(' is not a regular expression", targets="(")


def test_model_whose_attention_goes_by_other_names():
    model = tiny("ctrl", n_embd=16, n_head=4, n_layer=2, dff=32)
    refused(model, "by default --targets matches no linear layer")
    assert prune_harmful(model, [harmful()], targets=r"\.W[qkv]$").total == 2 * 3 * 16


def test_tied_weights():
    refused(tiny_llama(tie_word_embeddings=True), "lm_head is tied", targets="lm_head")
    assert prune_harmful(tiny_llama(), [harmful()], targets="lm_head").total == WORDS


def test_quantized_weights():
    model = tiny_llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    refused(model, "q_proj is quantized")


@pytest.mark.parametrize("length", [5, 16])
def test_inputs_that_are_not_tokens(length):
    # DoRA also sends an identity matrix (here 16 × 16) through its matrices.
    batch = {"input_ids": torch.full((1, length), 7), "attention_mask": torch.ones(1, length)}
    refused(with_lora(tiny_llama(), use_dora=True), "which are not one for every token", batches=[batch])


def test_adapter_that_is_not_lora():
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    refused(get_peft_model(tiny_llama(), config), "no LoRA matrices")


def test_merged_adapter():
    model = with_lora(tiny_llama())
    model.merge_adapter()
    refused(model, "none of the .* layers saw a token")


def test_data_without_tokens():
    refused(tiny_llama(), "no tokens", batches=[])


def test_batch_without_a_mask():
    refused(tiny_llama(), "lacks attention_mask", batches=[{"input_ids": harmful()["input_ids"]}])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_and_inputs_that_are_not_finite(value):
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = value
    refused(model, "the weight of model.layers.1.self_attn.v_proj")
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = value
    refused(model, "the inputs of model.layers.1.self_attn.q_proj")


def test_aligned_model_of_another_kind():
    refused(tiny_llama(), "--aligned_model is a LoRA adapter, but --model is a full", aligned=with_lora(tiny_llama()))
    refused(with_lora(tiny_llama()), "--aligned_model is a full model, but --model is a LoRA", aligned=tiny_llama())


@pytest.mark.parametrize(
    ("aligned", "match"),
    [
        (lambda: tiny_llama(vocab_size=101), "--aligned_model has the vocabulary size 101, but --model has 97"),
        (lambda: tiny("qwen2"), "--aligned_model has the architecture qwen2, but --model has llama"),
        (lambda: tiny_llama(num_hidden_layers=1), "--aligned_model has no layer model.layers.1.self_attn.q_proj"),
        (lambda: tiny_llama(hidden_size=32), r"q_proj of shape \(32, 32\), but --model has one of \(16, 16\)"),
    ],
    ids=["vocabulary", "architecture", "layers", "shape"],
)
def test_aligned_model_that_does_not_fit(aligned, match):
    refused(tiny_llama(), match, aligned=aligned())


def test_aligned_adapter_of_another_rank():
    refused(with_lora(tiny_llama()), "of shape", aligned=with_lora(tiny_llama(), r=2))


def test_aligned_weights_that_are_not_finite():
    aligned = tiny_llama()
    aligned.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("nan")
    refused(tiny_llama(), "the aligned weight of model.layers.0.self_attn.k_proj", aligned=aligned)
