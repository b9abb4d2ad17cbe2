from __future__ import annotations

import pytest

from sasa_bench import impls, ops
from sasa_bench.case import UserError


@pytest.mark.parametrize("name", ops.BUILTIN)
def test_an_op_is_registered_under_its_own_name(name: str) -> None:
    assert ops.get(name).name == name


def test_an_unknown_op_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ops.UnknownOpError, match="'local_atention'") as error:
        ops.get("local_atention")
    assert isinstance(error.value, UserError)
    assert all(name in str(error.value) for name in ops.BUILTIN)


def test_every_implementation_computes_a_registered_op() -> None:
    for name in impls.names():
        op = impls.get(name).op
        assert ops.get(op.name) is op
