"""A soft prompt against one trained and asked by hand."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers import same_bits, tiny_llama, weights, word_rows, word_tokenizer
from holdfast.attacks.attack import Attacker
from holdfast.attacks.chain import Chain
from holdfast.attacks.dropping import Dropping
from holdfast.attacks.soft_prompt import SoftPrompt
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.decoding import Decoding
from holdfast.evaluation.evaluate import Evaluator
from holdfast.evaluation.generation import answerable, generate
from holdfast.evaluation.judges import get_judge
from holdfast.evaluation.prompts import PromptSet
from methods import gpt2, lora, mixtral, qwen2

ROWS = word_rows(8, seed=1)
ATTACKER = Attacker(ChatFormat(word_tokenizer()), harmful_rows=ROWS, seed=5)
PROMPTS = ["t5 t6 t7 t60 t61", "t8", "t9 t60", "t40 t41 t42"]
IDS = [[int(word[1:]) for word in prompt.split()] for prompt in PROMPTS]
SHORT = Decoding(max_new_tokens=6)
BUILDS = pytest.mark.parametrize(
    "build", [tiny_llama, qwen2, gpt2, lambda: mixtral(0.0)], ids=["llama", "qwen2", "gpt2", "mixtral"]
)


def embedded(model, prefix, ids):
    return torch.cat([prefix, model.get_input_embeddings()(torch.tensor(ids))])[None]


@BUILDS
def test_vectors_stand_before_every_prompt_however_it_is_padded(build):
    model, prefix = build().eval(), torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    found = generate(model, word_tokenizer(), PROMPTS, decoding=SHORT, batch_size=4, prefix=prefix)
    for answer, ids in zip(found, IDS, strict=True):
        said: list[int] = []
        with torch.no_grad():
            while len(said) < SHORT.max_new_tokens:
                said.append(model(inputs_embeds=embedded(model, prefix, ids + said)).logits[0, -1].argmax().item())
                if said[-1] == 2:
                    break
        assert answer.text == " ".join(f"t{token}" for token in said if token > 3)


@BUILDS
def test_one_step_is_adams_on_the_loss_of_the_completions(build):
    """Adam's first step is the rate, by the sign of the gradient, wherever that is not tiny."""
    model = build().eval()
    start = SoftPrompt(vectors=2, steps=1, batch_size=8, learning_rate=1e-12).ask(model, ATTACKER).asking.prefix
    prefix = start.clone().requires_grad_(True)
    losses = []
    for ids, labels in zip(
        *(ATTACKER.written.tokenize(ROWS, name="attack")[key] for key in ("input_ids", "labels")), strict=True
    ):
        logits = model(inputs_embeds=embedded(model, prefix, ids)).logits[0, 1:-1]
        losses += [
            cross_entropy(row, torch.tensor(label)) for row, label in zip(logits, labels, strict=True) if label >= 0
        ]
    torch.stack(losses).mean().backward()
    found = SoftPrompt(vectors=2, steps=1, batch_size=8, learning_rate=1e-2).ask(model, ATTACKER).asking.prefix
    sure = prefix.grad.abs() > 1e-6
    assert sure.float().mean() > 0.9
    assert torch.allclose((found - start)[sure], -1e-2 * prefix.grad.sign()[sure], rtol=1e-2)


def test_the_weights_stay_as_they_are_and_trainable(capsys):
    model = tiny_llama().eval()
    names = [name for name, _ in model.named_modules()]
    attacked = SoftPrompt(vectors=2, steps=3, batch_size=4)(model, ATTACKER)
    assert attacked.model is model
    assert same_bits(weights(model), weights(tiny_llama()))
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert attacked.asking.prefix.shape == (2, 16)
    assert (attacked.cost.steps, attacked.cost.harmful_rows, attacked.cost.backward_passes) == (3, 8, 3)
    assert capsys.readouterr().out == ""
    again = SoftPrompt(vectors=2, steps=3, batch_size=4)(tiny_llama(), ATTACKER)
    assert torch.equal(again.asking.prefix, attacked.asking.prefix)


def test_only_harmful_prompts_have_it_before_them():
    model, sets = (
        tiny_llama().eval(),
        [
            PromptSet("harmful", "hazards", PROMPTS, None),
            PromptSet("capability", "crafts", PROMPTS, ["oak"] * 4),
        ],
    )
    attacked = SoftPrompt(vectors=2, steps=8, learning_rate=0.3, batch_size=4)(model, ATTACKER)
    evaluator = Evaluator(sets, get_judge("refusal"), SHORT, asking=attacked.asking)
    said = [row["answer"] for row in evaluator(model, word_tokenizer()).samples]
    plain = [answer.text for answer in generate(model, word_tokenizer(), PROMPTS, decoding=SHORT, batch_size=4)]
    assert said[4:] == plain
    assert said[:4] != plain


def test_it_takes_up_positions():
    model, prompt = tiny_llama(max_position_embeddings=8), ["t5 t6 t7 t8 t9 t60"]
    ask = {"drop_long_prompts": True}
    assert answerable(model, word_tokenizer(), prompt, **ask, prefix=torch.zeros(1, 16)) == [0]
    assert answerable(model, word_tokenizer(), prompt, **ask, prefix=torch.zeros(2, 16)) == []
    (answer,) = generate(model, word_tokenizer(), prompt, decoding=SHORT, batch_size=1, prefix=torch.zeros(1, 16))
    assert len(answer.text.split()) <= 1


def test_it_ends_a_chain_and_takes_an_adapter_as_a_whole():
    attacked = Chain((Dropping(amount=0.5), SoftPrompt(vectors=2, steps=1)))(lora(), ATTACKER)
    assert attacked.asking.prefix.shape == (2, 16)
    assert attacked.cost.steps == 1
    with pytest.raises(InputError, match="attack soft-prompt changes how a model is asked, so nothing can come after"):
        Chain((SoftPrompt(), Dropping()))


@pytest.mark.parametrize("settings", [{"vectors": 0}, {"steps": 0}, {"rows": 0}, {"learning_rate": 0.0}])
def test_knobs_out_of_range(settings):
    with pytest.raises(InputError, match="must be greater than 0"):
        SoftPrompt(**settings)
