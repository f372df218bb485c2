"""What is said of data that cannot be read."""

import pytest

from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.errors import InputError


def refused(source, columns=TRAIN_COLUMNS):
    """The one sentence with which a source is refused, which names the flag."""
    with pytest.raises(InputError) as caught:
        load_rows(source, flag="--train_data", columns=columns)
    message = str(caught.value)
    assert "--train_data" in message
    assert "\n" not in message
    return message
