"""Pieces of HTML that a page is made of: tables, pictures as SVG, and the page around them.

A page is one file without a request to any network, for light and dark screens, wide and narrow ones.
"""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # what pictures are drawn in; the page's own colour in its place
FONT = 9


def document(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """The page: under `title` (text) the sections, each a heading (text, may be empty) and its HTML; empty ones are
    left out."""
    body = "\n".join(
        f"<section>{f'<h2>{escape(heading)}</h2>' if heading else ''}\n{html}\n</section>"
        for heading, html in sections
        if html
    )
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)


def emphasised(text: str, stars: int, tag: str) -> str:
    """`text` as HTML; what stands between so many asterisks in a `tag`."""
    return re.sub(rf"\*{{{stars}}}(.+?)\*{{{stars}}}", rf"<{tag}>\1</{tag}>", escape(text))


def table(
    names: Sequence[str],
    rows: Sequence[Sequence[str | None]],
    text: tuple[int, ...] = (0,),
    shown: Callable[[str], str] = escape,
) -> str:
    """A table: columns `text` to the left, the others (numbers) to the right; `shown` makes HTML of a cell's text."""

    def cells(tag, row):
        parts = (f"<{tag}{' class=t' * (n in text)}>{shown(cell or '')}" for n, cell in enumerate(row))
        return "<tr>" + "".join(parts)

    lines = [cells("th", names), *(cells("td", row) for row in rows)]
    return "<div class=wide><table>\n" + "\n".join(lines) + "\n</table></div>"


def folded(summary: str, html: str) -> str:
    """`html` that is seen once its summary (text) is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def side_by_side(parts: Sequence[str]) -> str:
    """`parts` in a row, below each other on a narrow screen; nothing of nothing."""
    return f"<div class=row>{''.join(parts)}</div>" if parts else ""


def picture(draw: Callable[["Axes"], None], width: float, height: float, words: str) -> str:
    """An SVG, in inches, in the page's ink; `words` say what it shows, in each picture of a page others."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = {f"{part}.color": INK for part in ("text", "xtick", "ytick")} | {
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
    }
    style = {"svg.fonttype": "none", "svg.hashsalt": words, "font.size": FONT, "font.family": "sans-serif"}
    with matplotlib.rc_context(ink | style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        draw(axis)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg[svg.index("<svg") :], count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(INK, "currentColor")
    return f'<figure role=img aria-label="{escape(words)}" style="max-width:{96 * width:.0f}px">{svg}</figure>'


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: #1b1b1b;
  background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 0 0 .3rem; }
.answer { font-size: 1.15rem; border-left: .3rem solid #1f77b4; padding-left: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #8884; } th { vertical-align: bottom; }
td { white-space: nowrap; } td.t { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
td.t:first-child { min-width: 9rem; }
.t { text-align: left; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } .row > div { flex: 0 1 22rem; min-width: 0; }
figure { margin: .5rem 0; flex: 1 1 16rem; }
svg { width: 100%; height: auto; } svg image { image-rendering: pixelated; }
pre { overflow-x: auto; font-size: .8rem; } pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #161616; } }
"""

_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
