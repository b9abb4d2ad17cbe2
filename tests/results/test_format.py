from __future__ import annotations

import pytest

from sasa_bench.results.format import percent, ratio, seconds, short_shapes, si, size


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
        (seconds(0.9996), "1000 ms"),
        (seconds(1234), "1234 s"),
        (si(9.999e5), "1000 k"),
        (ratio(1.2345), "1.23"),
        (ratio(12345.6), "12346"),
        (short_shapes("2×3 3"), "2×3 3"),
        (short_shapes(" ".join(["128×64"] * 40)), "128×64 128×64 128×64 128×64 128×64 128×64 128×64 … of 40"),
        (percent(0.0432), "4.3 %"),
        (percent(0.999), "100 %"),
        (percent(1.234), "123 %"),
    ],
)
def test_figures_are_scaled_for_people(shown: str, expected: str) -> None:
    assert shown == expected
