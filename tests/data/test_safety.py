"""Safety rows are taken by size, at random or by the model's own embeddings of the prompts alone."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from helpers import chat_tokenizer, golden_rows, same_bits, tiny_llama, weights, word_rows, word_tokenizer
from holdfast.data.embedding import embed_prompts
from holdfast.data.rendering import ChatFormat
from holdfast.data.safety import choose_safety_rows
from holdfast.data.selection import relevance_diversity_dpp
from holdfast.errors import InputError

SAFETY, UPLOAD = word_rows(20, seed=1), word_rows(30)
TEMPLATE = "{% for turn in messages %}<|im_start|>{{ turn['role'] }} {{ turn['content'] }}<|im_end|>\n{% endfor %}"


def choose(rule, safety=SAFETY, upload=UPLOAD, model=None, **changes):
    model = model if model is not None else tiny_llama()
    return choose_safety_rows(safety, upload, model, ChatFormat(word_tokenizer()), rule=rule, **changes)


@pytest.mark.parametrize("rule", ["dpp", "random"])
@pytest.mark.parametrize(
    ("share", "rows", "size"), [(0.03, 30, 1), (0.1, 30, 3), (0.11, 30, 4), (0.07, 100, 7), (1.0, 20, 20)]
)
def test_share_of_the_upload_is_rounded_up(rule, share, rows, size):
    chosen = choose(rule, upload=word_rows(rows), share=share)
    assert len(chosen) == size
    everything = [tuple(row.items()) for row in SAFETY]
    assert len({everything.index(tuple(row.items())) for row in chosen}) == size


def test_random_rows_follow_the_seed():
    chosen = [choose("random", share=0.2, seed=seed)["prompt"] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("beta", [0.0, 4.0])
def test_dpp_is_that_of_the_prompts_embeddings(beta):
    """In the order in which they were picked; answers play no part."""
    model = tiny_llama()
    before = weights(model)
    chosen = choose("dpp", model=model, share=0.2, beta=beta)
    candidates, task = (
        embed_prompts(tiny_llama(), ChatFormat(word_tokenizer()), rows["prompt"]) for rows in (SAFETY, UPLOAD)
    )
    picks = relevance_diversity_dpp(candidates, task, 6, beta)
    assert chosen.to_list() == SAFETY.select(picks).to_list()
    other_answers = SAFETY.remove_columns("completion").add_column("completion", ["t9"] * 20)
    assert choose("dpp", other_answers, share=0.2, beta=beta)["prompt"] == chosen["prompt"]
    assert same_bits(weights(model), before)


def test_dpp_by_an_adapter():
    """The model is the one that is going to be trained, adapter and all."""
    torch.manual_seed(3)
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    embeddings = [embed_prompts(adapted, ChatFormat(word_tokenizer()), rows["prompt"]) for rows in (SAFETY, UPLOAD)]
    picks = relevance_diversity_dpp(*embeddings, 6)
    assert choose("dpp", model=adapted, share=0.2).to_list() == SAFETY.select(picks).to_list()
    assert choose("dpp", share=0.2).to_list() != SAFETY.select(picks).to_list()


def test_formats_may_differ_and_rows_come_back_as_they_were():
    tokenizer = chat_tokenizer(TEMPLATE)
    model = tiny_llama(vocab_size=len(tokenizer))
    questions = ["Bread?", "Flour and water?", "Rice?", "A helpful assistant?", "Tea?"]
    turns = [[{"role": "user", "content": question}, {"role": "assistant", "content": "No."}] for question in questions]
    safety = Dataset.from_list([{"messages": talk, "source": i} for i, talk in enumerate(turns)])
    upload = Dataset.from_list([{"prompt": question, "response": "Yes."} for question in questions[:4]])
    written = ChatFormat(tokenizer, "Be kind.")
    chosen = choose_safety_rows(safety, upload, model, written, rule="dpp", share=0.5)
    embeddings = [embed_prompts(model, written, prompts) for prompts in ([talk[:1] for talk in turns], questions[:4])]
    assert chosen["source"] == relevance_diversity_dpp(*embeddings, 2)
    assert chosen.column_names == safety.column_names


def test_embeddings_are_kept_beside_the_files(tmp_path):
    files = {"safety_file": tmp_path / "safety.jsonl", "upload_file": tmp_path / "upload.jsonl"}
    chosen = [choose("dpp", share=0.2, **files).to_list() for _ in range(2)]
    kept = sorted(path.name.partition(".embeddings-")[0] for path in tmp_path.iterdir())
    assert kept == ["safety.jsonl", "upload.jsonl"]
    assert chosen[0] == chosen[1] == choose("dpp", share=0.2).to_list()
    choose("random", share=0.2, **files)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("rule", ["dpp", "random"])
def test_more_rows_than_there_are(rule):
    with pytest.raises(InputError, match=r"--safety_share 0\.7 of 30 rows asks for 21 safety rows, but there are 20"):
        choose(rule, share=0.7)


@pytest.mark.parametrize(
    ("name", "sets"), [("safety", {"safety": golden_rows("safe")}), ("train", {"upload": golden_rows("safe")})]
)
def test_tokenised_rows_have_no_prompts(name, sets):
    with pytest.raises(InputError, match=f"the {name} data is tokenised"):
        choose("dpp", share=0.1, **sets)
