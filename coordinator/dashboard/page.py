"""The page itself: empty, until its script hears of the run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

PARTS_BEFORE = ("tiles", "runs", "waiting")
PARTS_AFTER = ("nodes", "links", "events", "samples", "options", "config")


def page(feed: str, path: str, links: Sequence[tuple[str, str]]) -> str:
    """A page that shows a feed.

    Args:
        feed: its name.
        path: of this page.
        links: other pages and their titles; none where this is the only one.
    """
    items = "".join(
        f'<li><a href="{escape(where)}"{" aria-current=page" if where == path else ""}>{escape(title)}</a></li>'
        for where, title in links
    )
    pages = f"<nav aria-label=Runs><ul>{items}</ul></nav>" if links else ""
    before, after = (_parts(names) for names in (PARTS_BEFORE, PARTS_AFTER))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>mlx-tandem</title>'
        '<link rel="stylesheet" href="/assets/report.css"><link rel="stylesheet" href="/assets/dashboard.css">'
        '<script src="/assets/chart.js" defer></script><script src="/assets/dashboard.js" defer></script></head>\n'
        f'<body data-feed="{escape(feed)}"><a class=skip href="#main">Skip to the curves</a>{pages}'
        "<header><p class=kind>Training run</p>"
        "<h1><span id=title>mlx-tandem</span> <span class=pill id=status hidden></span></h1>"
        "<p id=live role=status>connecting …</p><progress id=progress hidden></progress></header>"
        f"<main id=main tabindex=-1>{before}"
        "<section class=charts id=charts hidden><h2 class=unseen>Curves</h2></section>"
        f"{after}<noscript><section><p>This page needs JavaScript; report.html in the run's folder, which is written"
        " at the end of the run, needs none.</p></section></noscript></main></body></html>\n"
    )


def _parts(names: Sequence[str]) -> str:
    return "".join(f"<div data-part={name}></div>" for name in names)
