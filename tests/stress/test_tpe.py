"""What TPE asks for hangs on its name and on what was found alone, and chance gives way to what was found."""

from dataclasses import dataclass, field

import pytest
from optuna.distributions import FloatDistribution

from holdfast.stress.tpe import ask


@dataclass
class Line:
    """One number; settings below 0 lie outside of what is searched."""

    ranges: dict = field(default_factory=lambda: {"x": FloatDistribution(0, 1)})

    def setting(self, params):
        return {"line": params["x"]}

    def params(self, setting):
        return None if setting["line"] < 0 else {"x": setting["line"]}


def tried(*places):
    return [({"line": place}, abs(place - 0.8)) for place in places]


def test_the_same_name_and_findings_ask_for_the_same():
    before = tried(0.1, 0.5, 0.9)
    assert ask(Line(), before, "one", 4) == ask(Line(), before, "one", 4)
    assert ask(Line(), before, "one", 4) != ask(Line(), before, "two", 4)
    assert len({found["line"] for found in ask(Line(), [], "one", 4)}) == 4


def test_what_lies_outside_tells_nothing():
    assert ask(Line(), tried(-1, -2), "one", 4) == ask(Line(), [], "one", 4)


@pytest.mark.parametrize(("startup", "learns"), [(5, True), (100, False)])
def test_from_so_many_settings_on_it_looks_where_the_best_were(startup, learns):
    before = tried(*(place / 20 for place in range(20)))
    asked = [found["line"] for name in "abcde" for found in ask(Line(), before, name, 4, startup=startup)]
    near = sum(abs(place - 0.8) < 0.2 for place in asked)
    assert (near > 14) == learns
