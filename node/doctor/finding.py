"""A verdict on one thing, what it rests on, and what mends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from node.info import NodeInfo

# From good to bad. What cannot be known is no good news.
Verdict = Literal["ok", "unknown", "warning", "wrong"]
Outcome = Literal["silent", "answers", "refuses", "denied", "failed", "untried"]
"""Of a connection: nothing came back; somebody listens; the machine is there and says no; the system of the machine
that asked said no at once (no route, not permitted); something else; it was none that the caller may have tried."""
REACHED: tuple[Outcome, ...] = ("answers", "refuses")
"""Both came back over the network."""


@dataclass(frozen=True)
class Finding:
    """What was found out about one thing.

    Attributes:
        check: what was looked at, as a short word: ``disk``.
        verdict: what follows; ``unknown`` where it could not be found out.
        seen: the facts, on one line.
        mend: the command or the place in System Settings that mends it; "" where nothing is to be mended.
    """

    check: str
    verdict: Verdict
    seen: str
    mend: str = ""


@dataclass(frozen=True)
class Reached:
    """What came of a connection to an address.

    Attributes:
        address: ``ip:port``.
        outcome: what came of it.
        reason: in words, or "".
    """

    address: str
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What a machine has found out about itself.

    Attributes:
        info: the node as it is.
        findings: on this machine alone.
        reached: what came of its connections, to the addresses that were given first.
        heard: ids of nodes whose Bonjour adverts it heard, its own apart.
        bonjour: whether it may hear any.
        received, replied: by its own clock, in seconds since 1970.
    """

    info: NodeInfo
    findings: tuple[Finding, ...]
    reached: tuple[Reached, ...] = ()
    heard: tuple[str, ...] = ()
    bonjour: bool = True
    received: float = 0.0
    replied: float = 0.0


@dataclass(frozen=True)
class Wanted:
    """What a diagnosis is to try on the network.

    Attributes:
        reach: ``ip:port`` to connect to.
        expect: ids of nodes that it should hear by Bonjour; when it has, it listens no longer.
    """

    reach: tuple[str, ...] = field(default=())
    expect: tuple[str, ...] = field(default=())


def worst(findings: Iterable[Finding]) -> Verdict:
    """The worst verdict of all; ``ok`` of none."""
    order = get_args(Verdict)
    found: Verdict = max((finding.verdict for finding in findings), key=order.index, default="ok")
    return found
