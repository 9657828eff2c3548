"""Trials of equal settings and different seeds: settings are compared by their means, so that no lucky seed wins."""

import json
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from optuna.trial import FrozenTrial, TrialState

from launch.search.plan import DIRECTIONS, Plan


class Setting(NamedTuple):
    """The finished trials that differ only in their seed."""

    trial: FrozenTrial  # the first of them
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def shown(self) -> str:
        """Its value or, of several seeds, mean ± standard deviation and their number."""
        if len(self.values) == 1:
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ± {statistics.stdev(self.values):.4f} over {len(self.values)} seeds"


def best_first(trials: Iterable[FrozenTrial], plan: Plan, metric: str) -> list[Setting]:
    """All settings, those with the most finished seeds first, and of these the one with the best mean."""
    found: dict[str, Setting] = {}
    for trial in trials:
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            values = {key: value for key, value in plan.drawn(trial.number)[1].items() if key != "seed"}
            name = json.dumps(values, sort_keys=True, default=str)
            found.setdefault(name, Setting(trial, [])).values.append(trial.value)
    sign = 1 if DIRECTIONS[metric] == "minimize" else -1
    return sorted(found.values(), key=lambda s: (-len(s.values), sign * s.mean, s.trial.number))


def best(trials: Iterable[FrozenTrial], plan: Plan, metric: str) -> Setting | None:
    return next(iter(best_first(trials, plan, metric)), None)
