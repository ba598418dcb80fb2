"""Models composed of the extension's ops."""

from hstu_ext.models.retrieval_gr import HSTULayer, RetrievalGR

__all__ = ["HSTULayer", "RetrievalGR"]
