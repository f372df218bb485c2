"""What `--chat_template_path` gives a tokenizer."""

import pytest

from helpers import chat_tokenizer
from holdfast.data.templates import adopt_chat_template
from holdfast.errors import InputError

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize("suffix", ["jinja", "j2"])
def test_the_template_of_a_file_is_adopted(tmp_path, suffix):
    tokenizer = chat_tokenizer(None)
    (tmp_path / f"template.{suffix}").write_text(TEMPLATE)
    adopt_chat_template(tokenizer, str(tmp_path / f"template.{suffix}"))
    assert tokenizer.chat_template == TEMPLATE
    adopt_chat_template(tokenizer, None)
    assert tokenizer.chat_template == TEMPLATE


def test_a_template_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--chat_template_path .*none\.jinja gives no chat template"):
        adopt_chat_template(chat_tokenizer(None), str(tmp_path / "none.jinja"))
