"""One Tune searcher for many categories: an Optuna study each.

Unusual: Tune sees one flat run of trials, so that a category never waits for another one's slowest trial, while each category's
sampler learns from its own trials alone. The next trial goes to the category with the fewest running ones, then to the one that had the
fewest. In sequence, a category waits for its running trial before it gets the next: then the same seed gives the same trials whatever
else is going on, at the price of idle cores while the last categories end.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.samplers import TPESampler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from clsnf.fingerprint import content_key

CATEGORY = "category"


def category_seed(seed: int, category: str) -> int:
    """A seed for one category's sampler that does not depend on which other categories are studied."""
    return int(content_key([seed, category])[:8], 16)


class PerCategorySearch(Searcher):
    """Hands out `trials` trials of each category.

    Args:
        categories: their names.
        distributions: name to Optuna distribution, the same for all.
        start: the first trial's values.
        trials: of each category.
        metric: what to raise.
        seed: of the samplers.
        in_sequence: never two trials of a category at once.
    """

    def __init__(
        self,
        categories: Sequence[str],
        distributions: Mapping[str, Any],
        start: Mapping[str, Any],
        trials: int,
        metric: str,
        seed: int,
        in_sequence: bool,
    ) -> None:
        super().__init__(metric=metric, mode="max")
        self._trials, self._in_sequence = trials, in_sequence
        self._given = dict.fromkeys(categories, 0)
        self._running = dict.fromkeys(categories, 0)
        self._category_of: dict[str, str] = {}
        self._searches = {
            category: OptunaSearch(
                space=dict(distributions),
                metric=metric,
                mode="max",
                points_to_evaluate=[dict(start)],
                study_name=category,
                sampler=TPESampler(
                    seed=category_seed(seed, category),
                    multivariate=True,
                    # Few trials must not all be spent on random points.
                    n_startup_trials=min(10, max(3, trials // 3)),
                ),
            )
            for category in categories
        }

    def suggest(self, trial_id: str) -> Any:
        """The next trial's values with its category (a dict), FINISHED, or None where a running trial must end first."""
        open_categories = [c for c, given in self._given.items() if given < self._trials]
        if not open_categories:
            return Searcher.FINISHED
        category = min(open_categories, key=lambda c: (self._running[c], self._given[c]))
        if self._in_sequence and self._running[category]:
            return None
        values = self._searches[category].suggest(trial_id)
        if values is None:
            return None
        self._given[category] += 1
        self._running[category] += 1
        self._category_of[trial_id] = category
        return {CATEGORY: category, **values}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an intermediate result on to the category's study."""
        self._searches[self._category_of[trial_id]].on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass a final result, or a failure, on to the category's study."""
        category = self._category_of[trial_id]
        self._running[category] -= 1
        self._searches[category].on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Write the searcher's state."""
        with open(checkpoint_path, "wb") as file:
            pickle.dump(self.__dict__, file)

    def restore(self, checkpoint_path: str) -> None:
        """Read a state that :meth:`save` wrote."""
        with open(checkpoint_path, "rb") as file:
            self.__dict__.update(pickle.load(file))
