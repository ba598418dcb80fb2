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
            head = reference.attention(
                problem.q[rows, h].tolist(),
                problem.k[keys, h].tolist(),
                problem.v[keys, h].tolist(),
                problem.dout[rows, h].tolist(),
                keep_rule(case, problem, b, h),
                case.alpha,
                problem.scaling,
                rab,
            )
            for name, where in (("out", rows), ("q", rows), ("k", keys), ("v", keys)):
                values = head["out" if name == "out" else "d" + name]
                if values and values[0]:
                    expected[name][where, h] = torch.tensor(values, dtype=torch.float64)
            if problem.rab is not None and head["drab"] and len_k:
                square = expected["rab"][b, rab_head, len_k - len_q : len_k, :len_k]
                square += torch.tensor(head["drab"], dtype=torch.float64)
    actual = problem.run_reference()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}")


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
