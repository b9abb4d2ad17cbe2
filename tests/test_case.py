from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasa_bench.case import AXES, CHOICES, Case, CaseError, canonical_resolution, from_dict, parse_value


def test_every_field_is_an_axis() -> None:
    assert tuple(f.name for f in fields(Case)) == AXES


def test_a_case_survives_its_dictionary() -> None:
    case = Case(kernel_size=5, resolution="6x10", position="absolute", mode="training")
    assert from_dict(case.to_dict()) == case


@given(height=st.integers(1, 500), width=st.integers(1, 500))
def test_every_way_to_write_a_resolution_means_the_same(height: int, width: int) -> None:
    case = Case(resolution=f"{height}x{width}")
    assert (case.height, case.width) == (height, width)
    assert case == Case(resolution=canonical_resolution([height, width]))
    if height == width:
        assert case == Case(resolution=height) == Case(resolution=str(height))


@pytest.mark.parametrize("kernel_size", [2, 4, 0, -3])
def test_an_even_or_negative_window_is_refused_with_what_would_do(kernel_size: int) -> None:
    with pytest.raises(CaseError, match=rf"kernel_size = {kernel_size}.*(odd|1 or more)"):
        Case(kernel_size=kernel_size)


def test_channels_that_heads_do_not_divide_are_refused_with_the_divisors() -> None:
    with pytest.raises(CaseError, match=r"channels = 12 do not split into heads = 8.*1, 2, 3, 4, 6, 12"):
        Case(channels=12, heads=8)


@pytest.mark.parametrize("axis", CHOICES)
def test_an_unknown_choice_is_refused_with_the_known_ones(axis: str) -> None:
    with pytest.raises(CaseError) as caught:
        Case(**{axis: "sideways"})
    assert all(choice in str(caught.value) for choice in CHOICES[axis])


@pytest.mark.parametrize("resolution", ["0", "7x", "axb", "7x7x7", 0, -3, 2.5, None, True, [1, 2, 3]])
def test_a_resolution_that_is_none_is_refused(resolution: object) -> None:
    with pytest.raises(CaseError, match="resolution"):
        Case(resolution=resolution)


@pytest.mark.parametrize("axis", ["kernel_size", "channels", "heads", "batch", "threads"])
@pytest.mark.parametrize("value", [1.5, "3", True, -1])
def test_a_count_must_be_a_whole_number(axis: str, value: object) -> None:
    with pytest.raises(CaseError, match=axis):
        Case(**{axis: value})


@pytest.mark.parametrize("axis", ["kernel_size", "channels", "heads", "batch", "threads", "resolution"])
def test_a_count_that_nothing_could_measure_is_refused_at_once(axis: str) -> None:
    with pytest.raises(CaseError, match=rf"{axis} = .* 1048576"):
        Case(**{"heads": 2, axis: 10**15 + 1})


def test_a_stem_is_measured_at_scope_layer_and_not_as_a_core() -> None:
    assert Case(stem="aware_values", channels=64).stem == "aware_values"
    with pytest.raises(CaseError, match="measured at scope 'layer'"):
        Case(stem="conv", scope="core")


def test_channels_that_the_heads_of_a_stem_do_not_divide_are_refused() -> None:
    assert Case(stem="conv", channels=30, heads=1)
    with pytest.raises(CaseError, match=r"channels = 30 with stem = 'stand_alone'.*28"):
        Case(stem="stand_alone", channels=30, heads=1)


def test_an_unknown_axis_lists_the_known_ones() -> None:
    with pytest.raises(CaseError, match=r"kernel_size.*channels"):
        from_dict({"window": 3})
    with pytest.raises(CaseError, match=r"kernel_size.*channels"):
        parse_value("window", "3")


def test_a_misspelt_axis_or_choice_is_answered_with_the_one_that_is_meant() -> None:
    with pytest.raises(CaseError, match=r"unknown axis 'kernal_size': do you mean 'kernel_size'\?"):
        parse_value("kernal_size", "3")
    with pytest.raises(CaseError, match=r"dtype = 'float23': do you mean 'float32'\? give one of float32, "):
        Case(dtype="float23")
    with pytest.raises(CaseError, match=r"dtype = 'xyz': give one of"):
        Case(dtype="xyz")


def test_a_value_of_the_command_line_gets_the_type_of_its_axis() -> None:
    assert parse_value("channels", "64") == 64
    assert parse_value("resolution", "6x10") == "6x10"
    assert parse_value("position", "none") == "none"
    with pytest.raises(CaseError, match="whole number"):
        parse_value("channels", "many")


def test_a_network_is_named_at_its_scope_and_only_there() -> None:
    with pytest.raises(CaseError, match="network"):
        Case(scope="network")
    with pytest.raises(CaseError, match="network"):
        Case(network="resnet50")


def test_whole_numbers_of_numpy_and_of_a_loaded_table_are_accepted() -> None:
    import numpy as np
    import pandas as pd

    case = Case(kernel_size=np.int64(3), channels=np.int32(16), heads=np.uint8(2), resolution=np.int64(12))
    assert case == Case(kernel_size=3, channels=16, heads=2, resolution=12)
    assert type(case.kernel_size) is int
    row = pd.DataFrame([case.to_dict()]).convert_dtypes().iloc[0]
    assert Case(**{axis: row[axis] for axis in AXES}) == case
    with pytest.raises(CaseError, match="whole number"):
        Case(batch=np.bool_(True))


def test_groups_of_attention_may_be_numbers_as_a_suite_writes_them() -> None:
    case = Case(scope="network", network="resnet50", stem="conv", attention_groups=34)  # type: ignore[arg-type]
    assert case.attention_groups == "34"
    for value in (3.5, ["3"], True, None):
        with pytest.raises(CaseError, match="give a text such as"):
            Case(scope="network", network="resnet50", stem="conv", attention_groups=value)  # type: ignore[arg-type]


def test_a_side_that_is_no_whole_number_is_refused_in_a_list_too() -> None:
    with pytest.raises(CaseError, match="give a side in pixels"):
        canonical_resolution([28.9, 56])
