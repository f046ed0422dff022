"""Retrieval as one model: filters, indexes, retriever, publishing.

Where flax or orbax is missing, as on a machine that only serves exported retrievers, what needs
them (`Retriever`, `publish` and its like) is left out.
"""

from jaxrec.retrieval.bloom_index import BloomIndex
from jaxrec.retrieval.filter_text import parse_filter
from jaxrec.retrieval.filters import F, Filter, FilterError
from jaxrec.retrieval.fresh import Drift, FreshFullError, LiveIndex
from jaxrec.retrieval.item_index import Explanation, ItemIndex, Route
from jaxrec.retrieval.ivf_index import IVFIndex, SearchResult
from jaxrec.retrieval.live_server import LiveServer
from jaxrec.retrieval.masks import spread_tiles, unpack_mask
from jaxrec.retrieval.merge import Candidates, Quota, merge_candidates
from jaxrec.retrieval.plan import FilterPlan
from jaxrec.retrieval.planner import CostModel, SearchPlan, Strategy
from jaxrec.retrieval.quality import brute_force, recall
from jaxrec.retrieval.search_index import SearchIndex
from jaxrec.retrieval.sharded import ShardedIndex
from jaxrec.retrieval.tuning import tune_nprobe

try:
    from jaxrec.retrieval.publish import (
        PublishError,
        PublishWarning,
        load_retriever,
        publish,
        save_retriever,
    )
    from jaxrec.retrieval.ranking import component_columns
    from jaxrec.retrieval.retriever import IndexState, RankExplanation, Retriever
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in {"flax", "orbax"}:
        raise

__all__ = [
    "BloomIndex",
    "Candidates",
    "CostModel",
    "Drift",
    "Explanation",
    "F",
    "Filter",
    "FilterError",
    "FilterPlan",
    "FreshFullError",
    "IVFIndex",
    "IndexState",
    "ItemIndex",
    "LiveIndex",
    "LiveServer",
    "PublishError",
    "PublishWarning",
    "Quota",
    "RankExplanation",
    "Retriever",
    "Route",
    "SearchIndex",
    "SearchPlan",
    "SearchResult",
    "ShardedIndex",
    "Strategy",
    "brute_force",
    "component_columns",
    "load_retriever",
    "merge_candidates",
    "parse_filter",
    "publish",
    "recall",
    "save_retriever",
    "spread_tiles",
    "tune_nprobe",
    "unpack_mask",
]
