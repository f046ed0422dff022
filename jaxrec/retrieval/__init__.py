"""Retrieval as one model: filters, indexes, retriever, publishing."""

from jaxrec.retrieval.bloom_index import BloomIndex
from jaxrec.retrieval.filters import F, Filter, FilterError, parse_filter
from jaxrec.retrieval.item_index import Explanation, ItemIndex
from jaxrec.retrieval.ivf_index import IVFIndex, SearchResult, tune_nprobe
from jaxrec.retrieval.masks import unpack_mask
from jaxrec.retrieval.plan import FilterPlan
from jaxrec.retrieval.planner import CostModel, SearchPlan, Strategy
from jaxrec.retrieval.publish import PublishError, load_retriever, publish, save_retriever
from jaxrec.retrieval.quality import brute_force, recall
from jaxrec.retrieval.retriever import IndexState, Retriever

__all__ = [
    "BloomIndex",
    "CostModel",
    "Explanation",
    "F",
    "Filter",
    "FilterError",
    "FilterPlan",
    "IVFIndex",
    "IndexState",
    "ItemIndex",
    "PublishError",
    "Retriever",
    "SearchPlan",
    "SearchResult",
    "Strategy",
    "brute_force",
    "load_retriever",
    "parse_filter",
    "publish",
    "recall",
    "save_retriever",
    "tune_nprobe",
    "unpack_mask",
]
