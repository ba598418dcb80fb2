"""What training and evaluating a retrieval model needs."""

from hstu_ext.training.checkpoint import CheckpointError, load_model
from hstu_ext.training.config import Config, ConfigError, load_config
from hstu_ext.training.evaluation import Evaluator, rank_targets
from hstu_ext.training.losses import FullSoftmaxLoss, InBatchSoftmaxLoss, SampledSoftmaxLoss
from hstu_ext.training.metrics import hit_rate, mrr, ndcg, ranks_of, recall
from hstu_ext.training.samplers import InBatchNegativesSampler, UniformNegativesSampler, log_q
from hstu_ext.training.trainer import Trainer

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "Evaluator",
    "FullSoftmaxLoss",
    "InBatchNegativesSampler",
    "InBatchSoftmaxLoss",
    "SampledSoftmaxLoss",
    "Trainer",
    "UniformNegativesSampler",
    "hit_rate",
    "load_config",
    "load_model",
    "log_q",
    "mrr",
    "ndcg",
    "rank_targets",
    "ranks_of",
    "recall",
]
