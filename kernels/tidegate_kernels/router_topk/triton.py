"""`router_topk` in one launch and a small sum forward, and one launch backward; logits and experts are saved.

A tile is (J, BLOCK_T, C): the experts of a row are J runs of C, at most 128, four for each lane of a warp. It is read
and written as (J BLOCK_T, C), of which every warp gets every so many lines, so a row stays in one warp and no reduction
over experts leaves it. (To which of three axes Triton deals warps depends on its version.) A program takes some tokens
of one sequence and writes its sums; a second kernel adds them in a fixed order, so that results do not differ between
runs.

Letters: N = B T rows, B sequences, T tokens, E experts, K chosen experts, J C experts with padding, P programs a
sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidegate_kernels.router_topk.reference import TINY
from tidegate_kernels.tiles import num_processors

__all__ = ["backward", "forward"]

_TILE = 1024
"""Logits at a time."""
_FEWEST_ROWS = 32
"""Rows a program at least: its sums, two numbers an expert, are then a sixteenth of its logits."""

_CLOSED = tl.constexpr(1 - 2**31)  # key of an expert that is not there, below that of any score
_TAKEN = tl.constexpr(-(2**31))  # below even that: chosen already, or padding
_TINY = tl.constexpr(TINY)


@triton.jit
def _row_max(x):
    return tl.max(tl.max(x, axis=0, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _row_min(x):
    return tl.min(tl.min(x, axis=0, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _row_sum(x):
    return tl.sum(tl.sum(x, axis=0, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _lines(J: tl.constexpr, BLOCK_T: tl.constexpr, C: tl.constexpr):
    """(J * BLOCK_T, 1) row and (J * BLOCK_T, C) expert of what a tile reads or writes."""
    line = tl.arange(0, J * BLOCK_T)[:, None]
    return line % BLOCK_T, line // BLOCK_T * C + tl.arange(0, C)[None, :]


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))  # not exp(-z), which overflows
    return tl.where(z < 0, e, 1.0) / (1 + e)


@triton.jit
def _score(z, softmax, SCORE: tl.constexpr):
    if SCORE == "softmax":
        return softmax
    if SCORE == "sigmoid":
        return _sigmoid(z)
    # softplus(z) = max(z, 0) + log1p(e), and log1p(e) = 2 atanh(e / (2 + e)), exact also where e is small.
    e = tl.exp(-tl.abs(z))
    t = e / (2 + e)
    u = t * t
    series = 1 / 9 + u * (1 / 11 + u * (1 / 13 + u / 15))
    series = 1 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * series)))
    return tl.sqrt(tl.where(z > 0, z, 0.0) + 2 * t * series + _TINY)


@triton.jit
def _forward_kernel(
    logits_ptr, bias_ptr, counted_ptr, weights_ptr, experts_ptr, sums_ptr,
    T, tokens, scale,
    E: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, SIGNALS: tl.constexpr,
    BLOCK_T: tl.constexpr, J: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row_of_line, expert_of_line = _lines(J, BLOCK_T, C)
    expert = tl.reshape(expert_of_line, (J, BLOCK_T, C))
    inside = expert < E
    slot = tl.arange(0, BLOCK_K)[None, None, :]
    first = b * T + part * tokens
    logits_ptr += first * E
    counted_ptr += first
    weights_ptr += first * K
    experts_ptr += first * K
    counts, probs = tl.zeros((J, BLOCK_T, C), tl.float32), tl.zeros((J, BLOCK_T, C), tl.float32)
    bias = tl.load(bias_ptr + expert_of_line, mask=expert_of_line < E, other=0.0)
    bias = tl.reshape(bias, (J, BLOCK_T, C))
    squares = tl.zeros((1, BLOCK_T, 1), tl.float32)
    entropy, norm, chosen_prob = squares, squares, squares
    for start in range(0, tokens, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)[None, :, None]  # of this program: int32 addresses take half the registers
        there = row < T - part * tokens
        line = start + row_of_line
        read = (line < T - part * tokens) & (expert_of_line < E)
        z = tl.load(logits_ptr + line * E + expert_of_line, mask=read, other=0.0)
        z = tl.where(inside, tl.reshape(z, (J, BLOCK_T, C)), float("-inf"))
        top = _row_max(z)
        softmax = tl.exp(z - top)
        total = _row_sum(softmax)
        score = tl.where(inside, _score(z, softmax * (1 / total), SCORE), 0.0)

        counted = tl.load(counted_ptr + row, mask=there, other=0).to(tl.float32)
        share = 1.0  # of a unit of score in the probability
        if SCORE != "softmax":
            share = 1 / (_row_sum(score) + _TINY)
        prob = score * share
        probs += prob * counted
        lse = top + tl.log(total)
        squares += lse * lse * counted

        # Keys that order as the biased scores do, but as integers, which a warp reduces in one instruction.
        bits = (score + bias).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        rest = tl.where(inside, tl.where(z > float("-inf"), key, _CLOSED), _TAKEN)  # closed is -inf, and NaN
        picked = tl.zeros((1, BLOCK_T, BLOCK_K), tl.int32)
        for k in range(K):
            best = _row_min(tl.where(rest == _row_max(rest), expert, E))  # of equal ones the lowest
            rest = tl.where(expert == best, _TAKEN, rest)
            picked = tl.where(slot == k, best, picked)
        counts += tl.where(inside & (rest == _TAKEN), counted, 0.0)

        used = there & (slot < K)
        z_picked = tl.load(logits_ptr + row * E + picked, mask=used, other=0.0)
        weight = _score(z_picked, tl.exp(z_picked - top) * (1 / total), SCORE)
        weights = tl.sum(tl.where(slot < K, weight, 0.0), axis=2, keep_dims=True)
        if RENORMALIZE:
            weight *= 1 / (weights + _TINY)
        tl.store(weights_ptr + row * K + slot, weight * scale, mask=used)
        tl.store(experts_ptr + row * K + slot, picked.to(tl.int64), mask=used)

        if SIGNALS:
            entropy -= _row_sum(prob * tl.log(tl.where(prob > 0, prob, 1.0))) * counted
            finite = tl.where(z > float("-inf"), z, 0.0)
            norm += tl.sqrt(_row_sum(finite * finite)) * counted
            chosen_prob += weights * share * counted

    sums_ptr += (b * tl.num_programs(0) + part) * (2 * E + 4 if SIGNALS else 2 * E + 1)
    expert = tl.arange(0, J)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(sums_ptr + expert, tl.sum(counts, axis=1), mask=expert < E)
    tl.store(sums_ptr + E + expert, tl.sum(probs, axis=1), mask=expert < E)
    tl.store(sums_ptr + 2 * E, tl.sum(squares))
    if SIGNALS:
        tl.store(sums_ptr + 2 * E + 1, tl.sum(entropy))
        tl.store(sums_ptr + 2 * E + 2, tl.sum(norm))
        tl.store(sums_ptr + 2 * E + 3, tl.sum(chosen_prob))


@triton.jit
def _sum_kernel(
    sums_ptr, counts_ptr, probs_ptr, z_ptr, signals_ptr,
    P, E, width,
    BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    total = tl.zeros((BLOCK_X,), tl.float32)
    for start in range(0, P, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)[:, None]
        at = sums_ptr + (b * P + part) * width + x[None, :]
        total += tl.sum(tl.load(at, mask=(part < P) & (x < width)[None, :], other=0.0), axis=0)
    tl.store(counts_ptr + b * E + x, total, mask=x < E)
    tl.store(probs_ptr + b * E + x - E, total, mask=(x >= E) & (x < 2 * E))
    tl.store(z_ptr + b + x - 2 * E, total, mask=x == 2 * E)
    tl.store(signals_ptr + 3 * b + x - 2 * E - 1, total, mask=(x > 2 * E) & (x < width))


@triton.jit
def _dlogits(z, softmax, score, dscore, dot, dsquare, SCORE: tl.constexpr):
    """By the score and by the squared logsumexp; `dot` is the sum of score * dscore over a row."""
    if SCORE == "softmax":
        d = score * (dscore - dot)
    elif SCORE == "sigmoid":
        d = dscore * score * (1 - score)
    else:
        d = dscore * _sigmoid(z) / (2 * tl.where(score > 0, score, 1.0))
    return d + softmax * dsquare


@triton.jit
def _backward_kernel(
    dweights_ptr, dprobs_ptr, dz_ptr, logits_ptr, experts_ptr, counted_ptr, dlogits_ptr,
    T, scale,
    E: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, J: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row_of_line, expert_of_line = _lines(J, BLOCK_T, C)
    inside = tl.reshape(expert_of_line < E, (J, BLOCK_T, C))
    slot = tl.arange(0, BLOCK_K)[None, None, :]
    first = tl.program_id(0) * BLOCK_T
    t = first + tl.arange(0, BLOCK_T)[None, :, None]
    there, row = t < T, b * T + t
    at = (b * T + first + row_of_line) * E + expert_of_line
    in_memory = (first + row_of_line < T) & (expert_of_line < E)
    used = there & (slot < K)
    picked = tl.load(experts_ptr + row * K + slot, mask=used, other=0).to(tl.int32)
    z = tl.load(logits_ptr + at, mask=in_memory, other=0.0)
    z = tl.where(inside, tl.reshape(z, (J, BLOCK_T, C)), float("-inf"))
    counted = tl.load(counted_ptr + row, mask=there, other=0).to(tl.float32)
    top = _row_max(z)
    softmax = tl.exp(z - top)
    total = _row_sum(softmax)
    over_total = 1 / total
    softmax *= over_total
    score = tl.where(inside, _score(z, softmax, SCORE), 0.0)

    # The weights reach the chosen experts alone.
    z_picked = tl.load(logits_ptr + row * E + picked, mask=used, other=0.0)
    softmax_picked = tl.exp(z_picked - top) * over_total
    score_picked = tl.where(used, _score(z_picked, softmax_picked, SCORE), 0.0)
    g = tl.load(dweights_ptr + row * K + slot, mask=used, other=0.0) * scale
    if RENORMALIZE:
        share = 1 / (tl.sum(score_picked, axis=2, keep_dims=True) + _TINY)
        g = (g - tl.sum(g * score_picked, axis=2, keep_dims=True) * share) * share

    # The probabilities reach all of them.
    dprob = tl.load(dprobs_ptr + b * E + expert_of_line, mask=expert_of_line < E, other=0.0)
    dprob = tl.reshape(dprob, (J, BLOCK_T, C)) * counted
    dprob_picked = tl.load(dprobs_ptr + b * E + picked, mask=used, other=0.0) * counted
    dot = _row_sum(dprob * score)
    if SCORE == "softmax":
        dot += tl.sum(g * score_picked, axis=2, keep_dims=True)
    else:
        share = 1 / (_row_sum(score) + _TINY)
        dprob = (dprob - dot * share) * share
        dprob_picked = (dprob_picked - dot * share) * share

    dsquare = 2 * (top + tl.log(total)) * counted * tl.load(dz_ptr + b)
    dlogits = _dlogits(z, softmax, score, dprob, dot, dsquare, SCORE)
    tl.store(dlogits_ptr + at, tl.reshape(dlogits, (J * BLOCK_T, C)), mask=in_memory)
    # Over them those of the chosen: to look for these in the whole tile takes K comparisons an expert.
    dlogits = _dlogits(z_picked, softmax_picked, score_picked, dprob_picked + g, dot, dsquare, SCORE)
    tl.debug_barrier()
    tl.store(dlogits_ptr + row * E + picked, dlogits, mask=used)


def _tile(E: int) -> dict[str, int]:
    """How experts and rows are cut: 16 rows at a time of 64 experts, 4 of 256 and more."""
    C = min(128, triton.next_power_of_2(E))
    J = triton.next_power_of_2(triton.cdiv(E, C))
    return {"BLOCK_T": min(64, max(4, _TILE // (J * C))), "J": J, "C": C, "num_warps": 4}


def forward(
    logits_NE: torch.Tensor,
    bias_E: torch.Tensor,
    counted_BT: torch.Tensor,
    top_k: int,
    score: str,
    renormalize: bool,
    scale: float,
    signals: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (N, E), (B, T) = logits_NE.shape, counted_BT.shape
    experts_NK = logits_NE.new_empty(N, top_k, dtype=torch.int64)
    weights_NK, counts_BE, prob_sums_BE, z_sums_B = map(logits_NE.new_empty, ((N, top_k), (B, E), (B, E), (B,)))
    signals_B3 = logits_NE.new_empty(B if signals else 0, 3)
    tile = _tile(E)
    # Four programs a multiprocessor, of whole tiles; they fit at 128 registers a thread.
    registers = 128 if tile["J"] * tile["C"] <= 512 and not signals else None
    tokens = max(_FEWEST_ROWS, triton.cdiv(N, 4 * num_processors(logits_NE.device)))
    tokens = triton.cdiv(tokens, tile["BLOCK_T"]) * tile["BLOCK_T"]
    programs = triton.cdiv(T, tokens)
    width = 2 * E + (4 if signals else 1)
    sums = logits_NE.new_empty(B, programs, width)
    if N:
        _forward_kernel[(programs, B)](
            logits_NE.contiguous(), bias_E.contiguous(), counted_BT.contiguous(), weights_NK, experts_NK, sums,
            T, tokens, scale,
            E=E, K=top_k, SCORE=score, RENORMALIZE=renormalize, SIGNALS=signals,
            BLOCK_K=triton.next_power_of_2(top_k), maxnreg=registers, **tile,
        )  # fmt: skip
    if B:
        _sum_kernel[(triton.cdiv(width, 32), B)](
            sums, counts_BE, prob_sums_BE, z_sums_B, signals_B3,
            programs, E, width, BLOCK_P=128, BLOCK_X=32, num_warps=4,
        )  # fmt: skip
    return weights_NK, experts_NK, counts_BE, prob_sums_BE, z_sums_B, signals_B3


def backward(
    dweights_NK: torch.Tensor,
    dprob_sums_BE: torch.Tensor,
    dz_sums_B: torch.Tensor,
    logits_NE: torch.Tensor,
    experts_NK: torch.Tensor,
    counted_BT: torch.Tensor,
    score: str,
    renormalize: bool,
    scale: float,
) -> torch.Tensor:
    (N, E), (B, T), K = logits_NE.shape, counted_BT.shape, experts_NK.shape[1]
    dlogits_NE = logits_NE.new_empty(N, E)
    if N:
        tile = _tile(E)
        _backward_kernel[(triton.cdiv(T, tile["BLOCK_T"]), B)](
            dweights_NK.contiguous(), dprob_sums_BE.contiguous(), dz_sums_B.contiguous(), logits_NE.contiguous(),
            experts_NK, counted_BT.contiguous(), dlogits_NE,
            T, scale,
            E=E, K=K, SCORE=score, RENORMALIZE=renormalize, BLOCK_K=triton.next_power_of_2(K), **tile,
        )  # fmt: skip
    return dlogits_NE
