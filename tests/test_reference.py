"""hstu_ext.reference and its gradients against scalar arithmetic, so that the rest can rest on it."""

from __future__ import annotations

import pytest
import torch

import reference
from attention_cases import NAMED, Case

SMALL = [case.shrunk() for case in NAMED]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_reference(case: Case) -> None:
    problem = case.problem("cpu", torch.float64)
    expected = {name: torch.zeros_like(x) for name, x in problem.inputs().items()}
    expected["out"] = torch.zeros_like(problem.dout)
    for b, (q0, len_q, k0, len_k) in enumerate(problem.spans()):
        rows, keys = slice(q0, q0 + len_q), slice(k0, k0 + len_k)
        for h in range(case.heads):
            rab = None
            rab_head = 0 if case.rab == "one" else h
            if problem.rab is not None:
                rab = problem.rab[b, rab_head, len_k - len_q : len_k, :len_k].tolist()
            bias, places = table_places(case, problem, b, h)
            head = reference.attention(
                problem.q[rows, h].tolist(),
                problem.k[keys, h].tolist(),
                problem.v[keys, h].tolist(),
                problem.dout[rows, h].tolist(),
                keep_rule(case, problem, b, h),
                case.alpha,
                problem.scaling,
                rab,
                bias,
            )
            for name, where in (("out", rows), ("q", rows), ("k", keys), ("v", keys)):
                values = head["out" if name == "out" else "d" + name]
                if values and values[0]:
                    expected[name][where, h] = torch.tensor(values, dtype=torch.float64)
            if problem.rab is not None and head["drab"] and len_k:
                square = expected["rab"][b, rab_head, len_k - len_q : len_k, :len_k]
                square += torch.tensor(head["drab"], dtype=torch.float64)
            for name, index in places.items():
                for i, row in enumerate(index):
                    for j, entry in enumerate(row):
                        (expected[name][h] if "heads" in case.bias else expected[name])[entry] += head["dbias"][i][j]
    actual = problem.run_reference()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}")


def table_places(case: Case, problem, b: int, h: int):
    """The dense bias of a sequence and head, and for each table the entry that each pair reads."""
    q0, len_q, k0, len_k = problem.spans()[b]
    if not case.bias:
        return None, {}
    places = {}
    if problem.position_table is not None:
        reach = case.max_len - 1
        places["position_table"] = [
            [max(-reach, min(reach, i + len_k - len_q - j)) + reach for j in range(len_k)] for i in range(len_q)
        ]
    if problem.time_table is not None:
        query_times = problem.query_times[q0 : q0 + len_q].tolist()
        key_times = problem.key_times[k0 : k0 + len_k].tolist()
        places["time_table"] = [
            [reference.bucket(abs(t - u), case.num_buckets) for u in key_times] for t in query_times
        ]
    bias = [[0.0] * len_k for _ in range(len_q)]
    for name, index in places.items():
        table = getattr(problem, name)
        entries = (table[h] if table.dim() == 2 else table).tolist()
        bias = [[x + entries[e] for x, e in zip(values, row)] for values, row in zip(bias, index)]
    return bias, places


def keep_rule(case: Case, problem, b: int, h: int) -> reference.Keep:
    q0, len_q, _, len_k = problem.spans()[b]
    if problem.func is not None:
        bounds = problem.func[h if problem.func.shape[0] > 1 else 0][:, q0 : q0 + len_q].tolist()
        return reference.interval(bounds)
    if case.contexts is not None or case.targets is not None:
        contexts = case.contexts[b] if case.contexts else 0
        targets = case.targets[b] if case.targets else 0
        return reference.target(len_q, len_k, contexts, targets, case.group)
    return reference.window(len_q, len_k, *case.window)
