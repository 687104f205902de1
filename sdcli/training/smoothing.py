"""The running mean that makes a noisy loss readable."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class MovingAverage:
    """An exponential moving average without a bias towards its start.

    After n values: sum of decay^(n-i) * x_i over the sum of those weights (the bias correction of Adam, Kingma and Ba
    2015, section 3). So the first mean is the first value, and `decay` 0 smooths nothing.
    """

    decay: float
    _sum: float = 0.0
    _weight: float = 0.0

    def add(self, value: float) -> float:
        """Take in a value and return the mean; NaN and infinities are passed over, and return NaN before any other."""
        if math.isfinite(value):
            self._sum = self.decay * self._sum + (1 - self.decay) * value
            self._weight = self.decay * self._weight + (1 - self.decay)
        return self._sum / self._weight if self._weight else math.nan
