"""Retrieval as one model: filters, indexes, retriever, publishing."""

from jaxrec.retrieval.bloom_index import BloomIndex
from jaxrec.retrieval.filter_text import parse_filter
from jaxrec.retrieval.filters import F, Filter, FilterError
from jaxrec.retrieval.fresh import Drift, FreshFullError, LiveIndex
from jaxrec.retrieval.item_index import Explanation, ItemIndex
from jaxrec.retrieval.ivf_index import IVFIndex, SearchResult, tune_nprobe
from jaxrec.retrieval.live_server import LiveServer
from jaxrec.retrieval.masks import unpack_mask
from jaxrec.retrieval.plan import FilterPlan
from jaxrec.retrieval.publish import PublishError, load_retriever, publish, save_retriever
from jaxrec.retrieval.quality import brute_force, recall
from jaxrec.retrieval.retriever import IndexState, Retriever
from jaxrec.retrieval.search_index import SearchIndex

__all__ = [
    "BloomIndex",
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
    "Retriever",
    "SearchIndex",
    "SearchResult",
    "brute_force",
    "load_retriever",
    "parse_filter",
    "publish",
    "recall",
    "save_retriever",
    "tune_nprobe",
    "unpack_mask",
]
