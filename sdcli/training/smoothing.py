"""Smoothing of noisy curves."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class MovingAverage:
    """An exponential moving average without a bias towards its start.

    After n values it is the mean of x_i with weights decay^(n-i) (the bias correction of Adam, Kingma & Ba 2015,
    section 3). So the first mean is the first value, and `decay` 0 does not smooth.
    """

    decay: float
    _sum: float = 0.0
    _weight: float = 0.0

    def add(self, value: float) -> float:
        """Add a value and return the mean, which is NaN before the first finite value; other values are ignored."""
        if math.isfinite(value):
            self._sum = self.decay * self._sum + (1 - self.decay) * value
            self._weight = self.decay * self._weight + (1 - self.decay)
        return self._sum / self._weight if self._weight else math.nan
