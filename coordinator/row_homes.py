"""Where rows are at home: machines keep what frozen layers made of a row, and do it faster the next time."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.data.padding import Indices


class Homes:
    """The machine of each row: the first that got it, as long as that is there."""

    def __init__(self) -> None:
        self._machines: dict[int, str] = {}

    def settle(self, rows: Indices, machine: str, present: Sequence[str]) -> None:
        """Note that a machine gets these rows (ids in the data); ``present`` are all who are there."""
        for row in rows.tolist():
            if self._machines.get(row) not in present:
                self._machines[row] = machine

    def wishes(self, rows: Indices, present: Sequence[str]) -> dict[int, int]:
        """Which of those present these rows would rather go to, by their ids."""
        places = {machine: index for index, machine in enumerate(present)}
        homes = {row: self._machines.get(row) for row in rows.tolist()}
        return {row: places[home] for row, home in homes.items() if home in places}
