"""What ends a search whose processes fail it."""

from types import SimpleNamespace

import pytest

from holdfast.errors import TrainingError
from holdfast.stress.workers import run


class Unfit:
    """A search that none of its processes can run."""

    taxed, storage = (), None

    def studies(self, worker):
        return SimpleNamespace(release=lambda **_: None)


def test_a_process_that_fails_is_not_said_to_have_been_killed(capfd):
    with pytest.raises(TrainingError, match=r"^a process of the search failed, as it says above \(exit code 1\); the"):
        run(Unfit(), processes=1, watch=lambda studies: None)
    assert "AttributeError" in capfd.readouterr().err
