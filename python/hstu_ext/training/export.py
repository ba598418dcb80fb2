"""What a serving system needs of a model: item vectors, an index of them, and the encoder of queries."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np

from hstu_ext.models import Catalogue, RetrievalGR
from hstu_ext.training.checkpoint import save_model
from hstu_ext.training.config import Config


def export(
    directory: Path, model: RetrievalGR, config: Config, catalogue: Catalogue, faiss: str = "auto"
) -> list[Path]:
    """Writes a model for serving.

    items.npy: float32 [num_items, dim], rows of unit length
    items.faiss: an IndexFlatIP of the same rows; its results are those of hstu_ext.topk_dot
    item_ids.json: the ids of the rows
    query_encoder/: the model, as hstu_ext.training.load_model reads it; its encode_query gives the query vectors

    Args:
        directory: where to; it is made.
        faiss: auto, on or off; auto is on where it is installed.

    Returns:
        The paths written.

    Raises:
        ImportError: faiss is on and not installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    vectors = model.item_embeddings().detach().float().cpu().numpy()
    written = [directory / "items.npy", directory / "item_ids.json", directory / "query_encoder"]
    np.save(written[0], vectors)
    written[1].write_text(json.dumps(list(catalogue.item_ids), ensure_ascii=False), encoding="utf-8")
    written[2].mkdir(exist_ok=True)
    save_model(written[2], model, config, catalogue)
    installed = importlib.util.find_spec("faiss") is not None
    if faiss == "on" and not installed:
        raise ImportError("hstu_ext.export: faiss must be installed for an index: pip install 'hstu_ext[faiss]'")
    if faiss == "on" or (faiss == "auto" and installed):
        import faiss as library

        index = library.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        written.append(directory / "items.faiss")
        library.write_index(index, str(written[-1]))
    return written
