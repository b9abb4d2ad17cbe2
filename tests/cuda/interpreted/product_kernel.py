"""The smallest kernel with a product, by which interpreter.py sees whether the interpreter multiplies right."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, result, SIZE: tl.constexpr):
    """result = a @ b in float32; [SIZE, SIZE] each."""
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    tl.store(result + row * SIZE + column, tl.dot(tl.load(a + row * SIZE + column), tl.load(b + row * SIZE + column)))
