"""The worker in use, and its successors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sasa_bench.timing.process import Worker


class Workers:
    """The worker in use; a new one is started when the last one died.

    `timeout_s` bounds each stage of its work; `environment` is added to its environment. `spent_s` holds the seconds
    that each stage has taken, over all workers that were in use.
    """

    def __init__(self, timeout_s: float, environment: Mapping[str, str] | None = None) -> None:
        self.timeout_s, self.environment = timeout_s, environment
        self.worker: Worker | None = None
        self._spent_before: Counter[str] = Counter()

    @property
    def spent_s(self) -> Counter[str]:
        """Stage -> seconds."""
        return self._spent_before + Counter(self.worker.spent_s if self.worker else {})

    def another(self) -> Workers:
        """Workers of the same kind, for work beside that of these."""
        return Workers(self.timeout_s, self.environment)

    def count(self, stage: str, seconds: float) -> None:
        """Add to the seconds of a stage what others have spent in it."""
        self._spent_before = self._spent_before + Counter({stage: seconds})

    def get(self) -> Worker:
        """The live worker."""
        if self.worker is None:
            self.worker = Worker(self.timeout_s, environment=self.environment)
        return self.worker

    def drop(self) -> None:
        """End the worker; the next `get` starts another."""
        if self.worker is not None:
            self._spent_before = self.spent_s
            self.worker.close()
            self.worker = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.drop()
