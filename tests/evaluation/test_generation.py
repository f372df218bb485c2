"""Generation in batches gives the answers of one prompt at a time, and leaves everything as it was."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import chat_tokenizer, tiny_llama, word_rows, word_tokenizer
from holdfast.errors import InputError
from holdfast.evaluation.decoding import DECODINGS, GREEDY, PAPER, Decoding
from holdfast.evaluation.generation import answerable, generate
from methods import jamba, lfm2, mixtral, qwen2_moe, qwen3_next

SHORT = Decoding(max_new_tokens=12)
SAMPLED = Decoding(max_new_tokens=12, do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.2)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def prompts(count, longest=20):
    draw = random.Random(0)
    return [" ".join(f"t{draw.randrange(4, 97)}" for _ in range(draw.randint(1, longest))) for _ in range(count)]


def tiny_qwen2():
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def tiny_gpt2():
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    model = GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = 2
    return model


def tiny_lora():
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    return get_peft_model(tiny_llama(), adapter)


def by_hand(model, text, steps):
    """Greedy decoding of one prompt, without cache, padding or the library's generation."""
    ids = word_tokenizer()(text)["input_ids"]
    answer = []
    model.eval()
    with torch.no_grad():
        while len(answer) < steps:
            token = model(torch.tensor([ids + answer])).logits[0, -1].argmax().item()
            if token == 2:
                break
            answer.append(token)
    return word_tokenizer().decode(answer, skip_special_tokens=True).strip()


def texts(*args, **settings):
    return [answer.text for answer in generate(*args, **settings)]


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_qwen2, tiny_gpt2, tiny_lora, mixtral, qwen2_moe, qwen3_next, lfm2, jamba]
)
def test_batched_answers_are_those_of_one_prompt_at_a_time(build):
    model, tokenizer, asked = build(), word_tokenizer(), prompts(17)
    answers = texts(model, tokenizer, asked, decoding=SHORT, batch_size=5)
    assert answers == [by_hand(model, text, 12) for text in asked]
    assert answers == texts(model, tokenizer, asked, decoding=SHORT, batch_size=100)
    assert len(set(answers)) > 5


def test_answers_end_at_any_end_token_of_the_model_or_the_tokenizer():
    model, tokenizer, asked = tiny_llama(), word_tokenizer(), prompts(12)
    before = [answer.split() for answer in texts(model, tokenizer, asked, decoding=SHORT, batch_size=4)]
    word = next(answer[2] for answer in before if len(answer) > 2)
    model.generation_config.eos_token_id = [int(word[1:]), 5]
    after = [answer.split() for answer in texts(model, tokenizer, asked, decoding=SHORT, batch_size=4)]
    cut = [answer[: min((answer.index(end) for end in (word, "t5") if end in answer), default=99)] for answer in before]
    assert after == cut
    assert after != before


def test_an_answer_without_a_stop_token_is_marked_as_truncated():
    model, tokenizer, asked = tiny_llama(), word_tokenizer(), prompts(12)
    word = texts(model, tokenizer, asked, decoding=SHORT, batch_size=4)[0].split()[2]
    model.generation_config.eos_token_id = int(word[1:])
    answers = generate(model, tokenizer, asked, decoding=SHORT, batch_size=4)
    assert not answers[0].truncated
    assert all(len(answer.text.split()) == 12 for answer in answers if answer.truncated)
    assert any(answer.truncated for answer in answers)


@pytest.mark.parametrize("build", [tiny_llama, tiny_lora])
def test_greedy_decoding_ignores_the_models_own_settings(build):
    model, tokenizer, asked = build(), word_tokenizer(), prompts(8)
    plain = generate(model, tokenizer, asked, decoding=SHORT, batch_size=8)
    own = model.generation_config
    own.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, num_beams=3, max_length=3)
    own.update(suppress_tokens=list(range(4, 60)), no_repeat_ngram_size=1, min_new_tokens=9, use_cache=False)
    settings = own.to_dict()
    assert generate(model, tokenizer, asked, decoding=SHORT, batch_size=8) == plain
    assert model.generation_config is own
    assert own.to_dict() == settings


@pytest.mark.parametrize("build", [tiny_llama, tiny_lora])
def test_everything_is_left_as_it_was(build):
    model, tokenizer = build(), word_tokenizer()
    tokenizer.padding_side = "right"
    model.train()
    inner = next(module for module in model.modules() if type(module).__name__ == "LlamaMLP")
    inner.eval()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model(torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss.backward()

    def state():
        return {
            "modes": [module.training for module in model.modules()],
            "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
            "config": model.config.to_dict(),
            "gradients": [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
            "trainable": [p.requires_grad for p in model.parameters()],
            "tokenizer": (tokenizer.padding_side, tokenizer.pad_token, tokenizer.eos_token, len(tokenizer)),
            "torch": torch.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
            "grad": torch.is_grad_enabled(),
        }

    before = state()
    generate(model, tokenizer, prompts(6), decoding=SAMPLED, batch_size=3)
    assert state() == before


def test_everything_is_left_as_it_was_after_an_error(monkeypatch):
    model = tiny_llama().train()
    own = model.generation_config
    monkeypatch.setattr(model, "generate", lambda **_: torch.rand(3) + 1 / 0)
    random_state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        generate(model, word_tokenizer(), prompts(2), decoding=SHORT, batch_size=2)
    assert all(module.training for module in model.modules())
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_trainers_model_answers_and_trains_on(tmp_path):
    model, tokenizer, asked = tiny_llama(), word_tokenizer(), prompts(6)
    untouched = generate(model, tokenizer, asked, decoding=SHORT, batch_size=6)
    config = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=2
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=word_rows(16), processing_class=tokenizer)
    assert generate(trainer.model, tokenizer, asked, decoding=SHORT, batch_size=6) == untouched
    trainer.train()
    assert len(generate(trainer.model, tokenizer, asked, decoding=SHORT, batch_size=6)) == 6
    loss = trainer.model(torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss
    loss.backward()
    assert loss.requires_grad


def test_sampling_follows_the_seed():
    model, tokenizer, asked = tiny_llama(), word_tokenizer(), prompts(8)

    def answers(seed):
        return generate(model, tokenizer, asked, decoding=SAMPLED, batch_size=8, seed=seed)

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    assert answers(1) != generate(model, tokenizer, asked, decoding=SHORT, batch_size=8)


def test_a_repetition_penalty_does_not_see_the_padding():
    model, tokenizer, asked = tiny_llama(), word_tokenizer(), prompts(40)
    penalised = Decoding(max_new_tokens=12, repetition_penalty=10.0)
    words = " ".join(texts(model, tokenizer, asked, decoding=penalised, batch_size=1)).split()
    tokenizer.pad_token = tokenizer.eos_token = max(set(words), key=words.count)
    together = generate(model, tokenizer, asked, decoding=penalised, batch_size=40)
    assert together == generate(model, tokenizer, asked, decoding=penalised, batch_size=1)


def test_without_a_pad_token_the_end_token_pads_and_the_tokenizer_is_not_changed():
    model, asked = tiny_llama(), prompts(9)
    words = word_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2")
    padded = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t2")
    answers = generate(model, tokenizer, asked, decoding=SHORT, batch_size=4)
    assert answers == generate(model, padded, asked, decoding=SHORT, batch_size=4)
    assert tokenizer.pad_token is None


class Recorder:
    """Stands in for a model, keeps the prompts it is given and always gives the same answer."""

    def __init__(self, monkeypatch, tokenizer):
        self.model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
        self.seen = []
        self.answer = ""

        def answer(input_ids, attention_mask, generation_config):
            for ids, mask in zip(input_ids, attention_mask, strict=True):
                self.seen.append(tokenizer.decode(ids[mask.bool()]))
            said = torch.tensor([tokenizer(self.answer)["input_ids"] + [tokenizer.eos_token_id]])
            return torch.cat([input_ids, said.expand(len(input_ids), -1)], 1)

        monkeypatch.setattr(self.model, "generate", answer)


def test_text_becomes_a_user_turn_where_there_is_a_chat_template(monkeypatch):
    tokenizer = chat_tokenizer(TEMPLATE)
    recorder = Recorder(monkeypatch, tokenizer)
    asked = ["bread?", [{"role": "user", "content": "bread?"}]]
    generate(recorder.model, tokenizer, asked, decoding=SHORT, batch_size=2)
    assert recorder.seen == ["<|im_start|>user\nbread?<|im_end|>\n<|im_start|>assistant\n"] * 2


def test_the_system_prompt_does_not_replace_one_that_is_there(monkeypatch):
    tokenizer = chat_tokenizer(TEMPLATE)
    recorder = Recorder(monkeypatch, tokenizer)
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "bread?"}]
    generate(recorder.model, tokenizer, [own, "bread?"], decoding=SHORT, batch_size=1, system_prompt="Kind.")
    systems = sorted(text.split("<|im_end|>")[0] for text in recorder.seen)
    assert systems == ["<|im_start|>system\nKind.", "<|im_start|>system\nOwn."]
    assert own[0]["content"] == "Own."


def test_the_chat_template_is_given_its_settings(monkeypatch):
    tokenizer = chat_tokenizer(TEMPLATE)
    recorder = Recorder(monkeypatch, tokenizer)
    settings = {"enable_thinking": False}
    generate(recorder.model, tokenizer, ["x"], decoding=SHORT, batch_size=1, chat_template_kwargs=settings)
    assert recorder.seen[0].endswith("<think></think>")


# A template that lets the model think, one that opens the thinking itself, and one that has thought already.
THINKING = {
    "free": TEMPLATE,
    "opened": TEMPLATE.replace("<think></think>", "<think>\n").replace("not enable", "enable"),
    "done": TEMPLATE,
}


@pytest.mark.parametrize("special", [True, False], ids=["special", "ordinary"])
@pytest.mark.parametrize(
    ("kind", "said", "answer", "thoughts", "unclosed"),
    [
        ("free", "<think>\n\n</think>\n\niron, salt", "iron, salt", "", False),
        ("free", "<think>\nhm</think>\n\niron, salt", "iron, salt", "hm", False),
        ("free", "<think>\niron, salt", "", "iron, salt", True),
        ("free", "iron, salt", "iron, salt", None, False),
        ("opened", "hm</think>\n\niron, salt", "iron, salt", "hm", False),
        ("opened", "iron, salt", "", "iron, salt", True),
        ("done", "iron, salt", "iron, salt", None, False),
    ],
)
def test_reasoning_is_parted_from_the_answer(monkeypatch, special, kind, said, answer, thoughts, unclosed):
    tokenizer = chat_tokenizer(THINKING[kind], think_tokens=special)
    assert (len(tokenizer("<think>")["input_ids"]) == 1) == special
    recorder = Recorder(monkeypatch, tokenizer)
    recorder.answer = said
    settings = {"enable_thinking": kind == "opened"} if kind != "free" else None
    asked = ["Is <think> a mark?", "bread?"]
    found = generate(recorder.model, tokenizer, asked, decoding=SHORT, batch_size=2, chat_template_kwargs=settings)
    assert [(a.text, a.thoughts, a.thinking_unclosed, a.truncated) for a in found] == [
        (answer, thoughts, unclosed, False)
    ] * 2


def test_answers_near_the_last_position_are_as_long_as_they_can_be():
    model, tokenizer = tiny_gpt2(), word_tokenizer()
    asked = [" ".join(["t7"] * length) for length in (3, 40, 60, 63)]
    answers = texts(model, tokenizer, asked, decoding=Decoding(max_new_tokens=20), batch_size=4)
    expected = [by_hand(model, text, min(20, 64 - len(text.split()))) for text in asked]
    assert answers == expected


def test_a_prompt_that_leaves_no_room_is_refused_by_number():
    with pytest.raises(InputError, match=r"prompt 2 has 64 tokens.* has 64 positions"):
        generate(tiny_gpt2(), word_tokenizer(), ["t7", " ".join(["t7"] * 64)], decoding=SHORT, batch_size=4)


def test_prompts_that_leave_no_room_can_be_told():
    asked = [" ".join(["t7"] * length) for length in (64, 63, 70, 1)]
    assert answerable(tiny_gpt2(), word_tokenizer(), asked, drop_long_prompts=True) == [1, 3]
    assert answerable(tiny_gpt2(), word_tokenizer(), asked[1::2], drop_long_prompts=False) == [0, 1]
    with pytest.raises(InputError, match=r"prompt 1 has 64 tokens.* has 64 positions.* --drop_long_prompts"):
        answerable(tiny_gpt2(), word_tokenizer(), asked, drop_long_prompts=False)


def test_an_empty_prompt_is_refused_by_number():
    with pytest.raises(InputError, match="prompt 2 is empty"):
        generate(tiny_llama(), word_tokenizer(), ["t7", ""], decoding=SHORT, batch_size=4)


def test_messages_without_a_chat_template_are_refused_by_number():
    asked = ["t7", [{"role": "user", "content": "t7"}]]
    with pytest.raises(InputError, match="prompt 2 is made of messages, but the tokenizer has no chat template"):
        generate(tiny_llama(), word_tokenizer(), asked, decoding=SHORT, batch_size=4)


def test_a_system_prompt_without_a_chat_template_is_refused():
    with pytest.raises(InputError, match="--system_prompt needs a chat template"):
        generate(tiny_llama(), word_tokenizer(), ["t7"], decoding=SHORT, batch_size=4, system_prompt="Be kind.")


def test_no_prompts_have_no_answers():
    assert generate(tiny_llama(), word_tokenizer(), [], decoding=SHORT, batch_size=4) == []


def test_presets():
    assert DECODINGS == {"greedy": GREEDY, "paper": PAPER}
    assert not GREEDY.do_sample
    assert (PAPER.temperature, PAPER.top_p, PAPER.repetition_penalty, PAPER.max_new_tokens) == (0.6, 0.9, 1.2, 256)


@pytest.mark.parametrize(
    "setting",
    [{"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}],
)
def test_decoding_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError, match=f"--{next(iter(setting))}"):
        Decoding(**setting)
