"""Judging by a real server on loopback, `transformers serve`, from start to end.

`make test-services` runs these; they need transformers' extra `serving`.
"""

from collections.abc import Iterator

import pytest

from helpers import one_word_model
from holdfast.evaluation.judges import JudgeSettings, make_judge
from model_server import PATIENCE, serving_models

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A chat model that says 4 and nothing else."""
    template = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
    return one_word_model(tmp_path_factory.mktemp("model"), "4", template=template)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_models(tmp_path_factory.mktemp("server") / "log.txt") as address:
        yield address


def settings(model, url, **more):
    return JudgeSettings("rubric", model=model, url=url, timeout=PATIENCE, max_tokens=3, **more)


def test_a_real_server_judges_by_a_pattern(model, url):
    judge = make_judge(settings(model, url, pattern=r"\b([1-5])\b"))
    found = judge.verdicts(["How ?"] * 3, ["a", "b", "a"], [None] * 3)
    assert [verdict.grade for verdict in found] == [4, 4, 4]
    usage = judge.record["usage"]
    assert usage["asked_now"] == 2
    assert usage["prompt_tokens"] > usage["completion_tokens"] > 0
    assert judge.record["request"] == {"temperature": 0, "max_tokens": 3}


def test_what_a_real_server_says_without_the_form_stays_unjudged(model, url):
    """It takes the schema of a reply, and pays no heed to it."""
    judge = make_judge(settings(model, url))
    [found] = judge.verdicts(["How ?"], ["a"], [None])
    assert (found.grade, found.unjudged) == (None, "no grade in what the judge said")
    assert set(found.said.split()) == {"4"}


def test_a_model_that_a_real_server_does_not_have_leaves_answers_unjudged(url, tmp_path):
    """After such an error it hangs up without a word, which the client takes for a failed connection."""
    judge = make_judge(settings(str(tmp_path / "none"), url, retries=2))
    [found] = judge.verdicts(["How ?"], ["a"], [None])
    assert found.unjudged.startswith("the server gives no verdict (Error code: 500")
