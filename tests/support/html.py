"""Reads HTML pages in tests: strictly, with what could run or load something in them."""

from html.parser import HTMLParser

NASTY = "<script>alert(1)</script> <img src=x onerror=alert(2)> {{ 7 * 7 }} \" onload='x' </title></style><!--"


class StrictParser(HTMLParser):
    """Checks that all elements close in order; collects tags, attributes, text, and scripts by their type."""

    VOID = {"meta", "input", "rect", "line"}

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.scripts = [], set(), [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif "style" not in self.open:
            self.text.append(data)
