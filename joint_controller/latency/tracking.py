"""Follows how far latencies drift from what is predicted, while requests are answered."""

import math
import statistics
from collections import deque
from dataclasses import dataclass

from transformers.utils import logging


logger = logging.get_logger(__name__)

FACTOR_RANGE = (0.5, 4.0)
"""Least and most that predictions are multiplied by."""

EXPECTED_FACTORS = (0.8, 1.25)
"""Beyond these, a warning says once that requests do not take what was predicted."""

RECENT_REQUESTS = 8
"""Requests whose median ratio the factor is: few, so that it follows within seconds, enough for three outliers not to matter."""

REPORTED_REQUESTS = 512
"""Last requests that a report is about."""

# Of recorded and made-up sequences of 200 to 550 ratios (a quiet machine, one and two other processes on two cores, both in
# turns of 25 requests, outliers), 93.4 to 97.4 % stay below the predicted 95 % quantile, counted from a cold start; with steps
# of 0.03, 92.4 to 97.4 %. With the median of 16 ratios as many do, below an upper quantile that is up to a fifth higher.
_STEP = 0.05
_COLD_RATIOS = [1.0] * (RECENT_REQUESTS // 2)


@dataclass(frozen=True)
class LatencyDrift:
    """
    How far latencies are from what the estimator predicts.

    Args:
        num_requests (`int`):
            Requests that were answered; what follows is about the last `REPORTED_REQUESTS` of them.
        median_ratio (`float`, *optional*):
            Median of measured over estimated latencies, before these are multiplied by the factor. `None` without requests.
        share_over_budget (`float`, *optional*):
            Share of requests over their budget, of those that were predicted to keep it. `None` where there was none.
        factor (`float`):
            What typical latencies are multiplied by now.
    """

    num_requests: int
    median_ratio: float | None
    share_over_budget: float | None
    factor: float


class LatencyTracker:
    """
    Corrects predictions by what the last requests took, e.g. while another process keeps the machine busy. Typical latencies
    are multiplied by the median ratio of measured over estimated latencies of the last few requests. Upper quantiles are
    multiplied by it, too, and by a margin that grows with each request above its upper quantile and shrinks with each below,
    in such steps that it comes to rest where as many lie above as are to.

    Args:
        quantile (`float`, *optional*):
            Share of requests that are to lie below upper quantiles. `None` where none are predicted.
        upper_ratio (`float`, *optional*):
            Upper quantile of a latency as a multiple of the typical latency, by the estimator.
        adapt (`bool`, *optional*, defaults to `True`):
            Whether to correct predictions; else they are only compared.

    Attributes:
        factor (`float`):
            What typical latencies are to be multiplied by.
        upper_ratio (`float` or `None`):
            What typical latencies, as estimated, are to be multiplied by to get their upper quantile.
    """

    def __init__(self, quantile: float | None, upper_ratio: float | None, adapt: bool = True):
        self.factor = 1.0
        self.upper_ratio = upper_ratio
        self._adapt = adapt
        self._has_warned = False
        self._num_requests = 0
        self._ratios: deque[float] = deque(maxlen=REPORTED_REQUESTS)
        self._is_over: deque[bool | None] = deque(maxlen=REPORTED_REQUESTS)
        self._recent: deque[float] = deque(_COLD_RATIOS, maxlen=RECENT_REQUESTS)
        self._quantile = quantile
        if quantile is not None:
            self._log_margin = math.log(upper_ratio)
            # Half the margin that was measured is kept whatever comes: a quiet minute is no promise.
            self._log_margins = math.log(1 + 0.5 * (max(upper_ratio, 1.0) - 1)), math.log(2 * upper_ratio)

    def add(self, ratio: float, is_over_budget: bool | None = None) -> None:
        """
        Takes a request into account.

        Args:
            ratio (`float`):
                Measured latency over the typical one, as estimated.
            is_over_budget (`bool`, *optional*):
                Whether it took longer than its budget. `None` if it was not predicted to keep it.
        """
        self._num_requests += 1
        self._ratios.append(ratio)
        self._is_over.append(is_over_budget)
        if not self._adapt:
            return
        if self._quantile is not None:
            self._log_margin += _STEP * ((ratio > self.upper_ratio) - (1 - self._quantile))
            self._log_margin = min(max(self._log_margin, self._log_margins[0]), self._log_margins[1])
        self._recent.append(ratio)
        self.factor = min(max(statistics.median(self._recent), FACTOR_RANGE[0]), FACTOR_RANGE[1])
        if self._quantile is not None:
            self.upper_ratio = self.factor * math.exp(self._log_margin)
        if not self._has_warned and self._num_requests >= RECENT_REQUESTS:
            least, most = EXPECTED_FACTORS
            if not least < self.factor <= most:
                self._has_warned = True
                logger.warning(
                    f"requests take {self.factor:.2f} times what was predicted, and predictions follow: is the machine busy "
                    "with something else? If it stays like that, measure again with `check_latency`."
                )

    @property
    def drift(self) -> LatencyDrift:
        """What was found."""
        known = [is_over for is_over in self._is_over if is_over is not None]
        return LatencyDrift(
            num_requests=self._num_requests,
            median_ratio=statistics.median(self._ratios) if self._ratios else None,
            share_over_budget=sum(known) / len(known) if known else None,
            factor=self.factor,
        )
