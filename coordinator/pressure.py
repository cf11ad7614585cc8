"""What the condition of a member's machine means for its share of the work, and how people are told.

The share is made for a part of the member's measured pace. Heat shows in the measured pace as well; the factor comes
first, so that a machine gets less before it must slow down. Of memory and heat the worse one counts.
"""

from __future__ import annotations

from coordinator.pace import Pace
from node.events import Condition
from node.info import MemoryLevel, ThermalLevel

MEMORY_FACTORS: dict[MemoryLevel, float] = {"warn": 0.75, "critical": 0.4}
HEAT_FACTORS: dict[ThermalLevel, float] = {"fair": 0.9, "serious": 0.75, "critical": 0.5}
MEMORY_WORDS: dict[MemoryLevel, str] = {"warn": "yellow", "critical": "red"}
HEAT_WORDS: dict[ThermalLevel, str] = {"fair": "warm", "serious": "hot", "critical": "very hot"}


def share_factor(condition: Condition) -> float:
    """The part of its pace, above 0 to 1, that a machine's share is made for; what is unknown lowers nothing."""
    return min(MEMORY_FACTORS.get(condition.memory, 1.0), HEAT_FACTORS.get(condition.thermal, 1.0))


def slowed(pace: Pace, factor: float) -> Pace:
    """The pace to make a share for; what is measured goes on to be ``observed`` by the pace itself.

    Args:
        pace: as measured.
        factor: see ``share_factor``.
    """
    return pace if factor == 1.0 else Pace(pace.speed, pace.factor / factor, pace.recent)


def in_words(condition: Condition) -> str:
    """What is not well, in a few words: ``hot, memory red``; "" where all is, or nothing is known."""
    heat, memory = HEAT_WORDS.get(condition.thermal), MEMORY_WORDS.get(condition.memory)
    battery = "on battery" if condition.battery == "yes" else None
    return ", ".join(word for word in (heat, f"memory {memory}" if memory else None, battery) if word)


def says(name: str, condition: Condition, before: Condition | None = None) -> str | None:
    """What has changed, in one line: ``Air: memory pressure is yellow; its share is lowered to 75 %``; None if nothing.

    Args:
        name: of the machine.
        condition: of it now.
        before: the one that people were told of last; None where they know of nothing bad.
    """
    before = before or Condition()
    parts = []
    if (word := MEMORY_WORDS.get(condition.memory)) != (known := MEMORY_WORDS.get(before.memory)):
        parts.append(f"memory pressure is {word}" if word else f"memory pressure is no longer {known}")
    if (word := HEAT_WORDS.get(condition.thermal)) != (known := HEAT_WORDS.get(before.thermal)):
        parts.append(f"it is {word}" if word else f"it is no longer {known}")
    if (condition.battery == "yes") != (before.battery == "yes"):
        parts.append(f"it runs on {'battery power' if condition.battery == 'yes' else 'mains power again'}")
    if not parts:
        return None
    factor, last = share_factor(condition), share_factor(before)
    if factor == last:
        share = ""
    elif factor == 1.0:
        share = "; its share is no longer lowered"
    else:
        share = f"; its share is {'lowered' if factor < last else 'raised'} to {100 * factor:.0f} %"
    return f"{name}: {', '.join(parts)}{share}"
