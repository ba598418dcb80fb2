"""Models composed of the extension's ops."""

from hstu_ext.models.bias import RelativeTimePositionBias
from hstu_ext.models.catalogue import Catalogue
from hstu_ext.models.hstu import HSTUBlock, HSTULayer
from hstu_ext.models.retrieval_gr import RetrievalGR
from hstu_ext.models.sasrec import SASRecBlock, SASRecLayer
from hstu_ext.models.sequence import Layout, SequenceBlock
from hstu_ext.models.similarity import CosineSimilarity, DotProductSimilarity, L2NormEmbeddingPostprocessor
from hstu_ext.models.towers import ContextTower, ItemTower

__all__ = [
    "Catalogue",
    "ContextTower",
    "CosineSimilarity",
    "DotProductSimilarity",
    "HSTUBlock",
    "HSTULayer",
    "ItemTower",
    "L2NormEmbeddingPostprocessor",
    "Layout",
    "RelativeTimePositionBias",
    "RetrievalGR",
    "SASRecBlock",
    "SASRecLayer",
    "SequenceBlock",
]
