"""An HTML page as the standard library's parser reads it, with what is wrong about its structure."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = frozenset(("meta", "link", "br", "img", "input", "hr", "base", "col"))


class Page(HTMLParser):
    """Reads a page; what closes has to be what was opened last.

    Attributes:
        elements: Names and attributes of all elements, in order.
        text: By element, what stands in it outright.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute stands twice: <{tag} {names}>"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text.append((self._open[-1], data))

    def named(self, *tags: str) -> list[dict[str, str]]:
        """The attributes of all elements of these names."""
        return [attributes for tag, attributes in self.elements if tag in tags]

    def texts(self, tag: str) -> list[str]:
        """What stands in elements of a name."""
        return [text for owner, text in self.text if owner == tag]
