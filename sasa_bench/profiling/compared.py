"""Two traces side by side: operators matched by name and shapes, and what grew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sasa_bench.profiling.breakdown import Operator
from sasa_bench.results.format import ratio, seconds

NOTABLE = 0.02
"""Two traces whose operators take times that differ by less are said to take as long."""


@dataclass(frozen=True)
class Match:
    """One operator in both traces, per call; None where a trace does not have it.

    gpu: whether its time is that of the kernels that it launched, and not its self time on the host
    """

    name: str
    shapes: str
    before: Operator | None
    after: Operator | None
    gpu: bool = False

    @property
    def before_s(self) -> float:
        """Time in the first trace."""
        return self._time(self.before)

    @property
    def after_s(self) -> float:
        """Time in the second trace."""
        return self._time(self.after)

    def _time(self, operator: Operator | None) -> float:
        if operator is None:
            return 0.0
        return operator.gpu_s if self.gpu else operator.self_s

    @property
    def growth_s(self) -> float:
        """Seconds that the second trace spends more."""
        return self.after_s - self.before_s


def match(before: Sequence[Operator], after: Sequence[Operator]) -> list[Match]:
    """Every operator of either trace, the largest change first; by GPU time where both have kernels.

    By name and input shapes, or by name alone where a trace has no shapes.
    """
    if not all(any(o.shapes for o in operators) for operators in (before, after)):
        before, after = _by_name(before), _by_name(after)
    first, second = ({(o.name, o.shapes): o for o in operators} for operators in (before, after))
    gpu = all(any(o.gpu_s for o in operators) for operators in (before, after))
    found = [Match(*key, first.get(key), second.get(key), gpu) for key in {**first, **second}]
    return sorted(found, key=lambda m: (-abs(m.growth_s), m.name, m.shapes))


def _by_name(operators: Sequence[Operator]) -> list[Operator]:
    found: dict[str, Operator] = {}
    for o in operators:
        before = found.get(o.name, Operator(o.name, "", 0.0, 0.0, 0.0))
        found[o.name] = replace(
            before,
            count=before.count + o.count,
            self_s=before.self_s + o.self_s,
            total_s=before.total_s + o.total_s,
            gpu_s=before.gpu_s + o.gpu_s,
        )
    return list(found.values())


def sentences(matches: Sequence[Match], before: str, after: str) -> list[str]:
    """What changed: the whole, the operator that changed most, and what only one trace has."""
    whole, others = sum(m.before_s for m in matches), sum(m.after_s for m in matches)
    if not whole or not others:
        empty = before if not whole else after
        return [f"{empty} holds no operator, so there is nothing to compare."]
    change, times = others - whole, others / whole
    what = "Kernels of the operators" if any(m.gpu for m in matches) else "Operators"
    spans = f"in {after} ({seconds(others)}) as in {before} ({seconds(whole)})"
    if not any(m.before and m.after for m in matches):
        same = {m.name for m in matches if m.before} & {m.name for m in matches if m.after}
        lacking = "no operator with the same input shapes" if same else "no operator"
        said = [f"{what} take {ratio(times)} times as long {spans}. The traces have {lacking} in common."]
    elif abs(times - 1) < NOTABLE:
        said = [f"{what} take as long {spans}."]
    else:
        said = [f"{what} take {ratio(times)} times as long {spans}: {_cause(matches, change)}."]
    for only, other, name in ((True, after, before), (False, before, after)):
        alone = [m for m in matches if (m.after if only else m.before) is None]
        if alone:
            spent = sum(m.before_s if only else m.after_s for m in alone)
            are = "is" if len(alone) == 1 else "are"
            said.append(f"{_operators(len(alone))} of {name} ({seconds(spent)}) {are} not in {other}.")
    return said


def _cause(matches: Sequence[Match], change: float) -> str:
    by_name: dict[str, float] = {}
    for m in matches:
        by_name[m.name] = by_name.get(m.name, 0.0) + m.growth_s
    name = max(by_name, key=lambda n: by_name[n] * (1 if change > 0 else -1))
    share, word = by_name[name] / change, "more" if change > 0 else "less"
    shapes = " of all shapes" if sum(m.name == name for m in matches) > 1 else ""
    return f"`{name}`{shapes} takes {seconds(abs(by_name[name]))} {word}, {100 * share:.0f} % of the difference"


def _operators(count: int) -> str:
    return "1 operator" if count == 1 else f"{count} operators"
