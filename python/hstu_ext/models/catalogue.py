"""What a model must know of its data to be built, and to name what it recommends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hstu_ext.data import InteractionLog


@dataclass(frozen=True)
class Catalogue:
    """Items with their names and features, and the sizes of everything that is embedded.

    item_ids: the name of every item in the data, in the order of the rows of the item tower
    counts: int64 [num_items], events of each item in the training data
    item_titles: of every item, or None
    item_features: by name, int64 [num_items] or [num_items, width]
    user_feature_sizes: the number of values of each user feature, by name
    action_names: of every action; empty for a log without
    has_times: whether events have a time
    """

    item_ids: Sequence[str]
    counts: Tensor
    item_titles: Sequence[str] | None = None
    item_features: dict[str, Tensor] = field(default_factory=dict)
    user_feature_sizes: dict[str, int] = field(default_factory=dict)
    action_names: Sequence[str] = ()
    has_times: bool = False

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @staticmethod
    def from_log(log: InteractionLog) -> Catalogue:
        """The catalogue of a log, with the counts of its events: give the training part."""
        return Catalogue(
            log.item_ids,
            log.popularity().cpu(),
            log.item_titles,
            {name: values.cpu() for name, values in log.item_features.items()},
            dict(log.user_feature_sizes),
            log.action_names,
            log.timestamps is not None,
        )

    def title(self, item: int) -> str:
        """What to call an item: its title, or else its id."""
        return self.item_ids[item] if self.item_titles is None else self.item_titles[item]
