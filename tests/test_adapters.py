"""LoRA adapters of every kind, from the first gradient to the reloaded model: trained, saved, attacked, saved again."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

import reference
from helpers import golden_batch, gradients, tiny_llama, word_rows, word_tokenizer, worst_entry
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.attacks.real import AttackConfig, AttackTrainer
from holdfast.config import DefenseConfig
from holdfast.models import load_model, load_model_and_tokenizer, merge
from holdfast.trainer import DefenseTrainer
from methods import lora

SOME = ["q_proj", "down_proj"]
ADAPTERS = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "lm_head saved": {"target_modules": SOME, "modules_to_save": ["lm_head"]},
    "embed_tokens saved": {"target_modules": SOME, "modules_to_save": ["embed_tokens"]},
    "both saved": {"target_modules": SOME, "modules_to_save": ["embed_tokens", "lm_head"]},
    "embed_tokens saved and tied": {
        "target_modules": SOME,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "embed_tokens adapted": {"target_modules": [*SOME, "embed_tokens"]},
}
# What peft says of tied weights, and of what it does with them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers:UserWarning"),
]


def tied():
    return tiny_llama(tie_word_embeddings=True)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits


@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradient_is_that_of_the_slow_reference(settings, kind):
    model = lora(tied, **ADAPTERS[kind])
    before, batch = copy.deepcopy(model), golden_batch("safe")
    trainer = DefenseTrainer(model, DefenseConfig(**settings), word_rows(8), processing_class=word_tokenizer())
    trainer.training_step(model, batch)
    assert worst_entry(gradients(model), reference.sft(before, [batch])) < 1e-5


@pytest.mark.parametrize("kind", ADAPTERS)
def test_trained_saved_and_reloaded_model_answer_alike(settings, tmp_path, kind):
    """Aligned under simulated attacks; and what the real attack starts from, and what it leads to."""
    base, folder, attacked = (str(tmp_path / name) for name in ("base", "aligned", "attacked"))
    tied().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    changes = {"learning_rate": 1e-2, "max_steps": 3}
    aligned = PatcherTrainer(
        base,
        PatcherConfig(**{**settings, **changes}, attack_every=1, attack_steps=2),
        word_rows(8),
        word_rows(8, seed=1),
        peft_config=LoraConfig(r=2, task_type="CAUSAL_LM", **ADAPTERS[kind]),
    )
    aligned.train()
    aligned.save_model(folder)
    expected = logits(aligned.model)
    assert not torch.allclose(expected, logits(tied()), atol=1e-2)
    assert torch.equal(logits(load_model_and_tokenizer(folder)[0]), expected)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert torch.equal(logits(by_peft), expected)

    second = LoraConfig(r=2, task_type="CAUSAL_LM", **ADAPTERS["embed_tokens adapted"])
    for peft_config in (None, second):
        attack = AttackTrainer(
            folder, AttackConfig(**{**settings, **changes}), word_rows(8, seed=2), peft_config=peft_config
        )
        torch.testing.assert_close(logits(attack.model), expected, rtol=1e-4, atol=1e-5)
        attack.train()
        led_to = logits(attack.model)
        assert not torch.allclose(led_to, expected, atol=1e-2)
        # As the command does: the first adapter is merged into a base that lies nowhere on disk.
        model = attack.model if peft_config is None else merge(attack.model)
        model.save_pretrained(attacked)
        torch.testing.assert_close(logits(load_model(attacked)), led_to, rtol=1e-4, atol=1e-5)
