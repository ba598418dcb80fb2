"""What training and evaluating a retrieval model needs."""

from hstu_ext.training.metrics import hit_rate, ndcg, ranks_of

__all__ = ["hit_rate", "ndcg", "ranks_of"]
