"""Interaction logs as jagged tensors."""

from hstu_ext.data.interaction_log import InteractionLog
from hstu_ext.data.synthetic import synthetic_log

__all__ = ["InteractionLog", "synthetic_log"]
