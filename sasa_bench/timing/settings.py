"""When a measurement stops."""

from __future__ import annotations

from dataclasses import dataclass, replace

LEAST_SHARE_S = 0.15
"""A worker takes seconds to start: less time than this for an implementation is not worth one."""


@dataclass(frozen=True)
class Settings:
    """When to stop.

    warmup_s     least time of calls before the first sample
    sample_s     time that one sample should take; short calls are repeated to fill it
    budget_s     time for the samples of one implementation of one case, over all workers
    workers      fresh worker processes, spread over the run, that share it; one where the budget is too small to share
    least, most  samples in a worker
    fewest       samples in a worker of calls that outlast the budget
    precision    stop when half the 95 % interval of the median is within this share of the median
    most_discarded  samples thrown away before an implementation is given up, if they are half of all or more
    energy_s     on CUDA, time of the block of calls whose energy is read; 0 reads none
    """

    warmup_s: float = 0.05
    sample_s: float = 0.01
    budget_s: float = 0.6
    workers: int = 3
    least: int = 7
    most: int = 101
    fewest: int = 3
    precision: float = 0.02
    most_discarded: int = 20
    energy_s: float = 0.0

    @property
    def rounds(self) -> int:
        """Workers that measure a case."""
        return max(1, min(self.workers, int(self.budget_s / LEAST_SHARE_S)))

    def share(self) -> Settings:
        """The settings of one worker; where several share the budget, two samples of long calls are enough."""
        fewest = self.fewest if self.rounds == 1 else min(2, self.fewest)
        return replace(self, budget_s=self.budget_s / self.rounds, workers=1, fewest=fewest)
