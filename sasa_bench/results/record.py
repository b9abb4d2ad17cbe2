"""Record: one tidy row for each case and implementation, and what rows refer to."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from sasa_bench.case import Case, from_dict
from sasa_bench.results.columns import COLUMNS, misfit
from sasa_bench.results.fields import build
from sasa_bench.results.machine import Machine

DIFFERS = "†"
"""Stands behind the name of an implementation that computes another function than those it is compared with."""

COMBINED: dict[str, Callable[[list[float]], float]] = {
    "disturbed": max,
    "stolen": max,
    "clock": min,
    "spoiled_samples": sum,
    "throttled_samples": sum,
    "power_limited_samples": sum,
}
"""Column of `extra` -> how the figures of several workers become one."""

STATUSES = ("ok", "skipped", "wrong", "error", "timeout")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One case x implementation.

    samples_s holds seconds per call, one value for each round, each the mean of `inner_count` calls. worker_samples
    says how many of them came from each worker process, in order; empty where all came from one. A row that is not ok
    has a reason and no samples. cold_samples_s, where there are any, are seconds of single calls that found none of
    their data in the GPU's L2 cache. max_abs_err and err_budget belong to the output nearest to (or furthest over) its
    budget. `extra` holds figures that only some implementations have, by column name.
    """

    suite: str
    impl: str
    op: str
    case: Case
    status: str
    reason: str = ""
    samples_s: tuple[float, ...] = ()
    inner_count: int = 0
    worker_samples: tuple[int, ...] = ()
    cold_samples_s: tuple[float, ...] = ()
    flops: int | None = None
    params: int | None = None
    min_bytes: int | None = None
    needed_flops: int | None = None
    peak_memory_bytes: int | None = None
    memory_source: str = ""
    max_abs_err: float | None = None
    err_budget: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    machine: str = ""
    started_at: str = ""

    @property
    def key(self) -> tuple[str, str, Case]:
        """What a file holds at most once."""
        return self.suite, self.impl, self.case

    @cached_property
    def median_s(self) -> float:
        """Of samples_s; nan where there are none."""
        return statistics.median(self.samples_s) if self.samples_s else math.nan

    @property
    def by_worker(self) -> list[tuple[float, ...]]:
        """samples_s of each worker process."""
        ends = list(itertools.accumulate(self.worker_samples)) or [len(self.samples_s)]
        return [self.samples_s[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored."""
        return (
            {"kind": "row"}
            | asdict(self)
            | {
                "samples_s": list(self.samples_s),
                "cold_samples_s": list(self.cold_samples_s),
                "worker_samples": list(self.worker_samples),
            }
        )

    def joined(self, later: Mapping[str, Any]) -> Record:
        """This row with what a later worker found: its samples are added; where it failed, the row has failed."""
        if later["status"] != "ok":
            reason = f"in a later worker: {later['reason']}"
            failed = replace(self, status=later["status"], reason=reason, inner_count=0)
            if digest := later.get("extra", {}).get("source_digest"):
                failed = replace(failed, extra=self.extra | {"source_digest": digest})
            return replace(failed, samples_s=(), worker_samples=(), cold_samples_s=(), peak_memory_bytes=None)
        samples = tuple(later["samples_s"])
        extras = (self.extra, later.get("extra", {}))
        combined = {
            name: how([extra[name] for extra in extras if name in extra])
            for name, how in COMBINED.items()
            if any(name in extra for extra in extras)
        }
        return replace(
            self,
            samples_s=(*self.samples_s, *samples),
            worker_samples=(*(self.worker_samples or (len(self.samples_s),)), len(samples)),
            cold_samples_s=(*self.cold_samples_s, *later.get("cold_samples_s", ())),
            extra=self.extra | combined,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """The inverse of to_dict. Raises ValueError, KeyError or TypeError for what is no row."""
        row = build(cls, values, {"case": from_dict(values["case"])})
        if row.status not in STATUSES:
            raise ValueError(f"status = {row.status!r} is not one of {', '.join(STATUSES)}")
        if taken := row.extra.keys() & COLUMNS.keys():
            raise ValueError(f"extra has {', '.join(sorted(taken))}, which is a column of its own")
        if wrong := next((why for name, value in row.extra.items() if (why := misfit(name, value))), None):
            raise ValueError(f"extra has {wrong}")
        if row.worker_samples and sum(row.worker_samples) != len(row.samples_s):
            raise ValueError(f"worker_samples = {list(row.worker_samples)} of {len(row.samples_s)} samples")
        if any(count <= 0 for count in row.worker_samples):
            raise ValueError(f"worker_samples = {list(row.worker_samples)} has a worker without samples")
        if any(seconds <= 0 for seconds in (*row.samples_s, *row.cold_samples_s)):
            raise ValueError("samples_s has a time of 0 s or less")
        if bool(row.samples_s) != (row.status == "ok"):
            raise ValueError(f"status = {row.status!r} with {len(row.samples_s)} samples")
        return row


@dataclass(frozen=True)
class Roof:
    """What a device can do at most, measured on `machine`, the best of several tries.

    peak_flops_per_s       of a large matrix product or a large convolution
    bandwidth_bytes_per_s  of a large copy, read and written
    cache_bytes_per_s      of a copy that fits the caches; 0 where it was not measured

    Raises ValueError where the first two are not positive.
    """

    machine: str
    device: str
    dtype: str
    threads: int
    peak_flops_per_s: float
    bandwidth_bytes_per_s: float
    cache_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.peak_flops_per_s, self.bandwidth_bytes_per_s) <= 0:
            raise ValueError("a roof has a rate of 0 or less")

    def best_of(self, other: Roof) -> Roof:
        """The higher figures of two."""
        return replace(
            self,
            peak_flops_per_s=max(self.peak_flops_per_s, other.peak_flops_per_s),
            bandwidth_bytes_per_s=max(self.bandwidth_bytes_per_s, other.bandwidth_bytes_per_s),
            cache_bytes_per_s=max(self.cache_bytes_per_s, other.cache_bytes_per_s),
        )

    @property
    def hot_bytes_per_s(self) -> float:
        """Of data that is hot in the caches where that was measured, else of a large copy."""
        return max(self.bandwidth_bytes_per_s, self.cache_bytes_per_s)

    def least_s(self, flops: float, bytes_moved: float) -> float:
        """Seconds that so much work takes at the least, with data that is hot in the caches where that is known."""
        return max(flops / self.peak_flops_per_s, bytes_moved / self.hot_bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a machine was set to and busy with when a run began ("before") and ended ("after"); None: it is not shown.

    governor    of the cores' clock; turbo, smt: "on" or "off"
    quota       processors' worth of time that the container may use
    load        processes that ran or waited, average of the last minute
    pressure    share of the time in which a process waited for a processor: of the last minute; after: of the run
    stolen      share of the processors' time that the hypervisor gave to others: since start-up; after: in the run
    throttled_s seconds for which the quota stopped the container: since it started; after: in the run
    probe_s     seconds that a fixed piece of work takes, the best of several: the clock, in virtual machines too
    """

    machine: str
    moment: str
    at: str
    governor: str | None = None
    turbo: str | None = None
    smt: str | None = None
    quota: float | None = None
    load: float | None = None
    pressure: float | None = None
    stolen: float | None = None
    throttled_s: float | None = None
    probe_s: float | None = None


@dataclass(frozen=True, order=True)
class Part:
    """That a file holds part `number` of `count` of these suites, as `run --shard` cuts them."""

    suites: tuple[str, ...]
    count: int
    number: int


@dataclass(frozen=True)
class ImplInfo:
    """An implementation as a reader knows it; `index` is its place in the registry and gives it its colour.

    differs    how its function differs from the attention it stands next to; "" where it does not
    exports    the implementation whose formulation this one runs from an exported file; "" for one that is no export
    any_size   whether that file serves maps of every size
    library    whether it needs a library of custom operators beside it
    digest     of the file that it was loaded from, and what that imports from its folder; "" for one that is registered
    commit     of that file, where git tracks it

    Files written before the last six were known have none of them.
    """

    name: str
    op: str
    summary: str
    index: int
    differs: str = ""
    exports: str = ""
    any_size: bool = False
    library: bool = False
    digest: str = ""
    commit: str = ""

    @property
    def source(self) -> dict[str, str]:
        """What a row says of the file that the implementation was loaded from; nothing for one that is registered."""
        found = {"source_digest": self.digest, "source_commit": self.commit}
        return {name: value for name, value in found.items() if value}

    @property
    def label(self) -> str:
        """The name, marked where the function differs."""
        return self.name + DIFFERS if self.differs else self.name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImplInfo:
        """From a results file or a worker's answer, which may say more."""
        return build(cls, values)


@dataclass
class Results:
    """Everything in one or more results files.

    `files` names the file of each row; `warnings` are sentences about lines that could not be used; `parts` are the
    parts of runs in shards that the files hold.
    """

    rows: list[Record] = field(default_factory=list)
    machines: dict[str, Machine] = field(default_factory=dict)
    impls: dict[str, ImplInfo] = field(default_factory=dict)
    roofs: dict[tuple[str, str, str, int], Roof] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    parts: set[Part] = field(default_factory=set)
    conditions: list[Conditions] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        """Whether the last run of some machine has no end: it goes on, or was stopped."""
        return "before" in {each.machine: each.moment for each in self.conditions}.values()

    def hardware(self) -> dict[str, Machine]:
        """The distinct hardware among the machines of the rows, by hardware_id."""
        return {machine.hardware_id: machine for machine in self.used_machines()}

    def drop(self, rows: Sequence[Record]) -> None:
        """Forget these rows."""
        gone = {id(row) for row in rows}
        kept = [(row, file) for row, file in zip(self.rows, self.files, strict=True) if id(row) not in gone]
        self.rows, self.files = [row for row, _ in kept], [file for _, file in kept]

    def used_machines(self) -> list[Machine]:
        """The machines that rows name: hardware, software and revision."""
        used = {row.machine for row in self.rows}
        return [machine for key, machine in self.machines.items() if key in used]
