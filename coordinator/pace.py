"""How fast a machine computes shares, and how that estimate follows what is measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SLOWEST_FACTOR = 100.0
# A change beyond this, seen in two of three steps, is believed at once; smaller ones are smoothed as noise.
SUDDEN_RATIO = 1.25
SMOOTHING = 0.3
# Factors are used in steps of this, so that shares, and with them shapes, do not change for noise.
QUANTUM = 1.02
# Steps tell what starting costs only where the largest is so many times the smallest: else the line is drawn by noise.
TELLING_RATIO = 1.5


@dataclass(frozen=True)
class Speed:
    """What a share costs on a machine: ``overhead_seconds + positions * seconds_per_position``, nothing when empty.

    Attributes:
        overhead_seconds: of any share that is not empty.
        seconds_per_position: of each input position, padding included.
    """

    overhead_seconds: float
    seconds_per_position: float

    def __post_init__(self) -> None:
        if not (self.seconds_per_position > 0 and math.isfinite(self.seconds_per_position)):
            raise ValueError(f"seconds per position must be above 0, not {self.seconds_per_position}")
        if not (self.overhead_seconds >= 0 and math.isfinite(self.overhead_seconds)):
            raise ValueError(f"overhead must be 0 or more seconds, not {self.overhead_seconds}")

    def predict(self, positions: float) -> float:
        """Seconds for a share of so many input positions."""
        return self.overhead_seconds + positions * self.seconds_per_position if positions > 0 else 0.0

    def times(self, factor: float) -> Speed:
        """The same machine, slower by this factor."""
        return Speed(self.overhead_seconds * factor, self.seconds_per_position * factor)

    @staticmethod
    def fitted(samples: Sequence[tuple[int, float]]) -> Speed:
        """The speed that explains measurements best, by least squares of the relative errors.

        Args:
            samples: positions and seconds of measured shares, all above 0; with a single size, or where the line would
                start below zero, the overhead is 0.
        """
        if not samples or any(positions <= 0 or seconds <= 0 for positions, seconds in samples):
            raise ValueError("a speed is fitted to at least one measurement of a share that is not empty")
        positions = np.array([sample[0] for sample in samples], np.float64)
        seconds = np.array([sample[1] for sample in samples], np.float64)
        if len(np.unique(positions)) > 1:
            terms = np.stack([1 / seconds, positions / seconds], axis=1)
            (overhead, slope), *_ = np.linalg.lstsq(terms, np.ones(len(samples)), rcond=None)
            if slope > 0 and overhead >= 0:
                return Speed(float(overhead), float(slope))
            if slope <= 0:
                # Larger shares took no longer: what is known is the largest.
                largest = positions == positions.max()
                return Speed(0.0, float(np.mean(seconds[largest]) / positions.max()))
        relative = positions / seconds
        return Speed(0.0, float(relative.sum() / (relative * relative).sum()))

    @staticmethod
    def of_steps(samples: Sequence[tuple[int, float]]) -> Speed:
        """As ``fitted``, of steps that nobody chose for it: the overhead is 0 where all are of about a size."""
        sizes = [positions for positions, _ in samples]
        if sizes and max(sizes) < TELLING_RATIO * min(sizes):
            return Speed(0.0, statistics.median(seconds / positions for positions, seconds in samples))
        return Speed.fitted(samples)


@dataclass(frozen=True)
class Pace:
    """A machine's speed as it is now.

    The factor follows the ratio of measured time to what ``speed`` says, never to what was predicted with an earlier
    factor: an estimate does not feed on itself, so steps that are under way do not make it swing.

    Attributes:
        speed: measured once.
        factor: how much slower than that the machine is now.
        recent: the last two ratios of measured seconds to those of ``speed``; empty before any.
    """

    speed: Speed
    factor: float = 1.0
    recent: tuple[float, ...] = ()

    @property
    def now(self) -> Speed:
        """The present speed, in steps of 2 % so that noise does not change it."""
        return self.speed.times(QUANTUM ** round(math.log(self.factor, QUANTUM)))

    def predict(self, positions: float) -> float:
        """Seconds for a share of so many input positions."""
        return self.speed.predict(positions) * self.factor

    def observed(self, positions: int, seconds: float) -> Pace:
        """The pace after one more step.

        A single outlier changes nothing; a change of the machine's speed shows after two steps.

        Args:
            positions: of its share, padding included; an empty share teaches nothing.
            seconds: of computing it.
        """
        if positions <= 0 or not (seconds > 0 and math.isfinite(seconds)):
            return self
        ratio = _bounded(seconds / self.speed.predict(positions))
        before = self.recent or (self.factor, self.factor)
        median = statistics.median((*before, ratio))
        if max(median / self.factor, self.factor / median) > SUDDEN_RATIO:
            factor = median
        else:
            factor = self.factor * (median / self.factor) ** SMOOTHING
        return Pace(self.speed, _bounded(factor), (before[-1], ratio))

    def slowed(self, times: float) -> Pace:
        """The pace of a machine that has been found so many times slower than it was, all at once."""
        factor = _bounded(self.factor * max(times, 1.0))
        return Pace(self.speed, factor, (factor, factor))


def _bounded(factor: float) -> float:
    return min(max(factor, 1 / SLOWEST_FACTOR), SLOWEST_FACTOR)
