"""RetrievalGR: next-item retrieval with a sequence encoder over packed events.

Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
Recommendations" (ICML 2024), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu_ext.models.hstu import HSTUBlock
from hstu_ext.models.sasrec import SASRecBlock
from hstu_ext.models.sequence import SequenceBlock, rows_of, sequence_ids
from hstu_ext.models.similarity import DotProductSimilarity, L2NormEmbeddingPostprocessor
from hstu_ext.models.towers import ContextTower, ItemTower

if TYPE_CHECKING:
    from hstu_ext.models.catalogue import Catalogue
    from hstu_ext.training.config import Config


class RetrievalGR(nn.Module):
    """Two towers: the state of a user after every event, and the items, met by cosine similarity.

        x_t = sqrt(dim) item(t)                 with actions and contexts as tokens of their own
        h = encoder(x)                          [total, dim], h_t has seen events 0 to t
        query_t = h_t / |h_t|,  item_j = table_j / |table_j|
        loss = softmax cross entropy of query_t . item_(t + 1) / temperature

    Every call takes the packed events of a batch, without padding: items int64 [total], cu_seqlens int32
    [batch + 1], max_seqlen the longest length or more (at most encoder.max_len), and where the model was built with
    them actions int64 [total], contexts int64 [batch, number of features] and times int64 [total], with request_times
    int64 [batch], when what follows the last events is asked for (None: at their own times). Rows past cu_seqlens[-1]
    belong to no sequence, take no part in the loss, and let batches of different sizes have one shape.

    Args:
        items: the item tower.
        encoder: HSTUBlock, SASRecBlock, or any SequenceBlock.
        loss: (query, table, positives, weights, sequences) -> scalar, as in hstu_ext.training.losses.
        actions: embedding of the actions, where the encoder interleaves them.
        contexts: the tower of user features, where the encoder has contexts.
        last_only: the loss is that of each sequence's last event, predicted from the one before.
        eps: the least norm that an embedding is divided by.
    """

    def __init__(
        self,
        items: ItemTower,
        encoder: SequenceBlock,
        loss: nn.Module,
        *,
        actions: nn.Embedding | None = None,
        contexts: ContextTower | None = None,
        last_only: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.items, self.encoder, self.criterion = items, encoder, loss
        self.actions, self.contexts, self.last_only = actions, contexts, last_only
        self.postprocessor = L2NormEmbeddingPostprocessor(eps)
        self.similarity = DotProductSimilarity()

    @staticmethod
    def from_config(config: Config, catalogue: Catalogue) -> RetrievalGR:
        """The model of a configuration, with fresh parameters from torch's default generator.

        Raises:
            ValueError: the configuration asks for features or actions that the catalogue does not have.
        """
        from hstu_ext.training.losses import loss_from_config

        model = config.model
        interleave = model.actions == "interleave"
        for key, wanted, there in (
            ("contexts", model.contexts, list(catalogue.user_feature_sizes)),
            ("item_features", model.item_features, list(catalogue.item_features)),
        ):
            for name in wanted:
                if name not in there:
                    raise ValueError(
                        f"hstu_ext.config: model.{key} must be among the data's ({', '.join(there) or 'none'}), "
                        f"got {name!r}"
                    )
        if interleave and not catalogue.action_names:
            raise ValueError("hstu_ext.config: model.actions must be none for data without actions, got 'interleave'")

        if "time" in model.bias and not catalogue.has_times:
            raise ValueError(
                f"hstu_ext.config: model.bias must be none or position for data without timestamps, got {model.bias!r}"
            )
        contexts, actions = None, None
        if model.contexts:
            contexts = ContextTower({name: catalogue.user_feature_sizes[name] for name in model.contexts}, model.dim)
        if interleave:
            actions = nn.Embedding(len(catalogue.action_names), model.dim)
            nn.init.normal_(actions.weight, std=model.dim**-0.5)
        common: dict[str, Any] = {
            "dim": model.dim,
            "num_layers": model.num_layers,
            "heads": model.num_heads,
            "head_dim": model.head_dim,
            "max_len": model.max_len,
            "num_contexts": len(model.contexts),
            "interleave": interleave,
            "dropout": model.dropout,
            "recompute": config.training.recompute,
        }
        encoder: SequenceBlock
        if model.encoder == "hstu":
            encoder = HSTUBlock(**common, alpha=model.attention_alpha or None, bias=model.bias)
        else:
            encoder = SASRecBlock(**common, ffn_dim=model.ffn_dim)
        features = {name: catalogue.item_features[name] for name in model.item_features}
        return RetrievalGR(
            ItemTower(catalogue.num_items, model.dim, features, model.feature_dim),
            encoder,
            loss_from_config(config, catalogue),
            actions=actions,
            contexts=contexts,
            last_only=config.loss.supervision == "last",
            eps=model.eps,
        )

    def forward(
        self,
        items: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        actions: Tensor | None = None,
        contexts: Tensor | None = None,
        times: Tensor | None = None,
        request_times: Tensor | None = None,
    ) -> Tensor:
        """Queries [total, dim] of unit length; row t has seen the events of its sequence up to and including t."""
        states = self._states(
            self.items.table(), items, cu_seqlens, max_seqlen, actions, contexts, times, request_times
        )
        return self._normalise(states)

    def loss(
        self,
        items: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        actions: Tensor | None = None,
        contexts: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """Mean loss over every position that has a next item in its sequence (or the last one, with last_only).

        All shapes follow from those of the arguments and nothing is read back from a device: positions without a next
        item are there with weight 0.
        """
        table = self.items.table()
        states = self._states(table, items, cu_seqlens, max_seqlen, actions, contexts, times)
        sequence = sequence_ids(cu_seqlens, items.shape[0])
        if self.last_only:
            rows = (cu_seqlens[1:].long() - 2).clamp(min=0)
            following = (rows + 1).clamp(max=items.shape[0] - 1)
            states, positives, weights = states[rows], items[following], cu_seqlens.diff() >= 2
            sequences = sequence[following]
        else:
            positives, sequences = items.roll(-1), sequence.roll(-1)
            weights = F.pad((sequence[:-1] == sequence[1:]) & (sequence[1:] < cu_seqlens.shape[0] - 1), (0, 1))
        loss: Tensor = self.criterion(states, table.to(states.dtype), positives, weights.to(states.dtype), sequences)
        return loss

    def num_predictions(self, cu_seqlens: Tensor) -> Tensor:
        """int64 scalar: positions that loss() is the mean over."""
        lengths = cu_seqlens.long().diff()
        return (lengths >= 2).sum() if self.last_only else (lengths - 1).clamp(min=0).sum()

    def encode_query(
        self,
        items: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        actions: Tensor | None = None,
        contexts: Tensor | None = None,
        times: Tensor | None = None,
        request_times: Tensor | None = None,
    ) -> Tensor:
        """Queries [batch, dim] of unit length for what follows each sequence's last event. None may be empty."""
        states = self._states(
            self.items.table(), items, cu_seqlens, max_seqlen, actions, contexts, times, request_times
        )
        return self._normalise(states[cu_seqlens[1:].long() - 1])

    def item_embeddings(self) -> Tensor:
        """[num_items, dim] of unit length: what queries are compared with."""
        return self._normalise(self.items.table())

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence[int]],
        k: int = 10,
        *,
        actions: Sequence[Sequence[int]] | None = None,
        contexts: Sequence[Sequence[int]] | None = None,
        times: Sequence[Sequence[int]] | None = None,
        request_times: Sequence[int] | None = None,
        exclude_seen: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The k items with the highest cosine similarity for users with these histories.

        The model reads the last encoder.max_len events of each; all of them count as seen.

        Args:
            histories: of each user, item indices from 0, oldest first; at least one.
            k: 1 to num_items.
            actions: of each event, where the model was built with them.
            contexts: of each user, the values of the features that the model was built with.
            times: of each event, where the model was built with them.
            request_times: of each user, the time of the recommendation; None for that of the last event.
            exclude_seen: leave out the items of a user's own history.

        Returns:
            scores float32 [users, k] and items int64 [users, k], the best first; -inf and -1 where none is left.

        Raises:
            ValueError: a history is empty, or holds what is no item.
        """
        device = self.items.embedding.weight.device
        for user, history in enumerate(histories):
            if not history or min(history) < 0 or max(history) >= self.items.num_items:
                got = "an empty list" if not history else f"{min(history)} to {max(history)}"
                last = self.items.num_items - 1
                raise ValueError(f"hstu_ext.models: histories[{user}] must be items from 0 to {last}, got {got}")
        for name, given in (("actions", actions), ("contexts", contexts), ("times", times)):
            if given is not None and len(given) != len(histories):
                raise ValueError(f"hstu_ext.models: {name} must be of {len(histories)} users, got {len(given)}")
        for name, of_events in (("actions", actions), ("times", times)):
            for user, (history, row) in enumerate(zip(histories, of_events or [])):
                if len(row) != len(history):
                    raise ValueError(f"hstu_ext.models: {name}[{user}] must be {len(history)}, got {len(row)}")

        def latest(rows: Sequence[Sequence[int]]) -> list[list[int]]:
            return [list(row)[-self.encoder.max_len :] for row in rows]

        read = latest(histories)
        cu_seqlens = _offsets(read, torch.int32).to(device)
        was_training = self.training
        self.eval()
        query = self.encode_query(
            _flat(read).to(device),
            cu_seqlens,
            max(map(len, read), default=0),
            None if actions is None else _flat(latest(actions)).to(device),
            None if contexts is None else torch.tensor([list(row) for row in contexts], device=device),
            None if times is None else _flat(latest(times)).to(device),
            None if request_times is None else torch.tensor(list(request_times), device=device),
        )
        exclude = (_flat(histories).to(device), _offsets(histories, torch.int64).to(device)) if exclude_seen else None
        found = self.similarity.topk(query, self.item_embeddings(), k, exclude)
        self.train(was_training)
        return found

    def _states(
        self,
        table: Tensor,
        items: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        actions: Tensor | None,
        contexts: Tensor | None,
        times: Tensor | None = None,
        request_times: Tensor | None = None,
    ) -> Tensor:
        """[total, dim] before normalisation."""
        states: Tensor = self.encoder(
            rows_of(table, items) * self.items.dim**0.5,
            cu_seqlens,
            max_seqlen,
            actions if actions is None or self.actions is None else self.actions(actions),
            contexts if contexts is None or self.contexts is None else self.contexts(contexts),
            times,
            request_times,
        )
        return states

    def _normalise(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.postprocessor(x)
        return normalised


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.int64)


def _offsets(rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([0] + [len(row) for row in rows]).cumsum(0).to(dtype)
