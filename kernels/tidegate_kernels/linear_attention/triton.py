"""Linear attention by addition with one decay a head, in two levels: chunks with a state between, tiles inside them.

One kernel goes from chunk to chunk and leaves the state before each; another has a program for every tile of rows,
which reads that state and the tiles of its own chunk. Both run forward and in reverse, and that is the backward pass:
gradients of states are a scan of queries and gradients of outputs from the end, and dq, dk and dv are what rows read
of one of the two, with other tensors in the places of queries, keys and values. No atomics, so it is deterministic.
Source: TFLA (arXiv 2503.14376), section 3.

Letters: B batch, T tokens, H heads, K key width, V value width, N chunks, C tokens of a chunk; X the width of rows that
are multiplied with each other, Y the width of what is added up; i rows, j tokens that they read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tidegate_kernels.gated_attention.triton import dot
from tidegate_kernels.tiles import strides

__all__ = ["Forward", "Gradients", "Tiles", "backward", "forward", "tiles_of"]

_WIDEST_TILE = 128
"""Columns of a row that a program multiplies, or adds up, at a time."""
_NARROWEST = 64
"""Of tiles in bf16: with narrower ones Triton 3.6 gets keys of 16 or 32 beside wider values wrong on Hopper: LOG.md"""
_SHUT = tl.constexpr(-40.0)
"""Of a log decay: nothing is left behind it (4e-18), and sums over a chunk keep their digits."""


class Tiles(NamedTuple):
    """How the work is cut up."""

    chunk: int
    """C, a multiple of `rows`."""
    rows: int
    """Of a program that reads, and of the tokens that it reads at a time."""
    warps: int
    stages: int
    side: int
    """Of the part of a state that a program of the scan holds."""
    scan_warps: int
    scan_stages: int


def tiles_of(dtype: torch.dtype) -> Tiles:
    if dtype == torch.float32:
        return Tiles(chunk=64, rows=32, warps=4, stages=1, side=32, scan_warps=4, scan_stages=1)
    return Tiles(chunk=128, rows=64, warps=4, stages=1, side=64, scan_warps=4, scan_stages=3)


@triton.jit
def _sums_kernel(decay_ptr, sums_ptr, T, H, N, decay_b, decay_t, decay_h, CHUNK: tl.constexpr):
    """Sums of log decays from each chunk's start; tokens behind the end do not decay."""
    head, n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    t = (n * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    decay = tl.load(decay_ptr + head // H * decay_b + t * decay_t + head % H * decay_h, mask=t < T, other=0.0)
    tl.store(sums_ptr + head * N * CHUNK + t, tl.cumsum(tl.maximum(decay.to(tl.float32), _SHUT), axis=0))


@triton.jit
def _scan_kernel(
    x_ptr, y_ptr, sums_ptr, first_ptr, begin_ptr, states_ptr, end_ptr, T, H, N, scale,
    x_b, x_t, x_h, y_b, y_t, y_h,
    X: tl.constexpr, Y: tl.constexpr, REVERSE: tl.constexpr, BEGINS: tl.constexpr, DOCUMENTS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`S = exp(sum of the chunk's decays) S + sum_t w_t x_t y_t^T` from chunk to chunk; what each comes to is stored.

    Forward, w is the decay from token t to the chunk's end; in reverse from its start to t, times `scale`.
    """
    tiles_x: tl.constexpr = (X + BLOCK_X - 1) // BLOCK_X
    tiles_y: tl.constexpr = (Y + BLOCK_Y - 1) // BLOCK_Y
    tile, head = tl.program_id(0) % (tiles_x * tiles_y), (tl.program_id(0) // (tiles_x * tiles_y)).to(tl.int64)
    b, h = head // H, head % H
    x_at = tile // tiles_y * BLOCK_X + tl.arange(0, BLOCK_X)
    y_at = tile % tiles_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    place = x_at[:, None] * Y + y_at[None, :]
    there = (x_at < X)[:, None] & (y_at < Y)[None, :]
    state = tl.zeros([BLOCK_X, BLOCK_Y], dtype=tl.float32)
    if BEGINS:
        state = tl.load(begin_ptr + head * X * Y + place, mask=there, other=0.0)
    x_ptr += b * x_b + h * x_h
    y_ptr += b * y_b + h * y_h
    sums_ptr += head * N * CHUNK
    for step in range(N):
        n = step
        if REVERSE:
            n = N - 1 - step
        tl.store(states_ptr + (head * N + n) * X * Y + place, state.to(states_ptr.dtype.element_ty), mask=there)
        t = (n * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
        x = tl.load(x_ptr + t[None, :] * x_t + x_at[:, None], mask=(t < T)[None, :] & (x_at < X)[:, None], other=0.0)
        y = tl.load(y_ptr + t[:, None] * y_t + y_at[None, :], mask=(t < T)[:, None] & (y_at < Y)[None, :], other=0.0)
        sums, whole = tl.load(sums_ptr + t), tl.load(sums_ptr + n * CHUNK + CHUNK - 1)
        carried = tl.exp(whole)
        weight = tl.exp(sums) * scale if REVERSE else tl.exp(whole - sums)
        if DOCUMENTS:
            first = tl.load(first_ptr + b * T + tl.minimum(t, T - 1))
            last = tl.load(first_ptr + b * T + tl.minimum(n * CHUNK + CHUNK, T) - 1)
            goes_on = (first < n * CHUNK) | (first == 0) if REVERSE else t >= last
            weight = tl.where(goes_on, weight, 0.0)
            carried = tl.where((last < n * CHUNK) | (last == 0), carried, 0.0)
        state = dot((x * weight[None, :]).to(y.dtype), y, state * carried, PRECISION)
    tl.store(end_ptr + head * X * Y + place, state, mask=there)


@triton.jit
def _read_kernel(
    a_ptr, x_ptr, y_ptr, states_ptr, sums_ptr, first_ptr, out_ptr, z_ptr, dots_ptr, T, H, N, scale,
    a_b, a_t, a_h, x_b, x_t, x_h, y_b, y_t, y_h, out_b, out_t, out_h, z_b, z_t, z_h,
    X: tl.constexpr, Y: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, DOCUMENTS: tl.constexpr,
    DOTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`out_i = w_i a_i S + scale sum_j d_ij (a_i . x_j) y_j`, d the decay between i and j of the same chunk.

    Forward, rows read tokens before them and S is the state at the chunk's start; in reverse those behind them and the
    state at its end. With `DOTS` also `out_i . z_i`, of the first and the second part.
    """
    tiles_y: tl.constexpr = (Y + BLOCK_Y - 1) // BLOCK_Y
    tiles: tl.constexpr = CHUNK // ROWS
    tile, chunk = tl.program_id(0) // tiles_y % tiles, tl.program_id(0) // (tiles_y * tiles)
    n, head = chunk % N, (chunk // N).to(tl.int64)
    b, h = head // H, head % H
    begin = n * CHUNK
    row = (begin + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    y_tile = tl.program_id(0) % tiles_y
    y_at = y_tile * BLOCK_Y + tl.arange(0, BLOCK_Y)
    a_ptr += b * a_b + h * a_h
    x_ptr += b * x_b + h * x_h
    y_ptr += b * y_b + h * y_h
    states_ptr += (head * N + n) * X * Y
    sums_ptr += head * N * CHUNK
    if DOCUMENTS:
        first_ptr += b * T
    x_step: tl.constexpr = 1 if TRANSPOSED else Y
    y_step: tl.constexpr = X if TRANSPOSED else 1
    acc = tl.zeros([ROWS, BLOCK_Y], dtype=tl.float32)
    for low in tl.static_range(0, X, BLOCK_X):
        x_at = low + tl.arange(0, BLOCK_X)
        a = tl.load(a_ptr + row[:, None] * a_t + x_at, mask=(row < T)[:, None] & (x_at < X)[None, :], other=0.0)
        there = (x_at < X)[:, None] & (y_at < Y)[None, :]
        state = tl.load(states_ptr + x_at[:, None] * x_step + y_at[None, :] * y_step, mask=there, other=0.0)
        acc = dot(a, state, acc, PRECISION)
    sums = tl.load(sums_ptr + row)
    if REVERSE:
        weight = tl.exp(tl.load(sums_ptr + begin + CHUNK - 1) - sums)
    else:
        weight = tl.exp(sums) * scale
    first = tl.zeros([ROWS], dtype=tl.int32)
    if DOCUMENTS:
        first = tl.load(first_ptr + tl.minimum(row, T - 1))
        if REVERSE:
            weight = tl.where(row >= tl.load(first_ptr + tl.minimum(begin + CHUNK, T) - 1), weight, 0.0)
        else:
            weight = tl.where((first < begin) | (first == 0), weight, 0.0)
    acc = acc * weight[:, None]
    if DOTS:
        inside = (row < T)[:, None] & (y_at < Y)[None, :]
        z_at = z_ptr + b * z_b + h * z_h + row[:, None] * z_t + y_at[None, :]
        heads = tl.num_programs(0) // (tiles_y * tiles * N)
        dots_at = dots_ptr + (y_tile.to(tl.int64) * heads + head) * N * CHUNK + row
        of_state = tl.sum(acc * tl.load(z_at, mask=inside, other=0.0).to(tl.float32), axis=1)
        tl.store(dots_at, of_state)
    begin_j, end_j = begin, begin + tile * ROWS + ROWS
    if REVERSE:
        begin_j, end_j = begin + tile * ROWS, tl.minimum(begin + CHUNK, T)
    for j in range(begin_j, end_j, ROWS):
        col = (j + tl.arange(0, ROWS)).to(tl.int64)
        s = tl.zeros([ROWS, ROWS], dtype=tl.float32)
        for low in tl.static_range(0, X, BLOCK_X):
            x_at = low + tl.arange(0, BLOCK_X)
            wide = (x_at < X)[None, :]
            if X > BLOCK_X:
                a = tl.load(a_ptr + row[:, None] * a_t + x_at, mask=(row < T)[:, None] & wide, other=0.0)
            x = tl.load(x_ptr + col[:, None] * x_t + x_at, mask=(col < T)[:, None] & wide, other=0.0)
            s = dot(a, x.T, s, PRECISION)
        other = tl.load(sums_ptr + col)
        if REVERSE:
            between, seen = other[None, :] - sums[:, None], col[None, :] >= row[:, None]
            if DOCUMENTS:
                seen = seen & (row[:, None] >= tl.load(first_ptr + tl.minimum(col, T - 1))[None, :])
        else:
            between, seen = sums[:, None] - other[None, :], col[None, :] <= row[:, None]
            if DOCUMENTS:
                seen = seen & (col[None, :] >= first[:, None])
        s = s * (tl.exp(tl.where(seen, between, -float("inf"))) * scale)
        y = tl.load(y_ptr + col[:, None] * y_t + y_at, mask=(col < T)[:, None] & (y_at < Y)[None, :], other=0.0)
        acc = dot(s.to(y.dtype), y, acc, PRECISION)
    there = (row < T)[:, None] & (y_at < Y)[None, :]
    out_at = out_ptr + b * out_b + h * out_h + row[:, None] * out_t + y_at[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=there)
    if DOTS:
        of_both = tl.sum(acc * tl.load(z_at, mask=there, other=0.0).to(tl.float32), axis=1)
        tl.store(dots_at + tiles_y * heads * N * CHUNK, of_both - of_state)


@triton.jit
def _decays_kernel(
    dots_q_ptr, dots_k_ptr, states_ptr, dstates_ptr, sums_ptr, first_ptr, ddecay_ptr, T, H, N, heads,
    SIZE: tl.constexpr, PARTS: tl.constexpr, BEGINS: tl.constexpr, DOCUMENTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a log decay: of all that is read behind it, the part that was written before it.

    In a chunk that is what tokens from t on read, less what of it they wrote themselves; what tokens before t wrote and
    is read behind the chunk; and what was before the chunk and is read behind it. Each is a product of the rounded
    numbers that dq and dk are made of, so that roundings cancel where they cancel here.
    """
    head, n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    t = (n * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    inside, leaving = tl.zeros([CHUNK], dtype=tl.float32), tl.zeros([CHUNK], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        at = (part * heads + head) * N * CHUNK + t
        within = at + PARTS * heads * N * CHUNK
        inside += tl.load(dots_q_ptr + at) + tl.load(dots_q_ptr + within) - tl.load(dots_k_ptr + within)
        leaving += tl.load(dots_k_ptr + at)
    products = tl.zeros([BLOCK], dtype=tl.float32)
    at = (head * N + n) * SIZE
    for low in range(0, SIZE, BLOCK):
        i = low + tl.arange(0, BLOCK)
        state = tl.load(states_ptr + at + i, mask=i < SIZE, other=0.0).to(tl.float32)
        products += state * tl.load(dstates_ptr + at + i, mask=i < SIZE, other=0.0).to(tl.float32)
    through = tl.sum(products, axis=0) * tl.exp(tl.load(sums_ptr + head * N * CHUNK + n * CHUNK + CHUNK - 1))
    behind = t[None, :] >= t[:, None]
    begins = t == 0
    if DOCUMENTS:
        first = tl.load(first_ptr + head // H * T + tl.minimum(t, T - 1))
        last = tl.load(first_ptr + head // H * T + tl.minimum(n * CHUNK + CHUNK, T) - 1)
        through = tl.where((last < n * CHUNK) | (last == 0), through, 0.0)
        behind = behind & (first[None, :] == first[:, None])
        begins = t == first
    ddecay = tl.sum(tl.where(behind, inside[None, :], 0.0), axis=1) + through
    ddecay += tl.sum(tl.where(t[None, :] < t[:, None], leaving[None, :], 0.0), axis=1)
    if BEGINS:
        begins = begins & (t > 0)
    ddecay = tl.where(begins, 0.0, ddecay)  # what decays there is empty
    at = (head // H * T + t) * H + head % H
    tl.store(ddecay_ptr + at, ddecay.to(ddecay_ptr.dtype.element_ty), mask=t < T)


class Forward(NamedTuple):
    y_BTHV: torch.Tensor
    state_BHKV: torch.Tensor
    """fp32, behind the last token."""
    states_BHNKV: torch.Tensor
    """In the dtype of the values, before each chunk."""
    sums_BHt: torch.Tensor
    """fp32, of log decays from each chunk's start; t is N C."""


class Gradients(NamedTuple):
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    ddecay_BTH1: torch.Tensor
    dstate_BHKV: torch.Tensor


class _Work(NamedTuple):
    """What all kernels of a call share."""

    first_BT: torch.Tensor | None
    tiles: Tiles
    heads: int
    T: int
    H: int
    scale: float
    precision: str

    @property
    def N(self) -> int:
        return triton.cdiv(self.T, self.tiles.chunk)

    def scan(
        self, x: torch.Tensor, y: torch.Tensor, sums: torch.Tensor, begin: torch.Tensor | None, *, reverse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, H, N, X, Y) that each chunk comes to, and the one behind all of them in fp32."""
        X, Y, tiles = x.shape[-1], y.shape[-1], self.tiles
        states = y.new_empty(x.shape[0], self.H, self.N, X, Y)
        end = torch.empty(x.shape[0], self.H, X, Y, dtype=torch.float32, device=x.device)
        blocks = [min(tiles.side, _padded(width, x.dtype)) for width in (X, Y)]
        _scan_kernel[(self.heads * triton.cdiv(X, blocks[0]) * triton.cdiv(Y, blocks[1]),)](
            x, y, sums, self.first_BT, begin, states, end, self.T, self.H, self.N, self.scale, *strides(x, y),
            X=X, Y=Y, REVERSE=reverse, BEGINS=begin is not None, DOCUMENTS=self.first_BT is not None,
            CHUNK=tiles.chunk, BLOCK_X=blocks[0], BLOCK_Y=blocks[1], PRECISION=self.precision,
            num_warps=tiles.scan_warps, num_stages=tiles.scan_stages,
        )  # fmt: skip
        return states, end

    def read(
        self, a: torch.Tensor, x: torch.Tensor, y: torch.Tensor, states: torch.Tensor, sums: torch.Tensor,
        z: torch.Tensor | None = None, *, reverse: bool = False, transposed: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Rows (B, T, H, Y) and, with z, their products with its rows: (2, P, B, H, t), of the state's part and of the
        tokens', each in P parts."""
        X, Y, tiles = x.shape[-1], y.shape[-1], self.tiles
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        block_x, block_y = (min(_WIDEST_TILE, _padded(width, x.dtype)) for width in (X, Y))
        parts = triton.cdiv(Y, block_y)
        dots = None if z is None else torch.empty(2, parts, *sums.shape, dtype=torch.float32, device=y.device)
        _read_kernel[(self.heads * self.N * (tiles.chunk // tiles.rows) * parts,)](
            a, x, y, states, sums, self.first_BT, out, z, dots, self.T, self.H, self.N, self.scale,
            *strides(a, x, y, out, z), X=X, Y=Y, REVERSE=reverse, TRANSPOSED=transposed,
            DOCUMENTS=self.first_BT is not None, DOTS=z is not None, CHUNK=tiles.chunk, ROWS=tiles.rows,
            BLOCK_X=block_x, BLOCK_Y=block_y, PRECISION=self.precision,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return out, dots


def _padded(width: int, dtype: torch.dtype) -> int:
    return max(16 if dtype == torch.float32 else _NARROWEST, triton.next_power_of_2(width))


def _work(q: torch.Tensor, first_BT: torch.Tensor | None) -> _Work:
    B, T, H, K = q.shape
    precision = ("ieee" if q.dtype == torch.float32 else "tf32") if q.is_cuda else "wide"
    return _Work(first_BT, tiles_of(q.dtype), B * H, T, H, K**-0.5, precision)


def forward(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    log_decay_BTH1: torch.Tensor,
    first_BT: torch.Tensor | None,
    state_BHKV: torch.Tensor | None,
) -> Forward:
    """Rows have unit stride; the state, if there is one, is contiguous and fp32."""
    work = _work(q_BTHK, first_BT)
    B, T, H, _ = q_BTHK.shape
    sums = torch.empty(B, H, work.N * work.tiles.chunk, dtype=torch.float32, device=q_BTHK.device)
    _sums_kernel[(work.heads * work.N,)](
        log_decay_BTH1, sums, T, H, work.N, *strides(log_decay_BTH1), CHUNK=work.tiles.chunk, num_warps=1
    )
    states, end = work.scan(k_BTHK, v_BTHV, sums, state_BHKV, reverse=False)
    y, _ = work.read(q_BTHK, k_BTHK, v_BTHV, states, sums)
    return Forward(y, end, states, sums)


def backward(
    g_BTHV: torch.Tensor,
    g_state_BHKV: torch.Tensor | None,
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    states_BHNKV: torch.Tensor,
    sums: torch.Tensor,
    first_BT: torch.Tensor | None,
    begins: bool,
    decay_dtype: torch.dtype,
) -> Gradients:
    """Gradients of all inputs, after what `forward` returned; `begins` if a state was given."""
    work = _work(q_BTHK, first_BT)
    B, T, H, K = q_BTHK.shape
    dstates, dbegin = work.scan(q_BTHK, g_BTHV, sums, g_state_BHKV, reverse=True)
    dq, dots_q = work.read(g_BTHV, v_BTHV, k_BTHK, states_BHNKV, sums, q_BTHK, transposed=True)
    dk, dots_k = work.read(v_BTHV, g_BTHV, q_BTHK, dstates, sums, k_BTHK, reverse=True, transposed=True)
    dv, _ = work.read(k_BTHK, q_BTHK, g_BTHV, dstates, sums, reverse=True)
    ddecay = torch.empty(B, T, H, 1, dtype=decay_dtype, device=q_BTHK.device)
    assert dots_q is not None
    _decays_kernel[(work.heads * work.N,)](
        dots_q, dots_k, states_BHNKV, dstates, sums, first_BT, ddecay, T, H, work.N, work.heads,
        SIZE=K * v_BTHV.shape[-1], PARTS=dots_q.shape[1], BEGINS=begins, DOCUMENTS=first_BT is not None,
        CHUNK=work.tiles.chunk, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return Gradients(dq, dk, dv, ddecay, dbegin)
