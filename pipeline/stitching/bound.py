"""What a share is at most, judged by a sample."""

from __future__ import annotations

import math


def upper_bound(count: int, of: int, *, confidence: float = 0.95) -> float:
    """The share that ``count`` of ``of`` independent draws do not exclude, one-sided.

    Clopper and Pearson (Biometrika 1934): the greatest share with which ``count`` or fewer are
    still no rare event; 3 / ``of`` where none were found.

    >>> round(upper_bound(0, 4096) * 4096, 2), round(upper_bound(1, 10), 4), upper_bound(5, 5)
    (2.99, 0.3942, 1.0)
    """
    if count >= of:
        return 1.0
    steps = [0.0]
    for drawn in range(1, count + 1):
        steps.append(steps[-1] + math.log((of - drawn + 1) / drawn))
    low, high = count / of, 1.0
    for _ in range(60):
        share = (low + high) / 2
        odds = math.log(share) - math.log1p(-share) if 0 < share < 1 else math.inf
        logs = (step + n * odds + of * math.log1p(-share) for n, step in enumerate(steps))
        rare = sum(math.exp(value) for value in logs) < 1 - confidence
        low, high = (low, share) if rare else (share, high)
    return high
