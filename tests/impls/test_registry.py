"""Every registered implementation agrees with its op's reference; being registered is enough to be tested."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from agreement import agree, assert_right, reason_not_to_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sasa_bench import impls, ops
from sasa_bench.case import Case
from sasa_bench.ops.tensors import leaves, random_tensors

LOCAL_ATTENTION = ops.get("local_attention")

QUICK = [name for name in impls.names() if impls.get(name).info.quick]
SLOW = [name for name in impls.names() if not impls.get(name).info.quick]


SHAPES = {
    "one pixel": {"resolution": 1, "kernel_size": 3},
    "window of one": {"kernel_size": 1, "resolution": 5},
    "window larger than the image": {"kernel_size": 11, "resolution": "4x6"},
    "odd map, not square": {"resolution": "9x17", "kernel_size": 5},
    "one channel a head": {"heads": 8, "resolution": 6, "kernel_size": 3},
    "one head": {"heads": 1, "resolution": 7, "kernel_size": 7},
    "batch of one": {"batch": 1, "resolution": 10, "kernel_size": 3},
    "one row": {"resolution": "1x13", "kernel_size": 5},
    "lower than the window, wider, odd": {"resolution": "4x17", "kernel_size": 7},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["forward", "backward", "training"])
@pytest.mark.parametrize("name", QUICK)
def test_an_implementation_agrees_with_the_reference(name: str, mode: str, shape: str) -> None:
    agree(name, Case(**{"channels": 8, "heads": 2, "batch": 2, "mode": mode} | SHAPES[shape]))


@pytest.mark.parametrize("scope", ["layer", "core"])
@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("position", ["none", "absolute", "relative"])
@pytest.mark.parametrize("name", QUICK)
def test_every_position_and_border_is_the_same_function(name: str, position: str, border: str, scope: str) -> None:
    agree(
        name,
        Case(
            position=position,
            border=border,
            scope=scope,
            mode="training",
            channels=12,
            heads=3,
            kernel_size=5,
            resolution="7x9",
        ),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("name", QUICK)
def test_low_precision_stays_within_the_error_of_the_plain_reference(name: str, mode: str, dtype: str) -> None:
    agree(name, Case(dtype=dtype, mode=mode, channels=16, heads=2, kernel_size=5, resolution=9))


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("scope", ["layer", "core"])
@pytest.mark.parametrize("name", QUICK)
def test_images_in_channels_last_memory_give_the_same_function(name: str, scope: str, mode: str) -> None:
    agree(name, Case(memory_format="channels_last", scope=scope, mode=mode, channels=12, heads=3, resolution="7x9"))


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("op", sorted({impls.get(name).op.name for name in QUICK}))
def test_every_implementation_of_an_op_agrees_with_the_reference_at_any_shape(op: str, data: st.DataObject) -> None:
    names = [name for name in QUICK if impls.get(name).op.name == op and not impls.get(name).missing()]
    if not names:
        pytest.skip(f"no implementation of {op} is installed")
    heads = data.draw(st.integers(1, 4), "heads")
    case = Case(
        heads=heads,
        channels=heads * data.draw(st.integers(1, 9), "head_dim"),
        kernel_size=2 * data.draw(st.integers(0, 5), "radius") + 1,
        resolution=f"{data.draw(st.integers(1, 20), 'height')}x{data.draw(st.integers(1, 20), 'width')}",
        batch=data.draw(st.integers(1, 3), "batch"),
        position=data.draw(st.sampled_from(["none", "absolute", "relative"]), "position"),
        border=data.draw(st.sampled_from(["mask", "zero"]), "border"),
        mode=data.draw(st.sampled_from(["forward", "training"]), "mode"),
    )
    for name in names:
        if not reason_not_to_run(name, case):
            assert_right(name, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_one_that_is_slow_to_build_agrees_on_an_odd_shape(name: str) -> None:
    agree(name, Case(channels=8, heads=2, batch=2, **SHAPES["lower than the window, wider, odd"]))


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("position", ["none", "relative"])
def test_the_reference_is_the_equation_written_out_pixel_by_pixel(position: str, border: str) -> None:
    """An independent transcription: y_ij = sum_ab softmax_ab(q_ij . k_ab + q_ij . r_{a-i, b-j}) v_ab."""
    case = Case(scope="core", position=position, border=border, channels=6, heads=2, kernel_size=3, resolution="3x4")
    t = random_tensors(LOCAL_ATTENTION, case, random.randrange(1 << 31))
    y = LOCAL_ATTENTION.reference(case, t)
    radius, d = 1, 3
    for b in range(2):
        for head in range(2):
            channels = slice(head * d, head * d + d)
            for i in range(3):
                for j in range(4):
                    q = t["q"][b, channels, i, j]
                    logits, values = [], []
                    for a in range(i - radius, i + radius + 1):
                        for c in range(j - radius, j + radius + 1):
                            inside = 0 <= a < 3 and 0 <= c < 4
                            if not inside and border == "mask":
                                continue
                            k = t["k"][b, channels, a, c] if inside else torch.zeros(d, dtype=torch.float64)
                            v = t["v"][b, channels, a, c] if inside else torch.zeros(d, dtype=torch.float64)
                            if position == "relative":
                                row = t["rel_row"][head, :, a - i + radius]
                                column = t["rel_col"][head, :, c - j + radius]
                                k = k + torch.cat([row, column])
                            logits.append(q @ k)
                            values.append(v)
                    expected = torch.stack(logits).softmax(0) @ torch.stack(values)
                    torch.testing.assert_close(y[b, channels, i, j], expected)


def test_absolute_embeddings_are_added_before_the_projections() -> None:
    case = Case(position="absolute", channels=5, heads=1, kernel_size=3, resolution="3x4")
    t = random_tensors(LOCAL_ATTENTION, case, 7)
    embedding = torch.zeros(5, 3, 4, dtype=torch.float64)
    for i in range(3):
        for j in range(4):
            embedding[:, i, j] = torch.cat([t["abs_row"][:, i], t["abs_col"][:, j]])
    plain = {"x": t["x"] + embedding, "w_qkv": t["w_qkv"]}
    expected = LOCAL_ATTENTION.reference(case.with_(position="none"), plain)
    torch.testing.assert_close(LOCAL_ATTENTION.reference(case, t), expected)


def test_the_convolution_reference_is_the_convolution_of_torch() -> None:
    case = Case(channels=6, heads=1, kernel_size=5, resolution="7x9")
    for name in ("conv_kxk", "depthwise_kxk"):
        op = impls.get(name).op
        t = random_tensors(op, case, 3)
        groups = 6 // t["weight"].shape[1]
        torch.testing.assert_close(op.reference(case, t), F.conv2d(t["x"], t["weight"], padding=2, groups=groups))


def test_conv3x3_has_its_window_whatever_the_case_says() -> None:
    assert impls.get("conv3x3").computes(Case(kernel_size=19)).kernel_size == 3


def test_logits_are_a_dot_product_over_the_channels_of_a_head() -> None:
    """Scaling one key channel must change the weights of every channel of its head and of no other head."""
    case = Case(scope="core", position="none", channels=8, heads=2, kernel_size=3, resolution=5)
    t = random_tensors(LOCAL_ATTENTION, case, 11)
    scaled = t | {"k": t["k"].clone()}
    scaled["k"][:, 0] *= 3
    for name in QUICK:
        impl = impls.get(name)
        if impl.op is not LOCAL_ATTENTION or impl.missing() or impl.supports(case):
            continue

        def run(tensors: dict[str, Tensor], name: str = name) -> Tensor:
            with torch.no_grad():
                return impls.get(name).build(case, leaves(tensors, case))().clone()

        change = (run(t) - run(scaled)).abs().amax((0, 2, 3))
        assert (change[:4] > 1e-4).all(), name
        assert (change[4:] == 0).all(), name


def test_an_unknown_implementation_lists_the_known_ones() -> None:
    with pytest.raises(impls.UnknownImplError) as caught:
        impls.get("magic")
    assert all(name in str(caught.value) for name in impls.names())
    assert "do you mean" not in str(caught.value)


def test_a_misspelt_implementation_is_answered_with_the_one_that_is_meant() -> None:
    for name in impls.names():
        with pytest.raises(impls.UnknownImplError, match=f"do you mean '{name}'"):
            impls.get(f"{name}_")


def test_a_file_gives_its_impl(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\nfrom sasa_bench.impls import get\nIMPL = replace(get('naive'), name='mine')"
    )
    assert impls.get(str(path)).name == "mine"
    assert impls.index("mine") == len(impls.names())


@pytest.mark.parametrize(("text", "words"), [("x = 1", "must define IMPL"), (None, "no such file")])
def test_a_file_without_an_impl_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(impls.UnknownImplError, match=words):
        impls.get(str(path))
