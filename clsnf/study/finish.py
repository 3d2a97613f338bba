"""From the trials that ended to each category's result: a Ray task for each winner."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clsnf.core.errors import ClsnfError, OutageError
from clsnf.core.patience import is_outage, outage_line
from clsnf.results import CategoryResult, FailedTrial, TrialResult, WinnerResult
from clsnf.streams.choice import StreamChoice
from clsnf.study.cluster import Shares
from clsnf.study.context import StudyContext
from clsnf.study.folder import images_key
from clsnf.study.inputs import StudyInputs
from clsnf.study.pause import Pause
from clsnf.study.request import Reporter
from clsnf.study.stream_totals import stream_totals
from clsnf.study.trials import dropped_line
from clsnf.training.prepare import rows_of

_IDLE = 0.2  # seconds between two looks while winners wait for an outage to end
_NO_TRIAL = "none of its trials ended in time: go on with --resume"

Winners = dict[str, WinnerResult | str | None]  # category -> its winner, or why it has none


@dataclass(frozen=True)
class Finish:
    """Finds the winners of a study.

    Attributes:
        inputs: of the study.
        context: of the study, for the workers.
        shares: of the cluster: as many winners at once as trials were.
        reporter: gets each winner.
        pause: holds winners back while something that they need is away.
    """

    inputs: StudyInputs
    context: StudyContext
    shares: Shares
    reporter: Reporter
    pause: Pause

    def results(self, trials: Sequence[TrialResult]) -> dict[str, CategoryResult]:
        """The results of all categories.

        Args:
            trials: all that ended.

        Raises:
            OutageError: something that the winners need was away for too long.
        """
        trials_of: dict[str, list[TrialResult]] = {category: [] for category in self.inputs.tables}
        for trial in trials:
            trials_of[trial.category].append(trial)
        finished = {
            category: [trial for trial in own if trial.status == "finished"]
            for category, own in trials_of.items()
        }
        winners = self._winners(finished)
        return {
            category: self._result(category, own, winners[category])
            for category, own in trials_of.items()
        }

    def _result(
        self, category: str, trials: Sequence[TrialResult], found: WinnerResult | str | None
    ) -> CategoryResult:
        failed = [trial for trial in trials if trial.status == "failed"]
        return CategoryResult(
            finished_trials=sum(trial.status == "finished" for trial in trials),
            stopped_trials=sum(trial.status == "stopped" for trial in trials),
            failed_trials=[FailedTrial(trial.number, trial.cause) for trial in failed],
            error=found if isinstance(found, str) else None if trials else _NO_TRIAL,
            winner=found if isinstance(found, WinnerResult) else None,
            skipped=self.inputs.skipped[category],
            stream=stream_totals(trials),
        )

    def _winners(self, finished: Mapping[str, Sequence[TrialResult]]) -> Winners:
        """Each category's winner; a category without finished trials has None."""
        import ray

        from clsnf.study.winner import finish_category

        context, shares = self.context, self.shares
        if context.stream.kind == "ray":  # a winner's task reserves no CPUs for a stream
            stream = StreamChoice("local", "", shares.cpus)
            context = dataclasses.replace(context, stream=stream)
        task = ray.remote(num_cpus=shares.cpus, num_gpus=shares.gpus, max_retries=1)(
            finish_category
        )
        winners = self._known(finished)
        waiting = [c for c, trials in finished.items() if winners[c] is None and trials]
        pending: dict[Any, str] = {}
        while waiting or pending:
            while waiting and self.pause.may_begin(len(pending)):
                category = waiting.pop(0)
                pending[task.remote(context, category, finished[category])] = category
            if not pending:
                given_up = self.pause.given_up(0)
                if given_up is not None:
                    raise OutageError(given_up)
                time.sleep(_IDLE)
                continue
            done, _ = ray.wait(list(pending), num_returns=1)
            category = pending.pop(done[0])
            try:
                winners[category] = self._tell(category, ray.get(done[0]))
            except ray.exceptions.RayError as error:  # other categories keep their winners
                cause = getattr(error, "cause", None) or error
                if is_outage(cause):
                    self.pause.begin(f"{category}, winner", outage_line(cause))
                    waiting.append(category)
                    continue
                is_known = isinstance(cause, ClsnfError)
                winners[category] = str(cause) if is_known else repr(cause)
                # The user can't mend a bug: its traceback is shown.
                self.reporter.say(f"{category}: {cause if is_known else error}")
        return winners

    def _known(self, finished: Mapping[str, Sequence[TrialResult]]) -> Winners:
        """Winners that were found before an interruption; their test images stay locked."""
        winners: Winners = {}
        for category, trials in finished.items():
            tested = images_key(rows_of(self.inputs.tables[category], "test"))
            rests_on = self.context.selection_key(trials)
            found = self.context.folder.read_finished(category, rests_on, tested)
            winners[category] = found
            if found is not None:
                self.reporter.winner(category, found)
        return winners

    def _tell(self, category: str, found: WinnerResult) -> WinnerResult:
        self.pause.end()
        self.reporter.winner(category, found)
        if found.dropped:
            self.reporter.say(f"{category}, winner: {dropped_line(found.dropped)}")
        self.reporter.say(f"{category}: done")
        return found
