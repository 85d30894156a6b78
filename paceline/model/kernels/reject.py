"""`rejection` on the device: modified rejection sampling on chains, for all requests at once.

Node i is tested under the law of the row before it: `u * q(x) < p(x)`, with p the target's probability after every
option and q the draft's (1 if the token was chosen). The first rejection ends the walk with a token of the residual
(p - q)+, a walk without one with a bonus token. Neither p nor the residual is written out: masses are summed by parts
of the vocabulary, tests gather one logit each, and one race per request weighs its tokens as it goes.

Noise is that of `verify.rejection`, and so are the decisions but for rounding: p is normalised by a sum in another
order, and the residual's race does not divide by its total.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from paceline.engine.rng import Stream
from paceline.model.kernels.draw import Cut, Places
from paceline.model.kernels.law import find_masses, load_cut, token_weights
from paceline.model.kernels.noise import noise_tile, noise_word, uniform
from paceline.model.kernels.peaks import Peaks, is_finite, load_peak
from paceline.model.kernels.rows import MAX_CHUNKS, LogitRows, chunks_of, load_logits, scale_of
from paceline.model.kernels.walk import NOTHING, Trees, Walks


@triton.jit
def _test_kernel(
    raw_ptr: tl.tensor,
    raw_stride: tl.tensor,
    edited_ptr: tl.tensor,
    edited_stride: tl.tensor,
    slot_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    peak_token_ptr: tl.tensor,
    cut_key_ptr: tl.tensor,
    cut_last_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    sample_ptr: tl.tensor,
    position_ptr: tl.tensor,
    node_token_ptr: tl.tensor,
    first_node_ptr: tl.tensor,
    first_row_ptr: tl.tensor,
    law_ptr: tl.tensor,
    law_stride: tl.tensor,
    passes_ptr: tl.tensor,
    vocab: tl.tensor,
    ACCEPT: tl.constexpr,
    NODES: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_EDITS: tl.constexpr,
    HAS_CUT: tl.constexpr,
    HAS_LAWS: tl.constexpr,
) -> None:
    request = tl.program_id(0)
    number = tl.program_id(1)
    node = tl.load(first_node_ptr + request) + number
    if node >= tl.load(first_node_ptr + request + 1):
        return
    row = tl.load(first_row_ptr + request) + number  # of the node before, or of the root
    peak, best = load_peak(peak_ptr, peak_token_ptr, row, CHUNKS)
    if is_finite(peak):  # else nothing passes
        token = tl.load(node_token_ptr + node)
        cut_key, cut_last = load_cut(cut_key_ptr, cut_last_ptr, row, HAS_CUT)
        mass = tl.sum(tl.load(mass_ptr + row * CHUNKS + tl.arange(0, CHUNKS)), axis=0)
        scale = scale_of(temperature_ptr, row)
        x = load_logits(raw_ptr, raw_stride, edited_ptr, edited_stride, slot_ptr, row, token, vocab, scale, HAS_EDITS)
        p = token_weights(x, token, vocab, peak, best, tl.load(temperature_ptr + row), cut_key, cut_last) / mass
        q = tl.full((), 1.0, tl.float64)
        if HAS_LAWS:
            q = tl.load(law_ptr + node.to(tl.int64) * law_stride + token).to(tl.float64)
        key0 = tl.load(seed_ptr + row).to(tl.uint64, bitcast=True)
        key1 = tl.load(sample_ptr + row).to(tl.uint64, bitcast=True)
        position = tl.load(position_ptr + row).to(tl.uint64, bitcast=True)
        zero = tl.full((), 0, tl.uint64)
        word = noise_word(tl.full((), 0, tl.int32), position, tl.full((), ACCEPT, tl.uint64), zero, key0, key1)
        tl.store(passes_ptr + request * NODES + number, (uniform(word) * q < p).to(tl.int8))


@triton.jit
def _end_of(request: tl.tensor, passes_ptr: tl.tensor, first_node_ptr: tl.tensor, NODES: tl.constexpr) -> Any:
    """Nodes accepted, and nodes there are.  # two int32 scalars"""
    number = tl.arange(0, NODES)
    count = tl.load(first_node_ptr + request + 1) - tl.load(first_node_ptr + request)
    passes = tl.load(passes_ptr + request * NODES + number) > 0
    accepted = tl.min(tl.where(passes | (number >= count), NODES, number), axis=0)
    return tl.minimum(accepted, count), count


@triton.jit
def _recover_kernel(
    raw_ptr: tl.tensor,
    raw_stride: tl.tensor,
    edited_ptr: tl.tensor,
    edited_stride: tl.tensor,
    slot_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    peak_token_ptr: tl.tensor,
    cut_key_ptr: tl.tensor,
    cut_last_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    sample_ptr: tl.tensor,
    position_ptr: tl.tensor,
    node_token_ptr: tl.tensor,
    first_node_ptr: tl.tensor,
    first_row_ptr: tl.tensor,
    law_ptr: tl.tensor,
    law_stride: tl.tensor,
    passes_ptr: tl.tensor,
    finish_ptr: tl.tensor,
    winner_ptr: tl.tensor,
    vocab: tl.tensor,
    TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NODES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_EDITS: tl.constexpr,
    HAS_CUT: tl.constexpr,
    HAS_LAWS: tl.constexpr,
) -> None:
    request = tl.program_id(0)
    chunk = tl.program_id(1)
    accepted, count = _end_of(request, passes_ptr, first_node_ptr, NODES)
    node = tl.load(first_node_ptr + request) + accepted
    rejected = accepted < count
    token = tl.load(node_token_ptr + node, mask=rejected, other=-1)
    row = tl.load(first_row_ptr + request) + accepted
    peak, best = load_peak(peak_ptr, peak_token_ptr, row, CHUNKS)
    finish = tl.full((), float("inf"), tl.float64)
    winner = tl.full((), 0x7FFFFFFF, tl.int32)
    if is_finite(peak):
        cut_key, cut_last = load_cut(cut_key_ptr, cut_last_ptr, row, HAS_CUT)
        mass = tl.sum(tl.load(mass_ptr + row * CHUNKS + tl.arange(0, CHUNKS)), axis=0)
        temperature = tl.load(temperature_ptr + row)
        scale = scale_of(temperature_ptr, row)
        key0 = tl.load(seed_ptr + row).to(tl.uint64, bitcast=True)
        key1 = tl.load(sample_ptr + row).to(tl.uint64, bitcast=True)
        position = tl.load(position_ptr + row).to(tl.uint64, bitcast=True)
        stream = tl.where(rejected, tl.full((), RESIDUAL, tl.uint64), tl.full((), TARGET, tl.uint64))
        for i in range(TILES):
            start = (chunk * TILES + i) * TILE
            ids = start + tl.arange(0, TILE)
            x = load_logits(raw_ptr, raw_stride, edited_ptr, edited_stride, slot_ptr, row, ids, vocab, scale, HAS_EDITS)
            p = token_weights(x, ids, vocab, peak, best, temperature, cut_key, cut_last) / mass
            if tl.max(p, axis=0) > 0.0:
                q = (ids == token).to(tl.float64)
                if HAS_LAWS:
                    laws = law_ptr + node.to(tl.int64) * law_stride + ids
                    q = tl.load(laws, mask=ids < tl.where(rejected, vocab, 0), other=0.0).to(tl.float64)
                words = noise_tile(start, position, stream, tl.full((), 0, tl.uint64), key0, key1, TILE)
                times = _times(-tl.log(uniform(words)), p, q)
                earliest = tl.min(times, axis=0)
                first = tl.min(tl.where(times == earliest, ids, 0x7FFFFFFF), axis=0)
                winner = tl.where(earliest < finish, first, winner)
                finish = tl.minimum(earliest, finish)
    tl.store(finish_ptr + request * CHUNKS + chunk, finish)
    tl.store(winner_ptr + request * CHUNKS + chunk, winner)


@triton.jit
def _times(noise: tl.tensor, p: tl.tensor, q: tl.tensor) -> Any:
    """Finishes under the weights (p - q)+; what has none comes far behind, under p.  # fp64, like p

    So the law is p itself where p and q agree to the last bit, and tokens outside of p never finish.
    """
    excess = tl.maximum(p - q, 0.0)
    late = tl.where(p > 0.0, noise / tl.where(p > 0.0, p, 1.0) * 1e200, float("inf"))
    return tl.where(excess > 0.0, noise / tl.where(excess > 0.0, excess, 1.0), late)


@triton.jit
def _collect_kernel(
    passes_ptr: tl.tensor,
    finish_ptr: tl.tensor,
    winner_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    node_token_ptr: tl.tensor,
    first_node_ptr: tl.tensor,
    first_row_ptr: tl.tensor,
    path_ptr: tl.tensor,
    token_ptr: tl.tensor,
    count_ptr: tl.tensor,
    chunks: tl.tensor,
    max_depth: tl.tensor,
    NODES: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    request = tl.program_id(0)
    accepted, _ = _end_of(request, passes_ptr, first_node_ptr, NODES)
    chunk = tl.arange(0, CHUNKS)
    times = tl.load(finish_ptr + request * CHUNKS + chunk, mask=chunk < chunks, other=float("inf"))
    winners = tl.load(winner_ptr + request * CHUNKS + chunk, mask=chunk < chunks, other=0x7FFFFFFF)
    last = tl.min(tl.where(times == tl.min(times, axis=0), winners, 0x7FFFFFFF), axis=0)
    root = tl.load(first_row_ptr + request)
    sound = is_finite(tl.max(tl.load(peak_ptr + (root + accepted) * CHUNKS + chunk), axis=0))
    number = tl.arange(0, NODES)
    inside = number < accepted
    tokens = tl.load(node_token_ptr + tl.load(first_node_ptr + request) + number, mask=inside, other=0)
    tl.store(token_ptr + request * (max_depth + 1) + number, tokens, mask=inside)
    tl.store(token_ptr + request * (max_depth + 1) + accepted, tl.where(sound, last, 0))
    tl.store(path_ptr + request * max_depth + number, root + 1 + number, mask=inside)
    tl.store(count_ptr + request, tl.where(sound, accepted + 1, 0))


def walk_rejection(
    rows: LogitRows,
    places: Places,
    temperature: torch.Tensor,
    peaks: Peaks,
    trees: Trees,
    cut: Cut | None = None,
    laws: torch.Tensor | None = None,
) -> Walks:
    """Test the tokens of every chain in order.

    Args:
        rows: the target's logits: each request's root, then its nodes.
        places: noise of every row, at the position of the token after it; it must not have made the draft.
        temperature: fp32; a greedy row's law is its likeliest token.  # [rows]
        peaks: `find_peaks` of these rows.
        trees: chains.
        cut: what `find_cut` left; None: everything.
        laws: the probabilities that each node was drawn from, fp32; None: tokens were chosen.  # [num_nodes, vocab]
    """
    count, vocab = rows.raw.shape
    requests, device = len(trees.first_row), rows.raw.device
    nodes = max(16, triton.next_power_of_2(trees.max_nodes))
    chunks, tiles, tile = chunks_of(count, vocab)
    mass = find_masses(rows, temperature, peaks, cut)
    passes = torch.zeros((requests, nodes), dtype=torch.int8, device=device)
    finish = torch.empty((requests, MAX_CHUNKS), dtype=torch.float64, device=device)
    winner = torch.empty((requests, MAX_CHUNKS), dtype=torch.int32, device=device)
    bounds = (temperature, temperature) if cut is None else (cut.key, cut.last)
    law = (*rows.arguments(), temperature, peaks.logit, peaks.token, *bounds, mass)
    flags = {"CHUNKS": MAX_CHUNKS, "HAS_EDITS": rows.has_edits, "HAS_CUT": cut is not None}
    noise = (places.seed, places.sample_index, places.position)
    q = (mass, 0) if laws is None else (laws, laws.stride(0))
    chain = (*law, *noise, trees.tokens, trees.first_node, trees.first_row, *q, passes)
    flags |= {"NODES": nodes, "HAS_LAWS": laws is not None}
    if trees.max_nodes:
        _test_kernel[(requests, trees.max_nodes)](*chain, vocab, ACCEPT=int(Stream.ACCEPT), **flags)
    streams = {"TARGET": int(Stream.TARGET), "RESIDUAL": int(Stream.RESIDUAL)}
    _recover_kernel[(requests, chunks)](*chain, finish, winner, vocab, TILES=tiles, TILE=tile, **streams, **flags)
    path = torch.full((requests, trees.max_depth), NOTHING, dtype=torch.int32, device=device)
    tokens = torch.full((requests, trees.max_depth + 1), NOTHING, dtype=torch.int32, device=device)
    committed = torch.empty(requests, dtype=torch.int32, device=device)
    tree = (trees.tokens, trees.first_node, trees.first_row)
    _collect_kernel[(requests,)](
        passes, finish, winner, peaks.logit, *tree, path, tokens, committed, chunks, trees.max_depth,
        NODES=nodes, CHUNKS=MAX_CHUNKS,
    )  # fmt: skip
    return Walks(path, tokens, committed)
