"""Edits of the product that make it slower and compute the same, by round: one for each of several implementations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SlowDown:
    """An edit that makes `impl` slower: `old` in `file` of the package becomes `new`."""

    words: str
    impl: str
    file: str
    old: str
    new: str

    def apply(self, package: Path) -> None:
        """Edit a copy of the package. Raises ValueError where the text has changed since this was written."""
        path = package / self.file
        text = path.read_text(encoding="utf-8")
        if self.old not in text:
            raise ValueError(f"{self.file} no longer holds {self.old!r}: write the slow-down {self.words!r} anew")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def _convolution(words: str, body: str) -> SlowDown:
    """conv3x3 as `body` computes it."""
    return SlowDown(
        words,
        "conv3x3",
        "impls/convolution.py",
        "    return lambda: F.conv2d(x, weight, padding=case.kernel_size // 2, groups=groups)",
        f"    padding = case.kernel_size // 2\n    return lambda: {body}",
    )


ROUNDS: tuple[tuple[SlowDown, ...], ...] = (
    (
        SlowDown(
            "an extra copy of the windows",
            "unfold",
            "impls/unfold.py",
            "F.unfold(t, (window.rows, window.columns), padding=window.radii)\n",
            "F.unfold(t, (window.rows, window.columns), padding=window.radii).clone()\n",
        ),
        SlowDown("a smaller chunk: blocks of 2", "blocked", "impls/blocked.py", "SMALL_MAP = 4, 8", "SMALL_MAP = 2, 8"),
        SlowDown("the vector build is lost", "fused", "impls/_native.py", "or runnable[0]", 'or "portable"'),
        SlowDown(
            "the convolution leaves oneDNN",
            "conv3x3",
            "impls/convolution.py",
            "    return lambda: F.conv2d(x, weight, padding=case.kernel_size // 2, groups=groups)",
            "    def off_the_fast_path():\n"
            "        with torch.backends.mkldnn.flags(enabled=False):\n"
            "            return F.conv2d(x, weight, padding=case.kernel_size // 2, groups=groups)\n\n"
            "    return off_the_fast_path",
        ),
        SlowDown(
            "graphs are no longer optimised",
            "onnx",
            "impls/_onnx/session.py",
            "    options.inter_op_num_threads = 1\n",
            "    options.inter_op_num_threads = 1\n"
            "    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL\n",
        ),
    ),
    (
        SlowDown(
            "a conversion: logits are summed in float64",
            "unfold",
            "impls/unfold.py",
            "* keys).sum(2)\n",
            "* keys).sum(2, dtype=torch.float64).to(q.dtype)\n",
        ),
        SlowDown(
            "a serial loop over heads",
            "blocked",
            "impls/blocked.py",
            "    logits = block @ halos(k)\n",
            "    keys = halos(k)\n    logits = torch.stack([block[:, n] @ keys[:, n] for n in range(heads)], 1)\n",
        ),
        SlowDown(
            "compiled with -O1", "fused", "impls/_attention.py", '"-O3", "-fno-math-errno"', '"-O1", "-fno-math-errno"'
        ),
        _convolution(
            "a conversion to float64 and back", "F.conv2d(x.double(), weight.double(), None, 1, padding).float()"
        ),
        SlowDown(
            "a cache that misses: inputs are bound in each call",
            "onnx",
            "impls/_onnx/session.py",
            "        self.session.run_with_iobinding(self.binding)\n",
            "        self.session.run_with_iobinding(self._bind(self.session))\n",
        ),
    ),
    (
        SlowDown(
            "a cache that misses: the mask is made in each call",
            "unfold",
            "impls/unfold.py",
            "logits.masked_fill(outside, -torch.inf)",
            "logits.masked_fill(tables(window, height, width, q), -torch.inf)",
        ),
        SlowDown(
            "a cache that misses: mask and steps are made in each call",
            "blocked",
            "impls/blocked.py",
            "    row_steps, column_steps, outside = at\n",
            "    row_steps, column_steps, outside = tables(window, q.shape[2], q.shape[3], q)\n",
        ),
        SlowDown("the AVX2 build instead of the best", "fused", "impls/_native.py", "or runnable[0]", 'or "avx2"'),
        _convolution(
            "a change of layout in each call",
            "F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, None, 1, padding).contiguous()",
        ),
        SlowDown(
            "extra copies: in and out through NumPy",
            "onnx",
            "impls/_onnx/session.py",
            "        self.session.run_with_iobinding(self.binding)\n",
            "        images = {name: tensor.detach().numpy().copy() for name, tensor in self.inputs.items()}\n"
            "        self.y.copy_(torch.from_numpy(self.session.run(None, images)[0]))\n",
        ),
    ),
    (
        SlowDown(
            "positions are added to the keys twice over, in two passes",
            "unfold",
            "impls/unfold.py",
            "        keys = keys + torch.cat([rows, columns], dim=1)[..., None]\n",
            "        both = torch.cat([rows, columns], dim=1)[..., None]\n"
            "        keys = (keys + 0.5 * both).add(both, alpha=0.5)\n",
        ),
        SlowDown(
            "an extra copy of keys and values",
            "blocked",
            "impls/blocked.py",
            "reshape(batch, heads, down * across, d, halo[0] * halo[1])\n",
            "reshape(batch, heads, down * across, d, halo[0] * halo[1]).clone()\n",
        ),
        SlowDown(
            "an extra copy of the images",
            "fused",
            "impls/fused.py",
            '        x, w_qkv, rel_row, rel_col, window.rows, window.heads, window.border == "zero"\n',
            '        x.clone(), w_qkv, rel_row, rel_col, window.rows, window.heads, window.border == "zero"\n',
        ),
        _convolution("an extra copy of the weights", "F.conv2d(x, weight.flip(2).flip(2), None, 1, padding)"),
    ),
)
