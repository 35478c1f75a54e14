"""HTML pieces of pages: sections, figures, tables, and the page itself.

Arguments named html are already escaped.
"""

import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from string import Template

from pipelines.report.charts import HEAT_BINS, escape

_TAG = re.compile("<[^>]*>")
NAMED_LINES = 8
"""Up to this many tasks every line of a chart has its own colour and label."""


def page(title: str, html: Sequence[str]) -> str:
    """A whole page of these parts, one below the other."""
    template = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(title), body="\n".join(html), base_css=base_css(),
        categorical="\n".join(f".l-{i} {{ stroke: var(--c{i}); }} .l-{i}-f, .l-{i}-t "
                              f"{{ fill: var(--c{i}); }}" for i in range(NAMED_LINES)),
        heat_classes="\n".join(f".h{i} {{ fill: var(--h{i}); }} .t{i} "
                               f"{{ fill: var(--{'lo' if i <= 5 else 'hi'}); }}"
                               for i in range(HEAT_BINS)))


def base_css() -> str:
    """The style that every page has: palette of light and dark mode, body, headings, tables."""
    return Path(__file__).with_name("base.css").read_text(encoding="utf-8")


def section(title: str, lead: str, *html: str, paper: bool = True) -> str:
    """A part of the page: title and lead are plain text, the rest is HTML.

    paper: whether it is printed, too.
    """
    css = "" if paper else ' class="aside"'
    return (f"<section{css}><h2>{escape(title)}</h2><p>{escape(lead)}</p>"
            + "".join(part for part in html if part) + "</section>")


def pair(*html: str) -> str:
    """Side by side on a desktop, one below the other on a phone."""
    return f'<div class="pair">{"".join(html)}</div>'


def figure(title: str, html: str, caption: str) -> str:
    """A drawing with title and caption."""
    return (f"<figure><h3>{escape(title)}</h3>{html}"
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def key(*entries: tuple[str, str]) -> str:
    """A colour key: (CSS variable, name)."""
    return '<ul class="key">' + "".join(
        f'<li><i style="background:var({colour})"></i>{escape(name)}</li>'
        for colour, name in entries) + "</ul>"


def data_table(heads: Sequence[str], rows: Sequence[Sequence[str]], css: str = "") -> str:
    """A table; heads and cells are HTML, the first column is the row's header.

    With css "stack" every row becomes a block on a phone: its header, then a line for each cell
    with the name of its column. With "stack broad", for many columns, on a tablet too.
    """
    names = [""] * len(heads) if "stack" not in css else [
        f' data-label="{escape(unescape(_TAG.sub("", head)))}"' for head in heads]
    css = f' class="{css}"' if css else ""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>'
                   + "".join(f"<td{name}>{cell}</td>" for name, cell in
                             zip(names[1:], row[1:], strict=True)) + "</tr>" for row in rows)
    return f"<table{css}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts_list(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns; both plain text."""
    return '<dl class="facts">' + "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows) + "</dl>"
