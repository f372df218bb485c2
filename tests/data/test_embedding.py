"""Embeddings are means over a prompt's own tokens, leave the model alone, and are kept only for what they belong to."""

import logging
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import chat_tokenizer, same_bits, tiny_llama, weights, word_rows, word_tokenizer
from holdfast.data.embedding import embed_prompts
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from methods import jamba, lfm2, mixtral, qwen2_moe, qwen3_next

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompts(count, longest=20, seed=0):
    draw = random.Random(seed)
    return [" ".join(f"t{draw.randrange(4, 97)}" for _ in range(draw.randint(1, longest))) for _ in range(count)]


KEPT = prompts(9)


def tiny_qwen2():
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=97, num_key_value_heads=2, initializer_range=0.3, **sizes))


def tiny_gpt2():
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config)


def tiny_lora(lora_alpha=8):
    torch.manual_seed(3)
    adapter = LoraConfig(
        r=4, lora_alpha=lora_alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5
    )
    return get_peft_model(tiny_llama(), adapter)


def by_hand(model, tokens):
    """One prompt alone, without padding, through the whole model."""
    model.eval()
    with torch.no_grad():
        output = model(torch.tensor([tokens]), output_hidden_states=True)
    return output.hidden_states[-1][0].mean(dim=0)


class Passes:
    """Notes the shape of every batch that goes through a model's layers."""

    def __init__(self, model):
        self.shapes = []
        embedding = model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda _, inputs: self.shapes.append(tuple(inputs[0].shape)))


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_qwen2, tiny_gpt2, tiny_lora, mixtral, qwen2_moe, qwen3_next, lfm2, jamba]
)
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_an_embedding_is_the_mean_over_the_prompts_own_tokens(build, batch_size):
    model, tokenizer, asked = build(), word_tokenizer(), prompts(17)
    found = embed_prompts(model, ChatFormat(tokenizer), asked, batch_size=batch_size)
    expected = torch.stack([by_hand(model, tokenizer(text)["input_ids"]) for text in asked])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.randoms(use_true_random=False))
def test_embeddings_follow_the_order_of_the_prompts(count, batch_size, draw):
    model, tokenizer, asked = tiny_llama(), word_tokenizer(), prompts(count)
    order = list(range(count))
    draw.shuffle(order)
    found = embed_prompts(model, ChatFormat(tokenizer), [asked[i] for i in order], batch_size=batch_size)
    torch.testing.assert_close(found, embed_prompts(model, ChatFormat(tokenizer), asked)[order], rtol=1e-4, atol=1e-5)


def test_messages_and_text_go_through_the_chat_template():
    tokenizer = chat_tokenizer(TEMPLATE)
    model = tiny_llama(vocab_size=len(tokenizer))
    turns = [{"role": "user", "content": "bread?"}]
    text, messages, kind = embed_prompts(model, ChatFormat(tokenizer), ["bread?", turns, "flour?"])
    rendered = "<|im_start|>user\nbread?<|im_end|>\n<|im_start|>assistant\n"
    torch.testing.assert_close(text, by_hand(model, tokenizer(rendered)["input_ids"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, messages)
    (with_system,) = embed_prompts(model, ChatFormat(tokenizer, "Be kind."), [turns])
    assert not torch.allclose(text, kind, atol=1e-3)
    assert not torch.allclose(text, with_system, atol=1e-3)


def test_prompts_of_like_length_share_a_batch_and_no_logits_are_computed():
    model = tiny_llama()
    passes = Passes(model)
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("logits were computed"))
    asked = [" ".join(["t7"] * length) for length in (9, 1, 8, 2, 9, 2)]
    embed_prompts(model, ChatFormat(word_tokenizer()), asked, batch_size=2)
    assert passes.shapes == [(2, 2), (2, 8), (2, 9)]


@pytest.mark.parametrize("build", [tiny_llama, tiny_lora])
def test_everything_is_left_as_it_was(build):
    model, tokenizer = build(), word_tokenizer()
    model.train()
    next(module for module in model.modules() if type(module).__name__ == "LlamaMLP").eval()
    model.gradient_checkpointing_enable()
    model(torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss.backward()

    def state():
        return {
            "modes": [module.training for module in model.modules()],
            "gradients": [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
            "config": model.config.to_dict(),
            "torch": torch.get_rng_state().tolist(),
            "grad": torch.is_grad_enabled(),
        }

    before, kept = state(), weights(model)
    assert not embed_prompts(model, ChatFormat(tokenizer), prompts(6)).requires_grad
    assert state() == before
    assert same_bits(weights(model), kept)


def test_modes_are_put_back_after_an_error(monkeypatch):
    model = tiny_llama().train()
    monkeypatch.setattr(model.model.norm, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed_prompts(model, ChatFormat(word_tokenizer()), prompts(2))
    assert all(module.training for module in model.modules())


def test_a_model_in_bfloat16_gives_float32():
    model, asked = tiny_llama(), prompts(5)
    expected = embed_prompts(model, ChatFormat(word_tokenizer()), asked)
    found = embed_prompts(model.bfloat16(), ChatFormat(word_tokenizer()), asked)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_trainers_model_can_be_used(tmp_path):
    asked, tokenizer = prompts(6), word_tokenizer()
    expected = embed_prompts(tiny_llama(), ChatFormat(tokenizer), asked)
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(model=tiny_llama(), args=config, train_dataset=word_rows(4), processing_class=tokenizer)
    torch.testing.assert_close(embed_prompts(trainer.model, ChatFormat(tokenizer), asked), expected)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "safety.jsonl"
    path.write_text("{}\n")
    return path


def embed_kept(model, data, asked=None):
    return embed_prompts(model, ChatFormat(word_tokenizer()), asked or KEPT, batch_size=4, data_file=data)


def files_beside(data):
    return sorted(path for path in data.parent.iterdir() if path != data)


def test_embeddings_are_kept_beside_the_data_and_read_the_next_time(data):
    first = embed_kept(tiny_llama(), data)
    (kept,) = files_beside(data)
    assert kept.name.startswith("safety.jsonl.embeddings-")
    assert kept.name.endswith(".safetensors")
    model = tiny_llama()
    passes = Passes(model)
    assert torch.equal(embed_kept(model, str(data)), first)
    assert not passes.shapes
    assert files_beside(data) == [kept]


def test_without_a_data_file_nothing_is_written(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    embed_prompts(tiny_llama(), ChatFormat(word_tokenizer()), KEPT)
    assert files_beside(data) == []


def test_a_model_saved_and_loaded_again_is_the_same(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.use_cache = False
    passes = Passes(model)
    assert torch.equal(embed_kept(tiny_llama(), data), embed_kept(model, data))
    assert not passes.shapes


def test_another_model_or_other_prompts_are_not_mistaken(data):
    def changed_weight():
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
        return model

    def disabled(model):
        model.base_model.disable_adapter_layers()
        return model

    cases = [
        (tiny_llama(), KEPT),
        (changed_weight(), KEPT),
        (tiny_llama(rms_norm_eps=1e-2), KEPT),
        (tiny_llama().bfloat16(), KEPT),
        (tiny_lora(), KEPT),
        (tiny_lora(lora_alpha=4), KEPT),
        (disabled(tiny_lora()), KEPT),
        (tiny_llama(), KEPT[::-1]),
        (tiny_llama(), KEPT[:-1]),
    ]
    for count, (model, asked) in enumerate(cases, 1):
        found = embed_kept(model, data, asked)
        assert len(files_beside(data)) == count
        assert torch.equal(found, embed_prompts(model, ChatFormat(word_tokenizer()), asked, batch_size=4))


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "no safetensors", "of other prompts"])
def test_a_damaged_file_is_computed_anew(data, damage, caplog):
    expected = embed_kept(tiny_llama(), data)
    (kept,) = files_beside(data)
    content = kept.read_bytes()
    if damage == "of other prompts":
        embed_kept(tiny_llama(), data, KEPT[::-1])
        (other,) = set(files_beside(data)) - {kept}
        other.replace(kept)
    else:
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        kept.write_bytes({"cut": content[:-8], "flipped": flipped, "emptied": b""}.get(damage, b"not a header"))
    with caplog.at_level(logging.WARNING, "holdfast"):
        assert torch.equal(embed_kept(tiny_llama(), data), expected)
    assert str(kept) in caplog.text
    assert "the embeddings are computed anew" in caplog.text
    assert kept.read_bytes() == content


def test_where_nothing_can_be_written_a_warning_says_so(data, caplog):
    # A file where a folder is expected refuses whoever asks; permissions do not stop root.
    nowhere = data / "safety.jsonl"
    with caplog.at_level(logging.WARNING, "holdfast"):
        found = embed_kept(tiny_llama(), nowhere)
    assert torch.equal(found, embed_prompts(tiny_llama(), ChatFormat(word_tokenizer()), KEPT, batch_size=4))
    assert "cannot be written" in caplog.text
    assert "the embeddings are not kept" in caplog.text


def test_no_prompts_are_refused():
    with pytest.raises(InputError, match="no prompts to embed"):
        embed_prompts(tiny_llama(), ChatFormat(word_tokenizer()), [])


def test_an_empty_prompt_is_refused_by_number():
    with pytest.raises(InputError, match="prompt 2 is empty"):
        embed_prompts(tiny_llama(), ChatFormat(word_tokenizer()), ["t7", ""])


def test_a_prompt_longer_than_the_models_positions_is_refused_by_number():
    fits = " ".join(["t7"] * 64)
    assert embed_prompts(tiny_gpt2(), ChatFormat(word_tokenizer()), [fits]).shape == (1, 16)
    with pytest.raises(InputError, match="prompt 2 has 65 tokens, but the model has 64 positions"):
        embed_prompts(tiny_gpt2(), ChatFormat(word_tokenizer()), ["t7", f"{fits} t7"])


def test_a_learned_prompt_is_refused():
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match="adapter of type PROMPT_TUNING"):
        embed_prompts(model, ChatFormat(word_tokenizer()), ["t7"])
