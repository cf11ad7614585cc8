"""Rows go back to the machine that keeps something of theirs."""

from __future__ import annotations

import numpy as np

from coordinator.row_homes import Homes


def rows(*ids: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(ids, np.int64)


def test_a_row_is_at_home_where_it_was_first() -> None:
    homes = Homes()
    homes.settle(rows(7, 3), "anna", ["anna", "ben"])
    homes.settle(rows(5), "ben", ["anna", "ben"])
    assert homes.wishes(rows(3, 4, 5, 7), ["anna", "ben"]) == {3: 0, 5: 1, 7: 0}
    assert homes.wishes(rows(3, 5), ["ben", "anna"]) == {3: 1, 5: 0}
    homes.settle(rows(3), "ben", ["anna", "ben"])  # to even out; it is kept at both now
    assert homes.wishes(rows(3), ["anna", "ben"]) == {3: 0}


def test_who_is_gone_is_no_home() -> None:
    homes = Homes()
    homes.settle(rows(1, 2), "anna", ["anna", "ben"])
    assert homes.wishes(rows(1, 2), ["ben"]) == {}
    homes.settle(rows(1), "ben", ["ben"])
    assert homes.wishes(rows(1, 2), ["ben", "anna"]) == {1: 0, 2: 1}
