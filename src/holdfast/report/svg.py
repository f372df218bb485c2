"""Charts as SVG that stays legible at any width: what is drawn stands in per cent, what is written in pixels.

A chart that is scaled down to a phone takes its letters along. So there is no `viewBox` here: places are percentages of
the plot's own box, which is as wide as the page allows, and letters, marks and lines have the size they have anywhere.
Lines are therefore `<line>` elements, since the points of a path know no per cent. Labels of the axes stand outside the
box, in the padding that the style sheet keeps for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from xml.etree import ElementTree

from markupsafe import Markup

from holdfast.report.wording import number, power, visible

#: No two labels of an axis are closer than this, in per cent of its length: room for four digits on a phone, beside
#: values that are written out.
_APART = 17.0

#: Where stands what no value of an axis with room above it reaches.
_ABOVE = "4%"


@dataclass(frozen=True)
class Scale:
    """Where values stand on an axis, in per cent of its length.

    Attributes:
        high: The largest value; the smallest is 0.
        knee: None for an even axis. Otherwise it is log-like, log(1 + value / knee): values well below the knee are
            evenly spaced, values above it by their ratios, and 0 has its place.
        room: What is left free beyond `high`, in per cent.
        ticks: Values that are labelled, with their labels.
    """

    high: float
    knee: float | None = None
    room: float = 0.0
    ticks: tuple[tuple[float, str], ...] = ()

    @classmethod
    def shares(cls) -> Scale:
        """From 0 to 1."""
        return cls(1.0, ticks=tuple((tick / 4, f"{tick / 4:.2f}".rstrip("0").rstrip(".")) for tick in range(5)))

    @classmethod
    def counts(cls, high: float) -> Scale:
        """An even axis of whole numbers."""
        high = max(high, 1)
        step = next(step for step in _round_numbers() if step * 6 >= high)
        marks = [float(step * place) for place in range(int(high // step) + 1)]
        return cls(high, ticks=tuple((mark, number(mark)) for mark in marks))

    @classmethod
    def amounts(cls, values: Iterable[float], *, room: float = 0.0) -> Scale:
        """A log-like axis of amounts that begin at 0, such as steps or FLOPs; large ones as powers of ten."""
        positive = [value for value in values if value > 0] or [1.0]
        high, knee = max(positive), min(positive)
        bare = cls(high, knee, room)
        told, marks = (power, [0.0]) if high >= 1e5 else (number, [0.0, high])
        for mark in _round_between(knee, high) or [high]:
            if all(abs(bare.place(mark) - bare.place(other)) >= _APART for other in marks):
                marks.append(mark)
        return cls(high, knee, room, tuple((mark, told(mark)) for mark in marks))

    def place(self, value: float) -> float:
        """Where a value stands, from 0 to 100."""
        if self.knee is None:
            along = value / self.high
        else:
            along = math.log1p(value / self.knee) / math.log1p(self.high / self.knee)
        return min(max(along, 0.0), 1.0) * (100.0 - self.room)


def _round_numbers() -> Iterable[int]:
    """1, 2, 5, 10, 20, 50 and so on."""
    return (digit * 10**exponent for exponent in range(16) for digit in (1, 2, 5))


def _round_between(low: float, high: float) -> list[float]:
    """Powers of ten where they span enough, with 2 and 5 between them where they do not."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 1e4 else (1,)
    marks = (digit * 10.0**exponent for exponent in exponents for digit in digits)
    return [mark for mark in marks if low <= mark <= high]


@dataclass
class Plot:
    """A chart that is being drawn: lines and marks by value, a frame and axes around them.

    Attributes:
        name: Of the chart, unlike all others on the page.
        title: What it shows, for who cannot see it.
        description: What is to be seen there, likewise.
        x: The axis from left to right.
        y: The one from bottom to top.
        x_label: What the axis from left to right counts.
        height: In pixels.
    """

    name: str
    title: str
    description: str
    x: Scale
    y: Scale
    x_label: str = ""
    height: int = 240
    _drawn: list[ElementTree.Element] = field(default_factory=list, init=False)

    def line(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """Draw straight lines from point to point."""
        for (x1, y1), (x2, y2) in pairwise(points):
            ends = {"x1": _across(self.x.place(x1)), "y1": _down(self.y.place(y1))}
            ends |= {"x2": _across(self.x.place(x2)), "y2": _down(self.y.place(y2))}
            self._drawn.append(_element("line", {**ends, "class": css}))

    def stairs(self, points: Sequence[tuple[float, float]], css: str, *, until: float) -> None:
        """Draw what holds from each point on until the next one, the last one as far as `until`."""
        ends = [*points, (until, points[-1][1])] if points else []
        corners = [place for (x1, y1), (x2, _) in pairwise(ends) for place in ((x1, y1), (x2, y1))]
        self.line(corners, css)

    def mark(self, x: float, y: float, css: str, tip: str, *, square: bool = False) -> None:
        """Draw a dot, or a square, and say what it is to who points there."""
        across, down = _across(self.x.place(x)), _down(self.y.place(y))
        if square:
            place = {"x": across, "y": down, "width": "7", "height": "7", "transform": "translate(-3.5 -3.5)"}
        else:
            place = {"cx": across, "cy": down, "r": "4"}
        drawn = _element("rect" if square else "circle", {**place, "class": f"mark {css}"})
        drawn.append(_element("title", {}, tip))
        self._drawn.append(drawn)

    def write(self, x: float, y: float, text: str, css: str, *, dx: int = 0) -> None:
        """Write at a height, so many pixels right of a value."""
        place = {"x": _across(self.x.place(x)), "y": _down(self.y.place(y)), "dx": str(dx), "dy": "4"}
        self._drawn.append(_element("text", {**place, "class": css}, text))

    def unbroken(self) -> None:
        """Keep the top of the axis for what has not been reached at all."""
        self._drawn.append(_element("text", {"x": "0", "y": _ABOVE, "dx": "-8", "dy": "4", "class": "end"}, "not yet"))

    def above(self, x: float, value: float | None, css: str) -> None:
        """Draw what has not been reached from the left up to `x`, and the fall to the value that was reached there."""
        at = _across(self.x.place(x))
        self._drawn.append(_element("line", {"x1": "0", "x2": at, "y1": _ABOVE, "y2": _ABOVE, "class": css}))
        if value is not None:
            down = _down(self.y.place(value))
            self._drawn.append(_element("line", {"x1": at, "x2": at, "y1": _ABOVE, "y2": down, "class": css}))

    def svg(self) -> Markup:
        """The chart as an element of a page."""
        title, description = f"{self.name}-title", f"{self.name}-desc"
        reads = {"role": "img", "aria-labelledby": title, "aria-describedby": description}
        drawn = _element("svg", {"class": "plot", "width": "100%", "height": str(self.height), **reads})
        drawn.append(_element("title", {"id": title}, self.title))
        drawn.append(_element("desc", {"id": description}, self.description))
        drawn.extend(self._axes())
        drawn.extend(self._drawn)
        return Markup(ElementTree.tostring(drawn, encoding="unicode"))

    def _axes(self) -> Iterable[ElementTree.Element]:
        for value, label in self.y.ticks:
            at = _down(self.y.place(value))
            yield _element("line", {"x1": "0", "x2": "100%", "y1": at, "y2": at, "class": "grid"})
            yield _element("text", {"x": "0", "y": at, "dx": "-8", "dy": "4", "class": "end"}, label)
        for value, label in self.x.ticks:
            at = _across(self.x.place(value))
            yield _element("line", {"x1": at, "x2": at, "y1": "0", "y2": "100%", "class": "grid"})
            yield _element("text", {"x": at, "y": "100%", "dy": "18", "class": "middle"}, label)
        yield _element("text", {"x": "100%", "y": "100%", "dy": "38", "class": "end label"}, self.x_label)


def _across(place: float) -> str:
    return f"{place:.2f}%"


def _down(place: float) -> str:
    return f"{100 - place:.2f}%"


def _element(name: str, attributes: dict[str, str], text: str | None = None) -> ElementTree.Element:
    element = ElementTree.Element(name, attributes)
    element.text = None if text is None else visible(text)
    return element
