from __future__ import annotations

import pytest

from sasa_bench.results.format import seconds, si, size


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (seconds(0.00213), "2.13 ms"),
        (seconds(3.2e-7), "320 ns"),
        (seconds(12.0), "12 s"),
        (si(1.85e8), "185 M"),
        (si(1.85e8, "FLOP"), "185 MFLOP"),
        (si(12.0), "12"),
        (size(3670016), "3.5 MiB"),
        (size(12), "12 B"),
    ],
)
def test_figures_are_scaled_for_people(shown: str, expected: str) -> None:
    assert shown == expected
