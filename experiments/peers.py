"""Peers' indexes over the same items, each as variants that `bench_retrieval` can time.

faiss filters while it scans (`IDSelectorBitmap`). usearch and ScaNN do not filter a search of a
batch, so they fetch as many more results as the filter is selective and drop what does not pass.
"""

import functools
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

type Variant = Callable[[], tuple[np.ndarray, str]]
"""A search of the whole batch: (ids with -1 for none, note)."""

FETCH_AT_MOST = 1_000  # results a query; more selective filters are not for these peers
EXPANSIONS = (64, 256, 1024, 2048)  # of usearch's beam
LEAVES = (16, 32, 64, 128, 256, 512)  # of ScaNN's partitions


class Peers:
    """faiss, usearch and ScaNN indexes over `rows`; the last two where they are installed."""

    def __init__(self, rows: np.ndarray, lists: int, threads: int, k: int):
        self.rows, self.lists, self.threads, self.k = rows, lists, threads, k
        self.faiss: Any = importlib.import_module("faiss")
        self.faiss.omp_set_num_threads(threads)
        self.ivf = {"IVFFlat": self._ivf("Flat"), "IVFSQ8": self._ivf("SQ8")}
        self.missing: list[str] = []
        self.usearch = self._optional("usearch", self._usearch)
        self.scann = self._optional("scann", self._scann)

    def variants(self, queries: np.ndarray, passes: np.ndarray) -> dict[str, Variant]:
        """Searches of all queries among the items that pass one filter."""
        made = self._faiss_flat(queries, passes)
        selector = None if passes.all() else self._selector(passes)
        for name, index in self.ivf.items():
            for nprobe in probe_sweep(self.lists):
                options = self._options(nprobe, selector)
                made[f"{name} {nprobe}"] = functools.partial(
                    lambda index, options: (index.search(queries, self.k, params=options)[1], ""),
                    index, options,
                )  # fmt: skip
        fetch = round(1.2 * self.k / passes.mean()) if not passes.all() else self.k
        return made if fetch > FETCH_AT_MOST else made | self._by_dropping(queries, passes, fetch)

    def own_filter_variants(self, queries: np.ndarray, passes: np.ndarray) -> dict[str, Variant]:
        """Searches in which query i has a filter of its own, passes[i]: faiss takes it by calls."""
        selectors = [self._selector(own) for own in passes]
        made: dict[str, Variant] = {}

        def search(index, nprobe: int) -> tuple[np.ndarray, str]:
            def one(number: int) -> np.ndarray:
                options = self._options(nprobe, selectors[number])
                return index.search(queries[number : number + 1], self.k, params=options)[1][0]

            with ThreadPoolExecutor(self.threads) as pool:
                return np.stack(list(pool.map(one, range(len(queries))))), "a call a query"

        for name, index in self.ivf.items():
            for nprobe in probe_sweep(self.lists):
                made[f"{name} {nprobe}"] = functools.partial(search, index, nprobe)
        return made

    def _ivf(self, storage: str) -> Any:
        spec, metric = f"IVF{self.lists},{storage}", self.faiss.METRIC_INNER_PRODUCT
        index = self.faiss.index_factory(self.rows.shape[1], spec, metric)
        index.train(self.rows)
        index.add(self.rows)
        return index

    def _options(self, nprobe: int, selector: Any) -> Any:
        options = self.faiss.SearchParametersIVF()
        options.nprobe = nprobe
        if selector is not None:
            options.sel = selector
        return options

    def _selector(self, passes: np.ndarray) -> Any:
        return self.faiss.IDSelectorBitmap(np.packbits(passes, bitorder="little"))

    def _faiss_flat(self, queries: np.ndarray, passes: np.ndarray) -> dict[str, Variant]:
        """Flat over a copy of the eligible rows, made beforehand: for filters that are fixed."""
        eligible = np.flatnonzero(passes)
        flat = self.faiss.IndexFlatIP(self.rows.shape[1])
        flat.add(self.rows[eligible])

        def search() -> tuple[np.ndarray, str]:
            found = flat.search(queries, self.k)[1]
            return np.where(found >= 0, eligible[found], -1), "a copy of the eligible rows"

        return {"Flat copy": search}

    def _optional(self, name: str, make: Callable[[Any], Any]) -> Any:
        try:
            module = importlib.import_module(name if name != "usearch" else "usearch.index")
        except ImportError as error:
            self.missing.append(f"{name}: {error}")
            return None
        return make(module)

    def _usearch(self, usearch: Any) -> Any:
        index = usearch.Index(ndim=self.rows.shape[1], metric="ip", dtype="f32", connectivity=16,
                              expansion_add=128)  # fmt: skip
        index.add(np.arange(len(self.rows)), self.rows, threads=self.threads)
        return index

    def _scann(self, scann: Any) -> Any:
        builder = scann.scann_ops_pybind.builder(self.rows, self.k, "dot_product")
        builder = builder.tree(self.lists, 32, training_sample_size=len(self.rows))
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2)
        searcher = builder.reorder(10 * self.k).build()
        searcher.set_num_threads(self.threads)
        return searcher

    def _by_dropping(self, queries, passes, fetch: int) -> dict[str, Variant]:
        made: dict[str, Variant] = {}

        def usearch(expansion: int) -> tuple[np.ndarray, str]:
            self.usearch.expansion_search = expansion
            found = self.usearch.search(queries, fetch, threads=self.threads).keys
            return kept(np.asarray(found).astype(np.int64), passes, self.k), f"of {fetch} fetched"

        def scann(leaves: int) -> tuple[np.ndarray, str]:
            found, scores = self.scann.search_batched_parallel(
                queries, final_num_neighbors=fetch, leaves_to_search=leaves,
                pre_reorder_num_neighbors=max(10 * self.k, 3 * fetch),
            )  # fmt: skip
            found = np.where(np.isfinite(scores), found.astype(np.int64), -1)
            return kept(found, passes, self.k), f"of {fetch} fetched"

        if self.usearch is not None:
            made |= {f"usearch {e}": functools.partial(usearch, e) for e in EXPANSIONS}
        if self.scann is not None:
            sweep = (leaves for leaves in LEAVES if leaves <= self.lists)
            made |= {f"ScaNN {leaves}": functools.partial(scann, leaves) for leaves in sweep}
        return made


def probe_sweep(lists: int) -> list[int]:
    """Numbers of lists to probe, about a quarter more each: 4, 5, 7, 9 … all."""
    sweep = (4 * 1.25**step for step in range(40))
    return [*dict.fromkeys(round(n) for n in sweep if round(n) < lists), lists]


def kept(found: np.ndarray, passes: np.ndarray, k: int) -> np.ndarray:
    """The first k of each row of ids that pass; -1 behind them."""
    passing = (found >= 0) & passes[found]
    order = np.argsort(~passing, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(np.where(passing, found, -1), order, axis=1)
