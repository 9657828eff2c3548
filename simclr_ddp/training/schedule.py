"""Learning rate as a function of the step."""

import math


def peak_learning_rate(base: float, scaling: str, global_batch_size: int) -> float:
    """Scale the base rate: base * N / 256 or base * sqrt(N) / 4 (equal at N = 4,096), or base.

    Chen et al. 2020, section 2.1 and table B.1.
    With base = 0.3 these are the paper's 0.3 * N / 256 and 0.075 * sqrt(N). N counts images, not views.
    """
    factors = {"linear": global_batch_size / 256, "sqrt": math.sqrt(global_batch_size) / 4, "none": 1.0}
    return base * factors[scaling]


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int, kind: str) -> float:
    """Return the rate of a step: peak * step / warmup_steps, then half a cosine to 0 at total_steps, or constant.

    Steps count from 0. The first update of a warm-up has rate 0 and the last one of a cosine is just above 0, as in the
    reference implementation of Chen et al. 2020.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if kind == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
