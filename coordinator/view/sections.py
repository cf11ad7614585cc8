"""The parts of a report that are text: summary, samples, commands, timeline, configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

from coordinator.view.format import bits_text, duration_text, finite, shortened, size_text, speed_text
from coordinator.view.records import NodeRecord

MOST_EVENTS = 400
MOST_SAMPLES = 60
SHOWN_SAMPLES = 3
TEXT_CHARACTERS = 4000
NODE_HEADINGS = ("rows", "steps", "last step", "tokens/s", "compute per step", "wait per step", "peak memory")


def summary_html(summary: Mapping[str, str]) -> str:
    """Labelled lines."""
    rows = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(str(text))}</dd></div>" for label, text in summary.items()
    )
    return f"<section aria-label=Summary><dl class=facts>{rows}</dl></section>" if rows else ""


def tiles_html(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Key figures: label, value, remark."""
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for label, value, remark in tiles
    )
    return f"<dl class=tiles>{items}</dl>" if items else ""


def nodes_html(nodes: Mapping[str, NodeRecord]) -> str:
    """One line per machine of several: its share, its speed, how long it computed and waited."""
    if len(nodes) < 2:
        return ""
    all_rows = sum(sum(node.rows) for node in nodes.values()) or 1.0
    head = "".join(f"<th scope=col>{heading}</th>" for heading in NODE_HEADINGS)
    lines = []
    for name, node in nodes.items():
        speed = node.positions / node.compute_seconds if node.compute_seconds > 0 else None
        values = (
            f"{100 * sum(node.rows) / all_rows:.0f} %",
            f"{node.steps:,}",
            f"{node.last_step:,}",
            speed_text(speed),
            duration_text(node.compute_seconds / max(node.steps, 1)),
            duration_text(node.wait_seconds / max(node.steps, 1)),
            size_text(node.peak_memory_bytes or None),
        )
        cells = "".join(f"<td>{value}</td>" for value in values)
        lines.append(f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>")
    table = f"<table><thead><tr><th scope=col>machine</th>{head}</tr></thead>{''.join(lines)}</table>"
    remark = "<p class=remark>Tokens are input tokens, padding included, per second of computing.</p>"
    box = "<div class='scroll tall' tabindex=0 role=region aria-label=Machines>"
    return f"<section class=nodes><h2>Machines</h2>{box}{table}</div>{remark}</section>"


def links_html(events: Sequence[Mapping[str, Any]]) -> str:
    """How fast the machines reach each other, as it was last measured."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for event in events:
        links = event.get("links")
        for link in links if isinstance(links, list) else []:
            if isinstance(link, Mapping):
                one, other = sorted((str(link.get("one", "")), str(link.get("other", ""))))
                found[one, other] = link
    if not found:
        return ""
    head = "".join(f"<th scope=col>{heading}</th>" for heading in ("speed", "round trip", "measured"))
    lines = "".join(_link(pair, link) for pair, link in sorted(found.items()))
    table = f"<table><thead><tr><th scope=col>between</th>{head}</tr></thead>{lines}</table>"
    box = "<div class='scroll tall' tabindex=0 role=region aria-label=Links>"
    return f"<section class=links><h2>Links</h2>{box}{table}</div></section>"


def _link(pair: tuple[str, str], link: Mapping[str, Any]) -> str:
    bits, latency = finite(link.get("bits_per_second")) or 0.0, finite(link.get("latency_seconds")) or 0.0
    speed = bits_text(bits) if bits > 0 else "not reached"
    delay = f"{2000 * latency:.1f} ms" if bits > 0 else ""  # people know there and back, as of ping
    cells = f"<td>{speed}</td><td>{delay}</td><td>{escape(str(link.get('text', '')))}</td>"
    return f"<tr><th scope=row>{escape(' ↔ '.join(pair))}</th>{cells}</tr>"


def commands_html(commands: Sequence[tuple[str, str]]) -> str:
    """Commands, each with its purpose."""
    items = "".join(
        f"<p>{escape(purpose)}</p><div class=command><pre><code>{escape(command)}</code></pre></div>"
        for purpose, command in commands
    )
    return f"<section><h2>What to type next</h2>{items}</section>" if items else ""


def samples_html(samples: Sequence[Mapping[str, Any]]) -> str:
    """Generated texts by prompt, the newest first; all but the first few folded away."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples[-MOST_SAMPLES:]:
        by_prompt.setdefault(str(sample.get("prompt", "")), []).append(sample)
    cards = []
    for prompt, texts in by_prompt.items():
        rows = [_sample(text) for text in reversed(texts)]
        older = "".join(rows[SHOWN_SAMPLES:])
        count = len(rows) - SHOWN_SAMPLES
        folded = f"<details><summary>{count} earlier</summary>{older}</details>" if older else ""
        cards.append(f"<article><h3>{escape(prompt)}</h3>{''.join(rows[:SHOWN_SAMPLES])}{folded}</article>")
    return f"<section class=samples><h2>Samples</h2>{''.join(cards)}</section>" if cards else ""


def timeline_html(events: Sequence[Mapping[str, Any]], *, newest_first: bool = False) -> str:
    """What happened, and when since the beginning."""
    if not events:
        return ""
    kept = _most_telling(events)
    times = [time for event in events if (time := finite(event.get("time"))) is not None]
    began = min(times, default=0.0)
    start = _moment(began)
    when = f"<p class=quiet>Times count from {start:%Y-%m-%d %H:%M:%S %Z}.</p>" if times and start else ""
    left_out = len(events) - len(kept)
    more = f"<p class=remark>{left_out:,} more are in events.jsonl.</p>" if left_out else ""
    items = "".join(_event(event, began) for event in (reversed(kept) if newest_first else kept))
    box = "<div class='scroll tall' tabindex=0 role=region aria-label=Events>"
    return f"<section><h2>Events</h2>{when}{box}<ol class=timeline>{items}</ol></div>{more}</section>"


def config_html(config: Mapping[str, Any]) -> str:
    """Every option with its value."""
    rows = "".join(
        f"<div><dt>{escape(key)}</dt><dd{' class=quiet' if value is None else ''}>{escape(_option(value))}</dd></div>"
        for key, value in _flat(config)
    )
    return f"<section><h2>Configuration</h2><dl class=options>{rows}</dl></section>" if rows else ""


def _sample(sample: Mapping[str, Any]) -> str:
    step = finite(sample.get("step"))
    label = f"step {step:,.0f}" if step is not None else ""
    text = shortened(str(sample.get("text", "")), TEXT_CHARACTERS)
    return f"<div class=sample><span class=step>{label}</span><p dir=auto>{escape(text) or '<i>nothing</i>'}</p></div>"


def _event(event: Mapping[str, Any], began: float) -> str:
    level = str(event.get("level", "info"))
    time = finite(event.get("time"))
    moment = _moment(time) if time is not None else None
    shown = f"+{duration_text(time - began)}" if time is not None else ""
    stamp = (
        f'<time datetime="{moment.isoformat()}" title="{moment:%Y-%m-%d %H:%M:%S}">{shown}</time>' if moment else shown
    )
    kind = escape(str(event.get("kind", "")).replace("_", " "))
    style = level if level in {"warning", "error"} else "info"
    word = f"<b>{escape(level)}</b> " if style != "info" else ""
    message = escape(shortened(str(event.get("message", "")), TEXT_CHARACTERS))
    return f"<li class={style}>{stamp}<span class=what>{kind}</span><span>{word}{message}</span></li>"


def _most_telling(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All events, or where there are too many: warnings and errors before the rest, the newest before the oldest."""
    if len(events) <= MOST_EVENTS:
        return list(events)
    plain = [i for i, event in enumerate(events) if event.get("level", "info") == "info"]
    telling = [i for i, event in enumerate(events) if event.get("level", "info") != "info"][-MOST_EVENTS:]
    room = MOST_EVENTS - len(telling)
    return [events[i] for i in sorted([*telling, *(plain[-room:] if room else [])])]


def _moment(time: float) -> datetime | None:
    try:
        return datetime.fromtimestamp(time).astimezone()
    except (OverflowError, OSError, ValueError):
        return None


def _flat(config: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _option(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False, default=str)
