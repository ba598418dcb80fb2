"""The retrieval model and its parts against eager copies of themselves, written densely, one sequence at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_ext.data import InteractionLog
from hstu_ext.models import (
    Catalogue,
    CosineSimilarity,
    DotProductSimilarity,
    HSTULayer,
    ItemTower,
    L2NormEmbeddingPostprocessor,
    RetrievalGR,
    SASRecLayer,
)
from hstu_ext.training import Config

NUM_ITEMS, MAX_LEN = 40, 12
LENGTHS = {"ragged": [7, 1, 12, 2], "one": [5], "empty": [0, 9, 0, 3]}


def catalogue() -> Catalogue:
    generator = torch.Generator().manual_seed(5)
    return Catalogue(
        [str(item) for item in range(NUM_ITEMS)],
        torch.randint(0, 9, (NUM_ITEMS,), generator=generator),
        item_features={
            "year": torch.randint(0, 6, (NUM_ITEMS,), generator=generator),
            "genres": torch.randint(0, 2, (NUM_ITEMS, 3), generator=generator).float(),
        },
        user_feature_sizes={"age": 4, "gender": 3},
        action_names=("low", "middle", "high"),
        has_times=True,
    )


def model_of(loss: dict[str, Any] | None = None, **model: Any) -> RetrievalGR:
    torch.manual_seed(0)
    options = {"dim": 24, "num_heads": 2, "head_dim": 16, "ffn_dim": 20, "max_len": MAX_LEN, "dropout": 0.0}
    config = Config.from_dict({"model": {**options, **model}, "loss": {"kind": "full", **(loss or {})}})
    built = RetrievalGR.from_config(config, catalogue()).double()
    for parameter in built.parameters():  # away from the small ones at the start, which would hide errors
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return built


def inputs_of(lengths: list[int], model: RetrievalGR) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    total = sum(lengths)
    inputs: dict[str, Any] = {
        "items": torch.randint(NUM_ITEMS, (total,), generator=generator),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
    }
    if model.actions is not None:
        inputs["actions"] = torch.randint(3, (total,), generator=generator)
    if model.contexts is not None:
        sizes = [embedding.num_embeddings for embedding in model.contexts.embeddings]
        columns = [torch.randint(size, (len(lengths),), generator=generator) for size in sizes]
        inputs["contexts"] = torch.stack(columns, dim=1)
    if model.encoder.uses_times:  # with ties
        steps = torch.randint(4, (total,), generator=generator) ** 9
        inputs["times"] = 1_700_000_000 + steps.cumsum(0)
    return inputs


def eager_table(model: RetrievalGR) -> Tensor:
    table = model.items.embedding.weight
    if not model.items.names:
        return table
    features = catalogue().item_features
    parts = [features["genres"].double(), model.items.categories["year"].weight[features["year"]]]
    first, _, second = model.items.network
    hidden = (torch.cat(parts, dim=1) @ first.weight.T + first.bias).clamp(min=0)
    return table + hidden @ second.weight.T + second.bias


def norm(x: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def eager_bias(layer: HSTULayer, query_times: list[int], key_times: list[int]) -> Tensor:
    rows = []
    for i, query_time in enumerate(query_times):
        row = []
        for j, key_time in enumerate(key_times):
            value = torch.zeros((), dtype=torch.float64)
            if layer.bias.position_table is not None:
                value = value + layer.bias.position_table[i - j + layer.max_tokens - 1]
            if layer.bias.time_table is not None:
                apart = max(abs(query_time - key_time), 1)
                value = value + layer.bias.time_table[min(math.floor(math.log(apart) / 0.301), 128)]
            row.append(value)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def eager_hstu(layer: HSTULayer, x: Tensor, contexts: int, query_times: list[int], key_times: list[int]) -> Tensor:
    width, tokens = layer.heads * layer.head_dim, x.shape[0]
    q, k, v, u = F.silu(norm(x, 1e-6) @ layer.qkvu.weight.T).split(width, dim=-1)
    keep = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    keep[:contexts] = True  # a context sees all contexts and the history
    heads = []
    for h in range(layer.heads):
        columns = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
        scores = q[:, columns] @ k[:, columns].T * layer.alpha
        if layer.bias is not None:
            scores = scores + eager_bias(layer, query_times, key_times)
        heads.append(F.silu(scores) * keep / layer.max_tokens @ v[:, columns])
    return x + (norm(torch.cat(heads, dim=-1), 1e-6) * u) @ layer.out.weight.T + layer.out.bias


def eager_sasrec(layer: SASRecLayer, x: Tensor) -> Tensor:
    width, tokens = layer.heads * layer.head_dim, x.shape[0]
    normed = norm(x, 1e-5) * layer.norm_attention.weight + layer.norm_attention.bias
    q, k, v = (normed @ layer.qkv.weight.T + layer.qkv.bias).split(width, dim=-1)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    heads = []
    for h in range(layer.heads):
        columns = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
        scores = q[:, columns] @ k[:, columns].T / math.sqrt(layer.head_dim)
        heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, columns])
    x = x + torch.cat(heads, dim=-1) @ layer.out.weight.T + layer.out.bias
    normed = norm(x, 1e-5) * layer.norm_ffn.weight + layer.norm_ffn.bias
    inner = (normed @ layer.ffn_in.weight.T + layer.ffn_in.bias).clamp(min=0)
    return x + inner @ layer.ffn_out.weight.T + layer.ffn_out.bias


def eager_states(model: RetrievalGR, inputs: dict[str, Any], sequence: int) -> Tensor:
    """States [length, dim] of one sequence, not normalised."""
    rows = slice(*inputs["cu_seqlens"][sequence : sequence + 2].tolist())
    tokens: list[Tensor] = []
    is_item: list[bool] = []
    if model.contexts is not None:
        for value, embedding in zip(inputs["contexts"][sequence], model.contexts.embeddings):
            tokens.append(embedding.weight[value])
            is_item.append(False)
    contexts = len(tokens)
    length = rows.stop - rows.start
    times = inputs["times"][rows].tolist() if "times" in inputs else [0] * length
    asked = int(inputs["request_times"][sequence]) if "request_times" in inputs else (times or [0])[-1]
    following = [*times[1:], asked]
    key_times, query_times = times[:1] * contexts, following[:1] * contexts
    for n, item in enumerate(inputs["items"][rows]):
        tokens.append(eager_table(model)[item] * math.sqrt(model.items.dim))
        is_item.append(True)
        for _ in range(1 if model.actions is None else 2):
            key_times.append(times[n])
            query_times.append(following[n])
        if model.actions is not None:
            tokens.append(model.actions.weight[inputs["actions"][rows][n]])
            is_item.append(False)
    if not any(is_item):
        return torch.zeros(0, model.items.dim, dtype=torch.float64)
    x = torch.stack(tokens) + model.encoder.positions.weight[: len(tokens)]
    for layer in model.encoder.layers:
        if isinstance(layer, HSTULayer):
            x = eager_hstu(layer, x, contexts, query_times, key_times)
        else:
            x = eager_sasrec(layer, x)
    return x[torch.tensor(is_item)]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def eager_loss(model: RetrievalGR, inputs: dict[str, Any], last_only: bool) -> Tensor:
    """The full softmax."""
    items = unit(eager_table(model))
    offsets = inputs["cu_seqlens"].tolist()
    losses = []
    for sequence in range(len(offsets) - 1):
        ids = inputs["items"][offsets[sequence] : offsets[sequence + 1]]
        logits = unit(eager_states(model, inputs, sequence)) @ items.T / 0.05
        found = [torch.logsumexp(row, 0) - row[item] for row, item in zip(logits[:-1], ids[1:])]
        losses += found[-1:] if last_only else found
    return torch.stack(losses).mean()


VARIANTS = {
    "hstu": {},
    "hstu-one-odd-head": {"num_heads": 1, "head_dim": 50},
    "hstu-odd-heads": {"num_heads": 3, "head_dim": 5, "contexts": ["age"]},
    "hstu-times": {"bias": "time"},
    "hstu-times-positions": {"bias": "time+position", "contexts": ["age", "gender"], "actions": "interleave"},
    "hstu-bias": {"bias": "position", "head_dim": 5, "contexts": ["gender"], "actions": "interleave"},
    "hstu-contexts": {"contexts": ["age", "gender"]},
    "hstu-actions": {"actions": "interleave"},
    "hstu-all": {"contexts": ["gender"], "actions": "interleave", "item_features": ["year", "genres"]},
    "sasrec": {"encoder": "sasrec"},
    "sasrec-all": {
        "encoder": "sasrec",
        "contexts": ["age"],
        "actions": "interleave",
        "item_features": ["genres", "year"],
    },
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("last_only", [False, True], ids=["all", "last"])
def test_model_matches_its_eager_copy(variant: dict[str, Any], lengths: list[int], last_only: bool) -> None:
    model = model_of({"supervision": "last" if last_only else "all"}, **variant)
    inputs = inputs_of(lengths, model)
    queries = model(**inputs)
    expected = torch.cat([unit(eager_states(model, inputs, n)) for n in range(len(lengths))])
    torch.testing.assert_close(queries, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.item_embeddings(), unit(eager_table(model)), rtol=1e-9, atol=1e-9)

    loss, expected_loss = model.loss(**inputs), eager_loss(model, inputs, last_only)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-9)
    named = dict(model.named_parameters())
    got = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    wanted = torch.autograd.grad(expected_loss, list(named.values()), allow_unused=True)
    for name, ours, theirs in zip(named, got, wanted):
        reference = torch.zeros_like(named[name]) if theirs is None else theirs
        ours = torch.zeros_like(named[name]) if ours is None else ours
        torch.testing.assert_close(ours, reference, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")

    count = sum(length >= 2 if last_only else max(length - 1, 0) for length in lengths)
    assert int(model.num_predictions(inputs["cu_seqlens"])) == count


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("last_only", [False, True], ids=["all", "last"])
def test_rows_of_no_sequence_change_nothing(variant: dict[str, Any], lengths: list[int], last_only: bool) -> None:
    """As many as there may be: more than any position has an embedding for."""
    model = model_of({"supervision": "last" if last_only else "all"}, **variant)
    inputs = inputs_of(lengths, model)
    padded = {**inputs, "max_seqlen": MAX_LEN}
    for name in ("items", "actions", "times"):
        if name in inputs:
            padded[name] = torch.cat([inputs[name], torch.arange(3 * MAX_LEN) % 3])
    parameters = list(model.parameters())
    found = []
    for each in (inputs, padded):
        loss = model.loss(**each)
        found.append((loss, *torch.autograd.grad(loss, parameters, allow_unused=True)))
    for exact, with_rows in zip(*found):
        if exact is not None:
            torch.testing.assert_close(with_rows, exact, rtol=1e-10, atol=1e-12)
        else:
            assert with_rows is None or not with_rows.any()


@pytest.mark.parametrize("encoder", ["hstu", "sasrec"])
def test_recompute_changes_nothing(encoder: str) -> None:
    model = model_of(encoder=encoder, dropout=0.5, contexts=["age"])
    inputs = inputs_of(LENGTHS["ragged"], model)
    parameters = list(model.parameters())
    found = []
    for recompute in (False, True):
        model.encoder.recompute = recompute
        torch.manual_seed(1)
        loss = model.loss(**inputs)
        found.append((loss, *torch.autograd.grad(loss, parameters, allow_unused=True)))
    for plain, again in zip(*found):
        assert (plain is None and again is None) or torch.equal(plain, again)


@pytest.mark.plain_allocations
@pytest.mark.parametrize("variant", ["hstu", "hstu-all", "hstu-times-positions", "sasrec"])
def test_compiled_loss_is_the_same(variant: str) -> None:
    torch._dynamo.reset()
    model = model_of(**VARIANTS[variant])
    compiled = torch.compile(model.loss, dynamic=True, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    for lengths in (LENGTHS["ragged"], [3, 8], [5, 2, 12, 6, 9]):
        inputs = inputs_of(lengths, model)
        loss, expected = compiled(**inputs), model.loss(**inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        got = torch.autograd.grad(loss, parameters, allow_unused=True)
        wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
        for ours, theirs in zip(got, wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("last_only", [False, True], ids=["all", "last"])
def test_the_loss_is_told_the_sequence_of_every_positive(last_only: bool) -> None:
    model = model_of({"supervision": "last" if last_only else "all"})
    told: list[Tensor] = []
    model.criterion.forward = lambda query, table, positives, weights, sequences: told.extend(
        (positives[weights > 0], sequences[weights > 0])
    )
    inputs = inputs_of([3, 1, 0, 4], model)
    model.loss(**inputs)
    positives, sequences = told
    rows = [2, 7] if last_only else [1, 2, 5, 6, 7]
    assert positives.tolist() == inputs["items"][rows].tolist()
    assert sequences.tolist() == ([0, 3] if last_only else [0, 0, 3, 3, 3])


@pytest.mark.parametrize("variant", ["hstu-all", "sasrec-all"])
@pytest.mark.parametrize("kind", ["sampled", "in_batch", "full"])
def test_autocast_to_bf16_is_close(variant: str, kind: str) -> None:
    model = model_of({"kind": kind, "temperature": 1.0}, **VARIANTS[variant]).float()
    inputs = inputs_of(LENGTHS["ragged"], model)
    parameters = list(model.parameters())
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.loss(**inputs)
        gradients = [each for each in torch.autograd.grad(loss, parameters, allow_unused=True) if each is not None]
        found.append((loss, torch.cat([each.flatten() for each in gradients])))
    (loss, gradient), (rounded_loss, rounded_gradient) = found
    assert rounded_loss.dtype == rounded_gradient.dtype == torch.float32
    assert not torch.equal(rounded_loss, loss)
    torch.testing.assert_close(rounded_loss, loss, rtol=0.01, atol=0.01)
    assert (rounded_gradient - gradient).norm() <= 0.15 * gradient.norm()


@pytest.mark.parametrize("encoder", ["hstu", "sasrec"])
def test_states_see_neither_the_future_nor_the_neighbours(encoder: str) -> None:
    model = model_of(encoder=encoder)
    inputs = inputs_of([9, 4], model)
    changed = inputs["items"].clone()
    changed[8] = (changed[8] + 1) % NUM_ITEMS
    before, after = model(**inputs), model(**{**inputs, "items": changed})
    torch.testing.assert_close(before[:8], after[:8])
    torch.testing.assert_close(before[9:], after[9:])
    assert not torch.allclose(before[8], after[8])


def test_the_time_of_the_request_is_that_of_the_last_query() -> None:
    model = model_of(**VARIANTS["hstu-times-positions"])
    inputs = inputs_of([4, 1, 6], model)
    last = inputs["times"][[3, 4, 10]]
    by_default = model.encode_query(**inputs)
    torch.testing.assert_close(model.encode_query(**inputs, request_times=last), by_default)
    later = {**inputs, "request_times": last + torch.tensor([100, 100_000, 5])}
    found = model.encode_query(**later)
    expected = torch.stack([unit(eager_states(model, later, n))[-1] for n in range(3)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, by_default)
    assert torch.equal(model(**later)[:3], model(**inputs)[:3])


def test_encode_query_is_the_last_state() -> None:
    model = model_of(contexts=["age"])
    inputs = inputs_of([4, 1, 6], model)
    torch.testing.assert_close(model.encode_query(**inputs), model(**inputs)[[3, 4, 10]])


def test_recommend_ranks_the_unseen_by_cosine() -> None:
    model = model_of().eval()
    histories = [[3, 7, 1], [5], list(range(15, 30))]  # the last one is longer than max_len
    scores, items = model.recommend(histories, k=NUM_ITEMS)
    for user, history in enumerate(histories):
        read = torch.tensor(history[-MAX_LEN:])
        query = model.encode_query(read, torch.tensor([0, len(read)], dtype=torch.int32), len(read))
        cosine = (query @ model.item_embeddings().T)[0]
        cosine[history] = -math.inf
        left = NUM_ITEMS - len(history)
        order = cosine.argsort(descending=True)[:left]
        assert items[user].tolist() == order.tolist() + [-1] * len(history)
        torch.testing.assert_close(scores[user, :left], cosine[order])
    everything = model.recommend(histories[:1], k=NUM_ITEMS, exclude_seen=False)[1]
    assert sorted(everything[0].tolist()) == list(range(NUM_ITEMS))
    assert not model.training


def test_recommend_takes_actions_and_contexts() -> None:
    model = model_of(**VARIANTS["hstu-all"])
    first = model.recommend([[1, 2, 3]], 5, actions=[[0, 1, 2]], contexts=[[1]])
    other = model.recommend([[1, 2, 3]], 5, actions=[[2, 1, 2]], contexts=[[1]])
    third = model.recommend([[1, 2, 3]], 5, actions=[[0, 1, 2]], contexts=[[2]])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], third[0])
    assert model.training


def test_similarity_modules() -> None:
    query, items = torch.randn(5, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    postprocess = L2NormEmbeddingPostprocessor()
    cosine = unit(query) @ unit(items).T
    torch.testing.assert_close(postprocess(query), unit(query))
    torch.testing.assert_close(CosineSimilarity()(query, items), cosine)
    similarity = DotProductSimilarity()
    torch.testing.assert_close(similarity(postprocess(query), postprocess(items)), cosine)
    values, indices = similarity.topk(postprocess(query), postprocess(items), 4)
    assert torch.equal(indices, cosine.topk(4).indices)
    torch.testing.assert_close(values, cosine.topk(4).values)


def test_what_a_model_refuses() -> None:
    model = model_of()
    inputs = inputs_of([9], model)
    with pytest.raises(ValueError, match=r"hstu_ext.models: max_seqlen must be at most 12, got 13"):
        model(inputs["items"], inputs["cu_seqlens"], 13)
    with pytest.raises(ValueError, match=r"actions must be None, as the model has none, got a tensor"):
        model(**inputs, actions=inputs["items"])
    with pytest.raises(ValueError, match=r"contexts must be given, as the model was built with them, got None"):
        model_of(contexts=["age"])(**inputs)
    with pytest.raises(ValueError, match=r"histories\[1\] must be items from 0 to 39, got an empty list"):
        model.recommend([[1], []])
    with pytest.raises(ValueError, match=r"histories\[0\] must be items from 0 to 39, got -1 to 40"):
        model.recommend([[-1, 40]])
    with pytest.raises(ValueError, match=r"actions must be of 1 users, got 2"):
        model.recommend([[1, 2]], actions=[[1, 2], [1]])
    with pytest.raises(ValueError, match=r"actions\[0\] must be 2, got 3"):
        model.recommend([[1, 2]], actions=[[1, 2, 1]])
    with pytest.raises(ValueError, match=r"model.contexts must be among the data's \(age, gender\), got 'job'"):
        model_of(contexts=["job"])
    with pytest.raises(ValueError, match=r"model.item_features must be among the data's \(year, genres\), got 'x'"):
        model_of(item_features=["x"])
    with pytest.raises(ValueError, match=r"times must be given, as the model was built with them, got None"):
        model_of(bias="time")(**inputs)
    config = Config.from_dict({"model": {"bias": "time+position"}})
    with pytest.raises(
        ValueError, match=r"model.bias must be none or position for data without timestamps, got 'time\+position'"
    ):
        RetrievalGR.from_config(config, replace(catalogue(), has_times=False))
    config = Config.from_dict({"model": {"actions": "interleave"}})
    with pytest.raises(ValueError, match=r"model.actions must be none for data without actions, got 'interleave'"):
        RetrievalGR.from_config(config, replace(catalogue(), action_names=()))
    with pytest.raises(
        ValueError, match=r"'x' must be int64 \[4\] or floating point \[4, width\], got torch.int64 \[3\]"
    ):
        ItemTower(4, 8, {"x": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"'x' must be 0 or more, got -2"):
        ItemTower(2, 8, {"x": torch.tensor([-2, 1])})


def test_catalogue_of_a_log() -> None:
    log = InteractionLog.from_sequences([[1, 2, 1], [0, 1]], 4)
    found = Catalogue.from_log(log)
    assert found.num_items == 4
    assert found.counts.tolist() == [1, 3, 1, 0]
    assert found.title(2) == "2"
    assert replace(found, item_titles=["a", "b", "c", "d"]).title(2) == "c"


def test_loss_of_a_log_without_pairs_is_zero() -> None:
    model = model_of()
    inputs = inputs_of([1, 1, 1], model)
    assert model.loss(**inputs).item() == 0.0
