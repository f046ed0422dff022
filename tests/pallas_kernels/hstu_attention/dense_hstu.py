"""HSTU attention with a whole [T, T] matrix of scores, written from the docstring of the op."""

import numpy as np


def roles(offsets, num_tokens, num_targets, contextual_len):
    """For each slot its sequence (-1 for none), its role, its place and its distance to the end.

    All contextual tokens stand at place 0, history at 1 … n, all targets at n + 1.
    """
    rows = [(-1, "none", 0, 0)] * num_tokens
    for b in range(len(offsets) - 1):
        length = offsets[b + 1] - offsets[b]
        targets = 0 if num_targets is None else num_targets[b]
        history = length - contextual_len - targets
        for i in range(length):
            if i < contextual_len:
                row = (b, "contextual", 0, history + 1)
            elif i < contextual_len + history:
                place = i - contextual_len + 1
                row = (b, "history", place, history + 1 - place)
            else:
                row = (b, "target", history + 1, 0)
            rows[offsets[b] + i] = row
    return rows


def dense_mask(
    offsets, num_tokens, *, num_targets=None, max_attn_len=0, contextual_len=0, min_full_attn_len=0
):
    mask = np.zeros((num_tokens, num_tokens), bool)
    slots = roles(offsets, num_tokens, num_targets, contextual_len)
    for t, (sequence, role, place, to_end) in enumerate(slots):
        for s, (other, key_role, key_place, _) in enumerate(slots):
            if sequence < 0 or sequence != other:
                continue
            if t == s:
                mask[t, s] = True
            elif key_role == "target" or (role == "history" and s > t):
                continue
            elif role == "contextual" or max_attn_len == 0:
                mask[t, s] = True
            else:
                full = min_full_attn_len > 0 and to_end <= min_full_attn_len
                mask[t, s] = full or place - key_place <= max_attn_len
    return mask


def buckets(timestamps, num_buckets):
    elapsed = np.abs(timestamps[:, None].astype(np.int64) - timestamps[None, :])
    return np.minimum(np.floor(2 * np.log2(1.0 + elapsed)), num_buckets - 1).astype(int)


def dense_hstu(
    xp, q, k, v, mask, *, alpha=1.0, scale, position_bias=None, time_bias=None, timestamps=None
):
    """`xp` is numpy or jax.numpy; arguments beyond the mask as in the op."""
    scores = alpha * xp.einsum("thd,shd->hts", q, k)
    if position_bias is not None:
        distance = np.arange(len(q))[:, None] - np.arange(len(q))
        scores = scores + position_bias[:, np.clip(distance, 0, position_bias.shape[1] - 1)]
    if time_bias is not None:
        scores = scores + time_bias[:, buckets(timestamps, time_bias.shape[1])]
    weights = xp.where(mask, scores / (1 + xp.exp(-scores)), 0)
    return xp.einsum("hts,shd->thd", weights, v) * scale
