"""The definition once more, one scalar at a time. It checks hstu_ext.masks and hstu_ext.reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Keep = Callable[[int, int], bool]
Matrix = Sequence[Sequence[float]]  # [rows][dim]


def window(len_q: int, len_k: int, left: int, right: int) -> Keep:
    def keep(i: int, j: int) -> bool:
        p = i + len_k - len_q
        if left >= 0 and j < p - left:
            return False
        return not (right >= 0 and j > p + right)

    return keep


def target(len_q: int, len_k: int, contexts: int, targets: int, group: int) -> Keep:
    parts = ["context"] * contexts + ["history"] * (len_k - contexts - targets) + ["target"] * targets
    groups = [None] * (len_k - targets) + [n // group for n in range(targets)]

    def keep(i: int, j: int) -> bool:
        p = i + len_k - len_q
        if p < 0:
            return False
        if parts[p] == "context":
            return parts[j] != "target"
        if parts[p] == "history" or parts[j] == "target":
            return j <= p and groups[p] == groups[j] if parts[p] == "target" else j <= p
        return True

    return keep


def interval(bounds: Sequence[Sequence[int]]) -> Keep:
    def keep(i: int, j: int) -> bool:
        ends = [0] + [row[i] for row in bounds]
        return any(ends[m] <= j < ends[m + 1] for m in range(0, len(ends), 2))

    return keep


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def silu_derivative(x: float) -> float:
    s = 1 / (1 + math.exp(-x))
    return s * (1 + x * (1 - s))


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b))


def bucket(x: int, num_buckets: int) -> int:
    return min(math.floor(math.log(max(x, 1)) / 0.301), num_buckets)


def attention(
    q: Matrix,
    k: Matrix,
    v: Matrix,
    dout: Matrix,
    keep: Keep,
    alpha: float,
    scaling: int,
    rab: Matrix | None,
    bias: Matrix | None = None,
) -> dict[str, list[list[float]]]:
    """One sequence, one head: out and the gradients of q, k, v, rab and the bias ([len_q][len_k])."""
    out = [[0.0] * len(v[0]) for _ in q] if v else [[] for _ in q]
    dq = [[0.0] * len(row) for row in q]
    dk = [[0.0] * len(row) for row in k]
    dv = [[0.0] * len(row) for row in v]
    drab = [[0.0] * len(k) for _ in q]
    dbias = [[0.0] * len(k) for _ in q]
    for i in range(len(q)):
        for j in range(len(k)):
            if not keep(i, j):
                continue
            score = alpha * (dot(q[i], k[j]) + (rab[i][j] if rab else 0.0)) + (bias[i][j] if bias else 0.0)
            weight = silu(score) / scaling
            slope = silu_derivative(score) / scaling * dot(dout[i], v[j])
            drab[i][j] = alpha * slope
            dbias[i][j] = slope
            for d in range(len(v[j])):
                out[i][d] += weight * v[j][d]
                dv[j][d] += weight * dout[i][d]
            for d in range(len(q[i])):
                dq[i][d] += alpha * slope * k[j][d]
                dk[j][d] += alpha * slope * q[i][d]
    return {"out": out, "dq": dq, "dk": dk, "dv": dv, "drab": drab, "dbias": dbias}
