"""Scales put values where they belong, whatever they are."""

import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.report.svg import Plot, Scale

amounts = st.lists(st.just(0.0) | st.floats(1e-6, 1e20), max_size=8)


@settings(deadline=None)
@given(amounts, st.floats(0, 20))
def test_amounts_keep_their_order_and_stay_inside(values: list[float], room: float) -> None:
    scale = Scale.amounts(values, room=room)
    places = [scale.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)
    assert scale.place(0) == 0
    assert scale.place(max(values, default=1) or 1) == 100 - room or max(values, default=0) == 0


@settings(deadline=None)
@given(amounts)
def test_labels_of_amounts_keep_apart(values: list[float]) -> None:
    scale = Scale.amounts(values)
    places = sorted(scale.place(value) for value, _ in scale.ticks)
    assert places[0] == 0
    assert all(after - before >= 17 for before, after in pairwise(places))
    assert len({label for _, label in scale.ticks}) == len(scale.ticks)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_counts_are_labelled_at_round_numbers(high: int) -> None:
    ticks = Scale.counts(high).ticks
    assert 1 <= len(ticks) <= 7
    assert all(re.fullmatch(r"0|[125]0*|\d+", label.replace("\u202f", "")) for _, label in ticks)


def test_a_line_holds_its_value_until_the_next_point() -> None:
    plot = Plot("p", "title", "description", Scale(10), Scale(1))
    plot.stairs([(0, 0.2), (5, 1)], "line", until=10)
    lines = re.findall(r'x1="([\d.]+)%" y1="([\d.]+)%" x2="([\d.]+)%" y2="([\d.]+)%"', plot.svg())
    places = [tuple(map(float, line)) for line in lines]
    assert places == [(0, 80, 50, 80), (50, 80, 50, 0), (50, 0, 100, 0)]


def test_nothing_to_draw_is_drawn() -> None:
    plot = Plot("p", "a < b & c", "\x00", Scale.amounts([]), Scale.counts(0))
    plot.stairs([], "line", until=1)
    svg = plot.svg()
    assert "a &lt; b &amp; c" in svg
    assert "⟨U+0000⟩" in svg
