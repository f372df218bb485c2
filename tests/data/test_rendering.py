"""Under every chat template, training sees the template's own ids and learns the answers and their end tokens alone."""

import importlib
import itertools
import logging
import pickle
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import HealthCheck, given
from hypothesis import settings as rules
from hypothesis import strategies as st

from helpers import chat_tokenizer
from holdfast.data.formats import Conversation, canonical, idle_columns
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    scripts = importlib.import_module("chat_templates")
finally:
    sys.path.remove(str(ROOT / "benchmarks"))

WRITTEN = {name: ChatFormat(scripts.tokenizer_of(template)) for name, template in scripts.TEMPLATES.items()}
WANT_PARTS = {"idefics3", "llava_next", "smolvlm"}  # content as a list of text parts, that is
CHATML = scripts.OTHERS["ChatML without markers"]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "?", "parameters": {"type": "object"}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def stretches(written, rows, **keywords):
    """What is trained on of every row."""
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows, on_mixed_types="use_json")
    tokens = written.tokenize(rows, name="attack", **keywords)
    return [scripts.labelled(written.tokenizer, row["input_ids"], row["labels"]) for row in tokens]


def whole(written, rows):
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows, on_mixed_types="use_json")
    return [written.tokenizer.decode(row["input_ids"]) for row in written.tokenize(rows, name="attack")]


def before_the_answer(tokens):
    return tokens["input_ids"][: next(i for i, label in enumerate(tokens["labels"]) if label != -100)]


@pytest.mark.parametrize("name", scripts.TEMPLATES)
def test_every_case_of_the_document(name):
    for case in scripts.CASES.values():
        scripts.outcome(WRITTEN[name], case)


def test_the_document_holds_what_the_script_makes():
    document = (ROOT / "docs" / "chat_templates.md").read_text("utf-8")
    for name, make in scripts.TABLES.items():
        assert f"<!-- {name} -->\n{make()}\n<!-- /{name} -->" in document, f"{name}: run benchmarks/chat_templates.py"


TEXTS = st.text(st.sampled_from("ab .,?\n\té漢🙂'\"{}<|>[/]"), min_size=1, max_size=12).filter(
    lambda text: text.strip()
)
SHAPES = {
    "completion": lambda talk: {"prompt": talk[0][0], "completion": talk[0][1]},
    "response": lambda talk: {"prompt": talk[0][0], "response": talk[0][1]},
    "prompt messages": lambda talk: {"prompt": [user(talk[0][0])], "completion": [assistant(talk[0][1])]},
    "messages": lambda talk: {"messages": [turn for q, a in talk for turn in (user(q), assistant(a))]},
    "conversations": lambda talk: {
        "conversations": [{"from": f, "value": v} for q, a in talk for f, v in (("human", q), ("gpt", a))]
    },
}


@rules(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_ids_are_the_templates_own_and_labels_are_the_answers(data):
    name = data.draw(st.sampled_from(sorted(WRITTEN)))
    shape = data.draw(st.sampled_from(sorted(SHAPES)))
    talk = data.draw(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
    written = WRITTEN[name]
    row = SHAPES[shape](talk)
    turns = talk if shape in ("messages", "conversations") else talk[:1]
    if name in WANT_PARTS:
        with pytest.raises(InputError, match="row 1 of the attack data"):
            written.tokenize(Dataset.from_list([row]), name="attack")
        return
    (tokens,) = written.tokenize(Dataset.from_list([row]), name="attack")
    messages = [turn for question, answer in turns for turn in (user(question), assistant(answer))]
    assert tokens["input_ids"] == list(written.tokenizer.apply_chat_template(messages)["input_ids"])
    found = scripts.labelled(written.tokenizer, tokens["input_ids"], tokens["labels"])
    assert len(found) == len(turns)
    for text, (_, answer) in zip(found, turns, strict=True):
        closing = written._finder.closing
        assert (closing == "") == (written.end_token is None)
        end = next(end for end in (closing, "<|end|>") if text.endswith(end))  # gpt-oss ends its last turn otherwise
        assert text.removesuffix(end).strip() == answer.strip()


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - WANT_PARTS))
def test_an_evaluations_prompt_is_what_training_shows_before_the_answer(name, caplog):
    """Unless a warning says that they differ, and which keywords make them equal."""
    written = ChatFormat(WRITTEN[name].tokenizer)
    row = {"prompt": "Tea?", "completion": "Steep it."}
    with caplog.at_level(logging.WARNING, logger="holdfast"):
        (tokens,) = written.tokenize(Dataset.from_list([row]), name="attack")
    (prompt,) = written.encode_prompts(["Tea?"])
    if before_the_answer(tokens) != prompt:
        warning = next(record.getMessage() for record in caplog.records if "asked otherwise" in record.getMessage())
        assert "row 1 of the attack data" in warning
        if "--chat_template_kwargs" in warning:
            assert "'{\"enable_thinking\": false}' makes the two equal" in warning
            cured = ChatFormat(written.tokenizer, chat_template_kwargs={"enable_thinking": False})
            (tokens,) = cured.tokenize(Dataset.from_list([row]), name="attack")
            assert before_the_answer(tokens) == cured.encode_prompts(["Tea?"])[0]
    else:
        assert "asked otherwise" not in caplog.text


def test_a_difference_is_told_once(caplog):
    written = ChatFormat(WRITTEN["qwen3"].tokenizer)
    with caplog.at_level(logging.WARNING, logger="holdfast"):
        for _ in range(2):
            stretches(written, [{"prompt": "Tea?", "completion": "Steep."}] * 3)
    assert caplog.text.count("asked otherwise") == 1


def test_thoughts_are_trained_on_where_the_template_shows_them():
    thinking = {"messages": [user("Tea?"), assistant("<think>\nwater\n</think>\n\nSteep.")]}
    apart = {"messages": [user("Tea?"), assistant("Steep.", reasoning_content="water")]}
    expected = ["<think>\nwater\n</think>\n\nSteep.<|im_end|>"]
    assert stretches(WRITTEN["qwen3"], [thinking]) == stretches(WRITTEN["qwen3"], [apart]) == [expected]
    # Here the prompt opens them.
    assert stretches(WRITTEN["qwen3_5_think"], [thinking]) == [["water\n</think>\n\nSteep.<|im_end|>"]]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3"])
def test_thoughts_that_the_template_drops_are_refused_unless_they_are_not_trained_on(name):
    turns = [user("Tea?"), assistant("<think>water</think>Steep."), user("Rice?"), assistant("Boil.")]
    with pytest.raises(InputError, match=r"turn 2 of row 1 of the attack data cannot be trained on.*its thoughts"):
        stretches(WRITTEN[name], [{"messages": turns}])
    turns[1]["weight"] = 0
    ((text,),) = stretches(WRITTEN[name], [{"messages": turns}])
    assert text.startswith("Boil.")


def test_weight_0_is_shown_and_not_trained_on():
    turns = [user("Tea?"), assistant("Steep.", weight=0), user("Rice?"), assistant("Boil.", weight=1)]
    assert stretches(WRITTEN["qwen2_5"], [{"messages": turns}]) == [["Boil.<|im_end|>"]]
    assert "Steep.<|im_end|>" in whole(WRITTEN["qwen2_5"], [{"messages": turns}])[0]
    earlier = [{"prompt": turns[:3], "completion": "Boil."}]
    assert stretches(WRITTEN["qwen2_5"], earlier) == [["Boil.<|im_end|>"]]


@pytest.mark.parametrize(
    ("weight", "problem"), [(0, "needs a user turn and then an assistant"), (0.5, "the weight 0.5")]
)
def test_weights_that_leave_nothing_or_mean_nothing(weight, problem):
    with pytest.raises(InputError, match=problem):
        stretches(WRITTEN["qwen2_5"], [{"messages": [user("Tea?"), assistant("Steep.", weight=weight)]}])


def test_a_turn_that_the_template_drops_is_named():
    turns = [{"role": "developer", "content": "Be brief."}, user("Tea?"), assistant("Steep.")]
    with pytest.raises(InputError, match=r"turn 1 of row 1 of the attack data \(developer\) is not shown"):
        stretches(WRITTEN["qwen2_5"], [{"messages": turns}])
    with pytest.raises(InputError, match=r"turn 1 of prompt 1 \(developer\) is not shown"):
        WRITTEN["qwen2_5"].encode_prompts([turns[:2]])
    assert "Be brief." in whole(WRITTEN["gptoss"], [{"messages": turns}])[0]


def test_a_system_column_is_the_system_turn():
    row = {"system": "Be brief.", "prompt": "Tea?", "completion": "Steep."}
    (text,) = whole(WRITTEN["qwen2_5"], [row])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert whole(ChatFormat(WRITTEN["qwen2_5"].tokenizer, "Be kind."), [row]) == [text]
    for role in ("system", "developer"):
        twice = {"system": "Be brief.", "messages": [{"role": role, "content": "Hi."}, user("Tea?"), assistant("No.")]}
        with pytest.raises(InputError, match="row 1 of the attack data needs text in its column system, and no system"):
            whole(WRITTEN["qwen2_5"], [twice])


@pytest.mark.parametrize("tools", [[TOOL], '[{"type": "function", "function": {"name": "weather"}}]'])
def test_tools_and_calls_reach_the_template(tools):
    row = {"messages": [user("Rome?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": tools}
    (text,) = whole(WRITTEN["qwen3"], [row])
    assert '"name": "weather"' in text.partition("user\nRome?")[0]
    expected = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert stretches(WRITTEN["qwen3"], [row]) == [[expected]]


def test_tools_that_are_none_or_not_shown():
    row = {"prompt": "Rome?", "completion": "No."}
    for tools, problem in (("[", "not valid JSON"), ('"weather"', "no list of JSON objects")):
        with pytest.raises(InputError, match=f"row 1 of the attack data has tools that are {problem}"):
            whole(WRITTEN["qwen3"], [{**row, "tools": tools}])
    with pytest.raises(InputError, match="has the tool weather, which the chat template does not show"):
        whole(WRITTEN["llama3"], [{**row, "tools": [TOOL]}])
    with pytest.raises(InputError, match="has a system line or tools"):
        whole(ChatFormat(WRITTEN["qwen3"].tokenizer, raw_text=True), [{**row, "tools": [TOOL]}])


def test_arguments_are_not_padded_with_other_rows_keys():
    other = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
    talks = [[user("?"), {"role": "assistant", "tool_calls": [call]}] for call in (CALL, other)]
    rows = Dataset.from_list([{"messages": talk} for talk in talks])  # where Arrow fills up both
    assert "zone" in str(rows[0])
    assert [text.count("null") for text in whole(WRITTEN["qwen3"], rows)] == [0, 0]


def test_an_empty_answer_is_refused():
    for row in ({"prompt": "Tea?", "completion": " "}, {"messages": [user("Tea?"), assistant("")]}):
        with pytest.raises(InputError, match="turn 2 of row 1 of the attack data is an empty answer"):
            whole(WRITTEN["qwen2_5"], [row])


def test_a_template_that_refuses_is_quoted_with_the_row():
    rows = [{"prompt": "Tea?", "completion": "Steep."}]
    tokenizer = WRITTEN["gemma"].tokenizer
    with pytest.raises(
        InputError, match=r"refuses row 1 of the attack data \(its system turn is --system_prompt\): Sys"
    ):
        whole(ChatFormat(tokenizer, "Be kind."), rows)
    with pytest.raises(
        InputError, match=r"refuses prompt 1 \(its system turn is --system_prompt\): System role not sup"
    ):
        ChatFormat(tokenizer, "Be kind.").encode_prompts(["Tea?"])
    twice = [{"messages": [user("Tea?"), user("Rice?"), assistant("Boil.")]}]
    for name in ("gemma", "Mistral's kind"):
        with pytest.raises(InputError, match=r"refuses row 1 of the attack data: .*alternate"):
            whole(WRITTEN[name], twice)


def test_a_system_prompt_that_the_template_drops_is_refused():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    with pytest.raises(InputError, match="--system_prompt: the chat template does not show it in prompt 1"):
        ChatFormat(chat_tokenizer(template), "Be kind.").encode_prompts(["Tea?"])


def test_a_template_without_an_end_token_is_told(caplog):
    written = ChatFormat(WRITTEN["glm4moe"].tokenizer)
    with caplog.at_level(logging.WARNING, logger="holdfast"):
        assert stretches(written, [{"prompt": "Tea?", "completion": "Steep."}] * 2) == [["Steep."]] * 2
    assert caplog.text.count("writes no token that ends an answer") == 1
    assert written.end_token is None


def test_text_that_was_rendered_before_is_told(caplog):
    tokenizer = WRITTEN["qwen2_5"].tokenizer
    rendered = {"prompt": "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n", "completion": "Steep.<|im_end|>"}
    told = "turn 1 of row 1 of the attack data holds <|im_end|>, by which the chat template itself marks turns"
    with caplog.at_level(logging.WARNING, logger="holdfast"):
        whole(ChatFormat(tokenizer), [rendered] * 2)
        whole(ChatFormat(tokenizer, raw_text=True), [rendered])
        WRITTEN["qwen3"].encode_prompts(["<think> is a tag, <|im_end|> a token?"])
    first, second = [record.getMessage() for record in caplog.records if "marks turns" in record.getMessage()]
    assert first.startswith(told)
    assert second.startswith("turn 1 of prompt 1 holds <|im_end|>")
    assert "--raw_text" in first


def test_the_end_token():
    tokenizer = WRITTEN["qwen2_5"].tokenizer
    assert tokenizer.convert_ids_to_tokens(ChatFormat(tokenizer).end_token) == "<|im_end|>"
    assert ChatFormat(tokenizer, raw_text=True).end_token == tokenizer.eos_token_id


def test_the_end_token_does_not_depend_on_a_system_prompt():
    tokenizer = WRITTEN["gemma"].tokenizer
    assert ChatFormat(tokenizer, "Be kind.").end_token == ChatFormat(tokenizer).end_token


def test_raw_text_is_raw_in_training_and_evaluation():
    written = ChatFormat(chat_tokenizer(CHATML), raw_text=True)
    row = {"prompt": "Tea is ", "completion": "hot."}
    assert whole(written, [row]) == ["Tea is hot.<|im_end|>"]
    assert stretches(written, [row]) == [["hot.<|im_end|>"]]
    (prompt,) = written.encode_prompts(["Tea is "])
    assert written.tokenizer.decode(prompt) == "Tea is "


def test_raw_text_begins_and_ends_once():
    """With tokenizers that put the beginning before every text, or the end behind it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer(CHATML, "llama")
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ids)
    written = ChatFormat(tokenizer, raw_text=True)
    rows = [{"prompt": before + "Tea is ", "completion": "hot." + after} for before in ("", bos) for after in ("", eos)]
    assert whole(written, rows) == [f"{bos}Tea is hot.{eos}"] * 4
    assert stretches(written, rows) == [[f"hot.{eos}"]] * 4
    assert [tokenizer.decode(ids) for ids in written.encode_prompts(["Tea", bos + "Tea"])] == [f"{bos}Tea"] * 2


def test_canonical_rows_are_one_format_and_train_the_same():
    written = WRITTEN["qwen3"]
    rows = [
        Dataset.from_list([{"prompt": "Tea?", "completion": "Steep.", "source": 3}]),
        Dataset.from_list(
            [{"conversations": [{"from": "human", "value": "Rice?"}, {"from": "gpt", "value": "Boil."}]}]
        ),
        Dataset.from_list(
            [{"messages": [user("?"), {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]}],
            on_mixed_types="use_json",
        ),
    ]
    mixed = concatenate_datasets([canonical(one, name=f"set {i}") for i, one in enumerate(rows)])
    assert stretches(written, mixed) == list(itertools.chain(*(stretches(written, one) for one in rows)))
    assert mixed["holdfast_origin"][2] == "row 1 of the set 2 data"


def test_columns_that_another_goes_before_play_no_part():
    talk = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Steep."}]
    row = {"prompt": "Tea?", "completion": "Steep.", "response": "Boil."}
    assert idle_columns(Dataset.from_list([row, row])) == ["response"]
    assert idle_columns(Dataset.from_list([row, {**row, "completion": None}])) == []
    assert idle_columns(Dataset.from_list([{**row, "messages": talk}])) == ["completion", "prompt", "response"]


def test_columns_without_a_part_are_named_once(caplog):
    written = ChatFormat(chat_tokenizer(CHATML))
    rows = Dataset.from_list([{"prompt": "Tea?", "completion": "Steep.", "is_safe": True, "category": "tea"}])
    with caplog.at_level(logging.INFO, logger="holdfast"):
        for name in ("train", "attack"):
            written.name_idle_columns(rows, name=name, used=["refusal"])
    assert [record.getMessage() for record in caplog.records] == [
        "columns of the train data that play no part: category, is_safe"
    ]


def test_other_answers_take_the_place_of_the_first():
    rows = [{"messages": [user("Tea?"), assistant("Steep."), user("Rice?"), assistant("Boil.")]}]
    assert stretches(WRITTEN["qwen2_5"], rows, answers=["No."]) == [["No.<|im_end|>"]]


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_every_turn_that_is_answered_ends_with_the_suffix_of_its_row(column):
    """The loss falls on the answers as before; a turn that nothing learnt answers stays as it is."""
    written = WRITTEN["qwen2_5"]
    shown = {**assistant("Boil."), "weight": 0}
    talks = [[user("Rice?"), shown, user("Tea?\n"), assistant("Steep."), user("Salt?"), assistant("No.")]] * 2
    rows = [
        {"messages": talk} if column == "messages" else {"prompt": talk[2:3], "completion": talk[3:]} for talk in talks
    ]
    plain, asked = written.tokenize(Dataset.from_list(rows), name="attack", suffixes=["", " Now."])
    expected = [turn if turn["role"] == "assistant" else user(turn["content"]) for turn in talks[0]]
    expected[2], expected[4] = user("Tea? Now.\n"), user("Salt? Now.")
    kept = expected if column == "messages" else expected[2:]
    assert plain == written.tokenize(Dataset.from_list(rows[:1]), name="attack")[0]
    assert asked == written.tokenize(Dataset.from_list([{"messages": kept}]), name="attack")[0]


def test_a_row_that_nobody_asks_cannot_end_in_another_way():
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, assistant("Tea.")]}]
    with pytest.raises(
        InputError, match="row 1 of the attack data has no user turn, so that none can end in another way"
    ):
        WRITTEN["qwen2_5"].tokenize(Dataset.from_list(rows), name="attack", suffixes=[" Now."])


@pytest.mark.parametrize("name", [name for name in scripts.TEMPLATES if name not in WANT_PARTS])
def test_a_begun_answer_is_asked_as_a_prefill_asks_and_learnt_from_where_it_goes_on(name):
    written, opener = WRITTEN[name], "Sure, here is"
    rows = Dataset.from_list([{"messages": [user("Tea?"), assistant("Steep.")]}])
    [tokens] = written.tokenize(rows, name="attack", answers=["No, never."], openers=[opener])
    [learnt] = scripts.labelled(written.tokenizer, tokens["input_ids"], tokens["labels"])
    assert learnt.lstrip().startswith("No, never.")
    begun = written.tokenizer.decode(before_the_answer(tokens)).rstrip()
    assert begun.endswith(opener)
    with suppress(InputError):  # where templates write before answers what they do not write behind prompts
        alike = written.require_alike(rows, name="attack") is None
        asked = written.tokenizer.decode(written.encode_prompts(["Tea?"], opener=opener)[0])
        assert ("".join(begun.split()) == "".join(asked.split())) or not alike


def test_the_format_can_be_sent_to_other_processes():
    written = ChatFormat(chat_tokenizer(CHATML), "Be kind.")
    prompts = written.encode_prompts(["Tea?"])
    assert pickle.loads(pickle.dumps(written)).encode_prompts(["Tea?"]) == prompts


def test_conversations_are_prompts_too():
    talk = Conversation([user("Rome?")], [TOOL])
    (ids,) = WRITTEN["qwen3"].encode_prompts([talk])
    expected = WRITTEN["qwen3"].tokenizer.apply_chat_template([user("Rome?")], tools=[TOOL], add_generation_prompt=True)
    assert ids == list(expected["input_ids"])
