"""What a gate measured, before anything is concluded from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sasa_bench.gate.pairs import Pair
from sasa_bench.gate.statistics import against_both
from sasa_bench.gate.verdicts import EQUIVALENT, CaseVerdict, Rules, exact_verdict, needs_more_pairs, screen


@dataclass(frozen=True)
class Share:
    """What one task of a gate that is spread over machines measured: its cases by key, on which node, how long."""

    task: int
    node: str
    machine: str
    keys: tuple[str, ...]
    spent_s: float


@dataclass
class Evidence:
    """What one process measured, and nothing that it concluded.

    keys      the points it was given
    loaded    arm -> what it really loaded
    exact     arm, base and head alone -> key -> exact figures, as of pairs.exact_rows
    pairs     (phase, pair): the screen over all that is timed, then fresh pairs over its suspects
    planned   fresh pairs that a suspect needs here, where the budget holds fewer than the rules ask for; else 0
    unchanged   whether base and head are the same code, see same_code, and so nothing was timed
    stopped   why pairs are missing; empty where none is
    node, machine   where it ran; empty for a gate that is not spread
    """

    keys: list[str]
    loaded: dict[str, dict[str, Any]]
    exact: dict[str, dict[str, dict[str, Any]]]
    pairs: list[tuple[str, Pair]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    planned: int = 0
    unchanged: bool = False
    stopped: str = ""
    spent_s: float = 0.0
    node: str = ""
    machine: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evidence:
        """The inverse of to_dict."""
        return cls(**values | {"pairs": [(phase, Pair(**pair)) for phase, pair in values["pairs"]]})

    def exact_verdicts(self, rules: Rules) -> dict[str, CaseVerdict]:
        """key -> verdict on the exact figures."""
        base, head = self.exact["base"], self.exact["head"]
        same = not environment_difference(self.loaded["base"], self.loaded["head"], ("torch", "onnxruntime"))
        return {key: exact_verdict(key, base.get(key), head.get(key), rules, same) for key in self.keys}

    def timed(self, rules: Rules) -> list[str]:
        """The keys that nothing but time is left to decide."""
        both = [k for k in self.keys if all(self.exact[arm][k]["status"] == "ok" for arm in ("base", "head"))]
        verdicts = self.exact_verdicts(rules)
        return [key for key in both if verdicts[key].verdict == EQUIVALENT]

    def phase(self, name: str) -> list[Pair]:
        """The pairs of "screen" or "confirm"."""
        return [pair for phase, pair in self.pairs if phase == name]

    def suspects(self, rules: Rules) -> list[str]:
        """The keys that the screen wants confirmed; none where it is not complete."""
        screened = self.phase("screen")
        if len(screened) < rules.screen_pairs:
            return []
        return screen(head_over_both(screened, self.timed(rules)), rules)

    def undecided(self, rules: Rules) -> list[str]:
        """The suspects that need fresh pairs, or more of them."""
        suspects = self.suspects(rules)
        fresh = head_over_both(self.phase("confirm"), suspects)
        return [key for key in suspects if needs_more_pairs(fresh[key], self.affordable(rules))]

    def affordable(self, rules: Rules) -> Rules:
        """The rules with the number of fresh pairs that was planned here."""
        return replace(rules, confirm_pairs=self.planned or rules.confirm_pairs)


def column(field: str, pairs: Sequence[Pair], keys: Sequence[str]) -> dict[str, list[float]]:
    """key -> its values in this field of Pair, one for each pair that measured it."""
    return {key: [getattr(pair, field)[key] for pair in pairs if key in getattr(pair, field)] for key in keys}


def head_over_both(pairs: Sequence[Pair], keys: Sequence[str]) -> dict[str, list[float]]:
    """key -> what is decided on, see decide.against_both, of each pair that measured it."""
    head, copy = column("head", pairs, keys), column("floor", pairs, keys)
    return {key: against_both(head[key], copy[key]) for key in keys}


def environment_difference(
    base: Mapping[str, Any], head: Mapping[str, Any], libraries: Sequence[str] | None = None
) -> list[str]:
    """What differs between two arms besides their own code: "torch 2.12 -> 2.13", of these libraries or of all.

    `base` and `head` are what blocks.loaded gave. An older revision names torch alone.
    """
    before, after = ({"torch": arm.get("torch", "")} | arm.get("libraries", {}) for arm in (base, head))
    if libraries is None:
        for arm, found in ((base, before), (head, after)):
            found |= {"Python": arm.get("python_version", "")}
            found |= {f"plug-in {name}": digest for name, digest in arm.get("plugins", {}).items()}
    names = [name for name in {**before, **after} if libraries is None or name in libraries]
    both = "libraries" in base and "libraries" in head
    return [
        f"{name} {before.get(name) or 'none'} -> {after.get(name) or 'none'}"
        for name in names
        if before.get(name, "") != after.get(name, "") and (both or name == "torch")
    ]


def same_code(base: Mapping[str, Any], head: Mapping[str, Any]) -> bool:
    """Whether all that two arms loaded is the same: package, kernel files, plug-ins, and the interpreter as named.

    Two environments with the same versions may still hold different builds.
    """
    kernels = [{name: kernel["digest"] for name, kernel in arm.get("kernels", {}).items()} for arm in (base, head)]
    plugins = [arm.get("plugins", {}) for arm in (base, head)]
    same_files = base["digest"] == head["digest"] and kernels[0] == kernels[1] and plugins[0] == plugins[1]
    return same_files and base.get("interpreter") == head.get("interpreter") and not environment_difference(base, head)
