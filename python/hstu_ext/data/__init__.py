"""Interaction logs as jagged tensors: readers, the split for evaluation, batches."""

from hstu_ext.data.batches import Batch, SequenceBatches
from hstu_ext.data.errors import DataError
from hstu_ext.data.interaction_log import InteractionLog
from hstu_ext.data.load import load
from hstu_ext.data.split import Split, leave_one_out
from hstu_ext.data.synthetic import synthetic, synthetic_log

__all__ = [
    "Batch",
    "DataError",
    "InteractionLog",
    "SequenceBatches",
    "Split",
    "leave_one_out",
    "load",
    "synthetic",
    "synthetic_log",
]
