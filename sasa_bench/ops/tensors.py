"""What is computed: for each op its tensors, its float64 reference, and the passes of each mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.networks import modules as networks
from sasa_bench.ops.cost import eighth, halo_block, halved, squeezed

Tensors = dict[str, Tensor]
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Op:
    """A function of a case.

    name      the key of its formula in flops.FORMULAS
    shapes    case -> name of each input and parameter -> (shape, standard deviation of its random values)
    reference (case, tensors) -> y [B, C, H, W]; plain, differentiable, in the dtype of the tensors

    At scope "network" the tensors are the image and the parameters of the network, y is what it gives, and the
    reference is the same network with the reference of its attention.
    """

    name: str
    shapes: Callable[[Case], Mapping[str, tuple[tuple[int, ...], float]]]
    reference: Callable[[Case, Tensors], Tensor]


IMAGES = ("x", "q", "k", "v")
"""Tensors [B, C, H, W], with scalars of their own for each pixel of each image; all others are parameters."""


def random_tensors(op: Op, case: Case, seed: int) -> Tensors:
    """Fresh inputs and parameters in float64 on the CPU, already rounded to the dtype of the case.

    Scales give the logits unit variance, so that the softmax is neither flat nor saturated.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).double()
        for name, (shape, scale) in op.shapes(case).items()
    }


def leaves(tensors: Tensors, case: Case, dtype: torch.dtype | None = None) -> Tensors:
    """Copies of `tensors` in the dtype of the case (or `dtype`) on its device; they need gradients unless forward."""
    grad = case.mode != "forward"
    return {
        name: t.to(device=case.device, dtype=dtype or getattr(torch, case.dtype), copy=True).requires_grad_(grad)
        for name, t in tensors.items()
    }


def step(case: Case, call: Call, tensors: Tensors, grad_y: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    """One pass of the case's mode around the forward `call`.

    forward -> (y,); backward -> the gradient of every tensor, of a graph recorded once; training -> (y, *gradients).
    `grad_y` [B, C, H, W] is the gradient that arrives at y; None is allowed for forward only.
    """
    parameters = tuple(tensors.values())
    if case.mode == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (call(),)

        return forward
    if case.mode == "backward":
        y = call()

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, parameters, grad_y, retain_graph=True)

        return backward

    def training() -> tuple[Tensor, ...]:
        out = call()
        return (out.detach(), *torch.autograd.grad(out, parameters, grad_y))

    return training


def output_names(case: Case, tensors: Tensors) -> list[str]:
    """The names of what `step` returns, for messages."""
    gradients = [f"gradient of {name}" for name in tensors]
    return {"forward": ["y"], "backward": gradients, "training": ["y", *gradients]}[case.mode]


def project(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, C, H, W] of a case at either scope.

    At scope "layer" w_qkv [3 C, C] projects x [B, C, H, W] after absolute embeddings, if any, were added: the row half
    of the channels gets abs_row [C // 2, H], the rest abs_col [C - C // 2, W].
    """
    if case.scope == "core":
        return tensors["q"], tensors["k"], tensors["v"]
    qkv = F.conv2d(add_absolute(case, tensors), tensors["w_qkv"][:, :, None, None])
    q, k, v = qkv.chunk(3, dim=1)
    return q, k, v


def add_absolute(case: Case, tensors: Tensors) -> Tensor:
    """x [B, C, H, W] with absolute embeddings added where the case has them."""
    x = tensors["x"]
    if case.position != "absolute":
        return x
    rows = tensors["abs_row"][:, :, None].expand(-1, -1, case.width)
    columns = tensors["abs_col"][:, None, :].expand(-1, case.height, -1)
    return x + torch.cat([rows, columns])


def _input_shapes(case: Case) -> dict[str, tuple[tuple[int, ...], float]]:
    image = (case.batch, case.channels, case.height, case.width)
    if case.scope == "core":
        return {"q": (image, case.head_dim**-0.5), "k": (image, 1.0), "v": (image, 1.0)}
    scale = case.channels**-0.5 * case.head_dim**-0.25
    return {"x": (image, 1.0), "w_qkv": ((3 * case.channels, case.channels), scale)}


def _local_attention_shapes(case: Case) -> dict[str, tuple[tuple[int, ...], float]]:
    shapes = _input_shapes(case)
    half = case.head_dim // 2
    if case.position == "relative":
        scale = 1.0 if case.scope == "core" else case.head_dim**-0.25
        shapes["rel_row"] = ((case.heads, half, case.kernel_size), scale)
        shapes["rel_col"] = ((case.heads, case.head_dim - half, case.kernel_size), scale)
    elif case.position == "absolute" and case.scope == "layer":
        shapes["abs_row"] = ((case.channels // 2, case.height), 1.0)
        shapes["abs_col"] = ((case.channels - case.channels // 2, case.width), 1.0)
    return shapes


def _local_attention_reference(case: Case, tensors: Tensors) -> Tensor:
    """y_ij = sum over ab of softmax_ab(q_ij . k_ab + q_ij . r_{a-i,b-j}) v_ab, one row of queries at a time.

    A row of queries meets every pixel of the K rows around it, and a mask removes those outside the window.
    r is concat(rel_row [N, d // 2, K] at a - i, rel_col [N, d - d // 2, K] at b - j), equation 2 of the paper.
    """
    q, k, v = (t.unflatten(1, (case.heads, case.head_dim)) for t in project(case, tensors))
    radius, window, half = case.radius, case.kernel_size, case.head_dim // 2
    padding = (radius,) * 4
    inside = F.pad(torch.ones(case.height, case.width, dtype=torch.bool, device=q.device), padding)
    k, v = F.pad(k, padding), F.pad(v, padding)
    offset = torch.arange(k.shape[-1], device=q.device) - torch.arange(case.width, device=q.device)[:, None]
    in_window = (offset >= 0) & (offset < window)
    column = offset.clamp(0, window - 1)
    rows = []
    for i in range(case.height):
        query = q[:, :, :, i]
        logits = torch.einsum("nhdj,nhdap->nhjap", query, k[:, :, :, i : i + window])
        if case.position == "relative":
            by_row = torch.einsum("nhdj,hda->nhja", query[:, :, :half], tensors["rel_row"])
            by_column = torch.einsum("nhdj,hdb->nhjb", query[:, :, half:], tensors["rel_col"])
            by_pixel = by_column.gather(3, column.expand(*by_column.shape[:2], -1, -1))
            logits = logits + by_row[..., None] + by_pixel[:, :, :, None, :]
        allowed = in_window[:, None, :]
        if case.border == "mask":
            allowed = allowed & inside[i : i + window]
        weights = logits.masked_fill(~allowed, -torch.inf).flatten(3).softmax(-1).unflatten(3, logits.shape[3:])
        rows.append(torch.einsum("nhjap,nhdap->nhdj", weights, v[:, :, :, i : i + window]))
    return torch.stack(rows, dim=3).flatten(1, 2)


def _global_attention_reference(case: Case, tensors: Tensors) -> Tensor:
    """y_ij = sum over the whole map of softmax(q_ij . k_ab) v_ab, one row of queries at a time."""
    q, k, v = (t.unflatten(1, (case.heads, case.head_dim)) for t in project(case, tensors))
    k, v = k.flatten(3), v.flatten(3)
    rows = []
    for i in range(case.height):
        weights = torch.einsum("nhdj,nhdp->nhjp", q[:, :, :, i], k).softmax(-1)
        rows.append(torch.einsum("nhjp,nhdp->nhdj", weights, v))
    return torch.stack(rows, dim=3).flatten(1, 2)


def _convolution_shapes(case: Case, groups: int = 1) -> dict[str, tuple[tuple[int, ...], float]]:
    fan_in, k = case.channels // groups, case.kernel_size
    return {
        "x": ((case.batch, case.channels, case.height, case.width), 1.0),
        "weight": ((case.channels, fan_in, k, k), (fan_in * k * k) ** -0.5),
    }


def _convolution_reference(case: Case, tensors: Tensors) -> Tensor:
    """y_ij = sum over (a, b) in the window of W_ab x_{i+a,j+b}, one window offset at a time; zero padding."""
    x, weight = tensors["x"], tensors["weight"]
    padded = F.pad(x, (case.radius,) * 4)
    y = torch.zeros_like(x)
    for a in range(case.kernel_size):
        for b in range(case.kernel_size):
            shifted = padded[:, :, a : a + case.height, b : b + case.width]
            if weight.shape[1] == 1 and case.channels > 1:
                y = y + weight[:, 0, a, b][:, None, None] * shifted
            else:
                y = y + torch.einsum("oc,nchw->nohw", weight[:, :, a, b], shifted)
    return y


def _squeeze_excitation_shapes(case: Case) -> dict[str, tuple[tuple[int, ...], float]]:
    c, h = case.channels, squeezed(case.channels)
    return {"x": _image(case), "w_squeeze": ((h, c), 1.0), "w_excite": ((c, h), h**-0.5)}


def _squeeze_excitation_reference(case: Case, tensors: Tensors) -> Tensor:
    """y = x sigmoid(W_excite relu(W_squeeze mean(x))), section 3 of Hu et al. 2018; no biases."""
    x = tensors["x"]
    squeeze = torch.relu(x.flatten(2).mean(2) @ tensors["w_squeeze"].T)
    return x * torch.sigmoid(squeeze @ tensors["w_excite"].T)[:, :, None, None]


def _non_local_shapes(case: Case) -> dict[str, tuple[tuple[int, ...], float]]:
    c, h = case.channels, halved(case.channels)
    return {"x": _image(case), "w_qkv": ((3 * h, c), c**-0.5 * h**-0.25), "w_out": ((c, h), 1.0)}


def _non_local_reference(case: Case, tensors: Tensors) -> Tensor:
    """y = x + W_out sum over the map of softmax(q . k) v, section 3 of Wang et al. 2018, a row of queries at a time."""
    x = tensors["x"]
    q, k, v = torch.einsum("oc,nchw->nohw", tensors["w_qkv"], x).chunk(3, dim=1)
    k, v = k.flatten(2), v.flatten(2)
    rows = []
    for i in range(case.height):
        weights = torch.einsum("ndj,ndp->njp", q[:, :, i], k).softmax(-1)
        rows.append(torch.einsum("njp,ndp->ndj", weights, v))
    return x + torch.einsum("oc,nchw->nohw", tensors["w_out"], torch.stack(rows, dim=2))


def _criss_cross_shapes(case: Case) -> dict[str, tuple[tuple[int, ...], float]]:
    c, h = case.channels, eighth(case.channels)
    scales = {"w_qk": ((2 * h, c), c**-0.5 * h**-0.25), "w_v": ((c, c), c**-0.5), "gamma": ((1,), 1.0)}
    return {"x": _image(case), **scales}


def _criss_cross_reference(case: Case, tensors: Tensors) -> Tensor:
    """y = x + gamma sum over the row and column of a pixel of softmax(q . k) v, section 3.2 of Huang et al. 2019.

    The pixel itself counts once, with its column.
    """
    x = tensors["x"]
    q, k = torch.einsum("oc,nchw->nohw", tensors["w_qk"], x).chunk(2, dim=1)
    v = torch.einsum("oc,nchw->nohw", tensors["w_v"], x)
    itself = torch.eye(case.width, dtype=torch.bool, device=x.device)
    rows = []
    for i in range(case.height):
        in_column = torch.einsum("ndj,ndaj->nja", q[:, :, i], k)
        in_row = torch.einsum("ndj,ndb->njb", q[:, :, i], k[:, :, i]).masked_fill(itself, -torch.inf)
        weights = torch.cat([in_column, in_row], dim=2).softmax(-1)
        of_column, of_row = weights.split([case.height, case.width], dim=2)
        rows.append(torch.einsum("nja,ndaj->ndj", of_column, v) + torch.einsum("njb,ndb->ndj", of_row, v[:, :, i]))
    return x + tensors["gamma"] * torch.stack(rows, dim=2)


def _neighborhood_attention_reference(case: Case, tensors: Tensors) -> Tensor:
    """y_ij = sum over ab of softmax_ab(q_ij . k_ab) v_ab over K x K pixels that lie inside the map, row by row.

    The window starts at row min(max(i - K // 2, 0), H - K), its columns likewise: section 3 of Hassani et al. 2023
    (arXiv 2204.07143), without the scale and the position bias.
    """
    q, k, v = (t.unflatten(1, (case.heads, case.head_dim)) for t in project(case, tensors))
    radius, window = case.radius, case.kernel_size
    column = torch.arange(case.width, device=q.device)
    start = (column - radius).clamp(0, case.width - window)
    allowed = (column >= start[:, None]) & (column < start[:, None] + window)
    rows = []
    for i in range(case.height):
        first = min(max(i - radius, 0), case.height - window)
        logits = torch.einsum("nhdj,nhdap->nhjap", q[:, :, :, i], k[:, :, :, first : first + window])
        weights = logits.masked_fill(~allowed[:, None, :], -torch.inf).flatten(3).softmax(-1)
        weights = weights.unflatten(3, logits.shape[3:])
        rows.append(torch.einsum("nhjap,nhdap->nhdj", weights, v[:, :, :, first : first + window]))
    return torch.stack(rows, dim=3).flatten(1, 2)


def _per_channel_attention_shapes(case: Case) -> dict[str, tuple[tuple[int, ...], float]]:
    c, half = case.channels, case.channels // 2
    scale = 1.0 if case.scope == "core" else c**-0.5
    shapes = {name: (shape, 1.0) for name, (shape, _) in _input_shapes(case).items()}
    shapes |= {"w_qkv": ((3 * c, c), scale)} if case.scope == "layer" else {}
    if case.position == "relative":
        shapes |= {"rel_row": ((half, case.kernel_size), 1.0), "rel_col": ((c - half, case.kernel_size), 1.0)}
    return shapes


def _per_channel_attention_reference(case: Case, tensors: Tensors) -> Tensor:
    """y_c,ij = sum over ab of softmax_ab(q_c,ij (k_c,ab + r_c,ab-ij)) v_c,ab for each channel c, one row at a time.

    k and v outside the map are 0 and take part. r is rel_row [C // 2, K] at a - i for the first half of the channels
    and rel_col [C - C // 2, K] at b - j for the rest.
    """
    q, k, v = project(case, tensors)
    window = case.kernel_size
    k, v = F.pad(k, (case.radius,) * 4), F.pad(v, (case.radius,) * 4)
    rows = []
    for i in range(case.height):
        keys, values = (t[:, :, i : i + window].unfold(3, window, 1) for t in (k, v))  # [B, C, K, W, K]
        if case.position == "relative":
            by_row = tensors["rel_row"][:, :, None, None].expand(-1, -1, 1, window)
            by_column = tensors["rel_col"][:, None, None, :].expand(-1, window, 1, -1)
            keys = keys + torch.cat([by_row, by_column])
        logits = torch.einsum("ncj,ncajb->ncjab", q[:, :, i], keys)
        weights = logits.flatten(3).softmax(-1).view_as(logits)
        rows.append(torch.einsum("ncjab,ncajb->ncj", weights, values))
    return torch.stack(rows, dim=2)


def _halo_attention_shapes(case: Case) -> dict[str, tuple[tuple[int, ...], float]]:
    c, d, halo = case.channels, case.head_dim, halo_block(case) + case.kernel_size - 1
    embeddings = (2 * halo - 1, d), d**-0.5
    return {
        "x": _image(case),
        "w_q": ((c, c, 1, 1), c**-0.5),
        "w_kv": ((2 * c, c, 1, 1), c**-0.5),
        "height_rel": embeddings,
        "width_rel": embeddings,
    }


def _halo_attention_reference(case: Case, tensors: Tensors) -> Tensor:
    """y_ij = sum over ab of softmax_ab(q_ij . k_ab / sqrt(d) + q_ij . (r_{a-i} + s_{b-j})) v_ab, block by block.

    The pixels of a block of S x S see its h x h keys, h = S + K - 1, those outside the map with k = v = 0. r is
    height_rel [2 h - 1, d] and s width_rel [2 h - 1, d], row h - 1 for a key in the first row of the halo and a query
    in the first row of the block. Vaswani et al. 2021 (arXiv 2103.12731), as timm lays out its parameters: w_kv holds
    the keys and then the values of one head after the other.
    """
    x, size = tensors["x"], halo_block(case)
    heads, d, halo = case.heads, case.head_dim, size + case.kernel_size - 1
    q = torch.einsum("oc,nchw->nohw", tensors["w_q"][:, :, 0, 0], x).unflatten(1, (heads, d))
    kv = torch.einsum("oc,nchw->nohw", tensors["w_kv"][:, :, 0, 0], x).unflatten(1, (heads, 2 * d))
    k, v = (F.pad(t, (case.radius,) * 4) for t in kv.split(d, dim=2))
    step = torch.arange(halo, device=x.device) - torch.arange(size, device=x.device)[:, None] + halo - 1
    rows = []
    for top in range(0, case.height, size):
        blocks = []
        for left in range(0, case.width, size):
            query = q[..., top : top + size, left : left + size]
            keys, values = (t[..., top : top + halo, left : left + halo] for t in (k, v))
            logits = torch.einsum("nhdij,nhdab->nhijab", query, keys) * d**-0.5
            by_row = torch.einsum("nhdij,iad->nhija", query, tensors["height_rel"][step])
            by_column = torch.einsum("nhdij,jbd->nhijb", query, tensors["width_rel"][step])
            logits = logits + by_row[..., None] + by_column[..., None, :]
            weights = logits.flatten(4).softmax(-1).view_as(logits)
            blocks.append(torch.einsum("nhijab,nhdab->nhdij", weights, values))
        rows.append(torch.cat(blocks, dim=4))
    return torch.cat(rows, dim=3).flatten(1, 2)


def _image(case: Case) -> tuple[tuple[int, ...], float]:
    return (case.batch, case.channels, case.height, case.width), 1.0


@dataclass(frozen=True)
class _ReferenceKernel:
    """The reference of local attention as the kernel of a network."""

    layer: None = None

    def attend(self, case: Case) -> Callable[..., Tensor]:
        def core(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
            tensors = {"q": q, "k": k, "v": v}
            if rel_row is not None and rel_col is not None:
                tensors |= {"rel_row": rel_row, "rel_col": rel_col}
            return _local_attention_reference(case, tensors)

        return core


def _network_reference(case: Case, tensors: Tensors) -> Tensor:
    y: Tensor = networks.bind(case, tensors, _ReferenceKernel())(tensors["x"])
    return y


def _also_in_networks(op: Op) -> Op:
    return Op(
        op.name,
        lambda case: networks.shapes(case) if case.scope == "network" else op.shapes(case),
        lambda case, t: _network_reference(case, t) if case.scope == "network" else op.reference(case, t),
    )


LOCAL_ATTENTION = _also_in_networks(Op("local_attention", _local_attention_shapes, _local_attention_reference))
GLOBAL_ATTENTION = Op("global_attention", _input_shapes, _global_attention_reference)
CONVOLUTION = _also_in_networks(Op("convolution", _convolution_shapes, _convolution_reference))
DEPTHWISE_CONVOLUTION = Op(
    "depthwise_convolution", lambda case: _convolution_shapes(case, case.channels), _convolution_reference
)
SQUEEZE_EXCITATION = Op("squeeze_excitation", _squeeze_excitation_shapes, _squeeze_excitation_reference)
NON_LOCAL = Op("non_local", _non_local_shapes, _non_local_reference)
CRISS_CROSS = Op("criss_cross", _criss_cross_shapes, _criss_cross_reference)
NEIGHBORHOOD_ATTENTION = Op("neighborhood_attention", _local_attention_shapes, _neighborhood_attention_reference)
PER_CHANNEL_ATTENTION = Op("per_channel_attention", _per_channel_attention_shapes, _per_channel_attention_reference)
HALO_ATTENTION = Op("halo_attention", _halo_attention_shapes, _halo_attention_reference)
