"""Readers, splits, samplers and packed jagged batches."""

from jaxrec.data.attributes import (
    ItemAttributes,
    read_item_attributes_csv,
    read_item_attributes_json,
)
from jaxrec.data.dataset import EvalSet, SequenceDataset, dataset_of
from jaxrec.data.folder import Dataset, read_dataset
from jaxrec.data.interactions import Interactions, ReadReport, build_interactions
from jaxrec.data.pipeline import TrainingBatches, eval_batches, training_batches
from jaxrec.data.prefetch import PrefetchIterator, ResumableIterator
from jaxrec.data.readers import read_events_jsonl, read_movielens, read_sequences
from jaxrec.data.samplers import PopularitySampler, UniformSampler, item_counts
from jaxrec.data.samples import (
    SampleIndex,
    SampleMode,
    bucket_sizes,
    cut_to_bucket,
    make_batch,
    make_query_batch,
)
from jaxrec.data.splits import (
    Split,
    SplitReport,
    filter_min_count,
    leave_one_out,
    time_cutoffs,
    time_split,
)
from jaxrec.data.synthetic import SyntheticConfig, SyntheticData, synthetic_catalogue
from jaxrec.data.tables import ColumnMap, read_table
from jaxrec.data.text_input import DataFormatError
from jaxrec.data.vocabulary import Vocabulary

__all__ = [
    "ColumnMap",
    "DataFormatError",
    "Dataset",
    "EvalSet",
    "Interactions",
    "ItemAttributes",
    "PopularitySampler",
    "PrefetchIterator",
    "ReadReport",
    "ResumableIterator",
    "SampleIndex",
    "SampleMode",
    "SequenceDataset",
    "Split",
    "SplitReport",
    "SyntheticConfig",
    "SyntheticData",
    "TrainingBatches",
    "UniformSampler",
    "Vocabulary",
    "bucket_sizes",
    "build_interactions",
    "cut_to_bucket",
    "dataset_of",
    "eval_batches",
    "filter_min_count",
    "item_counts",
    "leave_one_out",
    "make_batch",
    "make_query_batch",
    "read_dataset",
    "read_events_jsonl",
    "read_item_attributes_csv",
    "read_item_attributes_json",
    "read_movielens",
    "read_sequences",
    "read_table",
    "synthetic_catalogue",
    "time_cutoffs",
    "time_split",
    "training_batches",
]
