"""A retriever as StableHLO programs and plain arrays: serving needs jax, numpy and jaxtyping only.

    <folder>/exported.json          what is in here, sizes and SHA-256 of all files; written last
    <folder>/arrays/00000.npy …     weights, index tensors and term hashes
    <folder>/programs/8.stablehlo … one program for each batch size

Tensors are arguments of the programs and not constants in them, so that programs stay small (well
below a megabyte) and all batch sizes share one copy. A program needs nothing of jaxrec:

    call = jax.export.deserialize(program).call
    scores, ids, filled, exact = call(arrays, batch, plan)

takes the first `num_state` arrays, as of `dtypes`; the fields of a `JaggedBatch` as a dict; and of
a `FilterPlan` opcodes, operands and term_ids. `load_exported` adds what makes these from histories
and filter texts, which is Python and NumPy.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxrec.array_files import read_array, write_array
from jaxrec.file_manifest import find_damage, list_files
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.retrieval.filter_text import parse_filter
from jaxrec.retrieval.item_index import ItemIndex
from jaxrec.retrieval.ivf_index import SearchResult
from jaxrec.retrieval.plan import compile_plan
from jaxrec.retrieval.terms import TermCatalog

if TYPE_CHECKING:
    from jaxrec.retrieval.retriever import Retriever

FORMAT = 1
_CUSTOM_CALLS = ("mosaic_gpu_v2", "__cudnn$fmhaSoftmax")  # an export is for one version of JAX
_CATALOG = ("catalog_hashes", "catalog_head_rows")
_PLAN = ("opcodes", "operands", "term_ids")

type _Array = jax.Array | np.ndarray
type _Path = str | os.PathLike[str]


class ExportError(ValueError):
    """An export that is missing, damaged, of another format, or asked for what it does not hold."""


def export_retriever(
    retriever: "Retriever",
    path: _Path,
    *,
    k: int,
    batch_sizes: Sequence[int] = (1, 8, 64),
    max_length: int = 256,
    max_filter_steps: int = 64,
    nprobe: int | None = None,
    exact: bool = False,
    exclude_history: bool | int = False,
    num_candidates: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda"),
) -> Path:
    """Writes a retriever for `load_exported`.

    Batch sizes are fixed, and several go into one export. A symbolic size is not possible: the
    planner's costs, the tiles of a search and the chunks of its reference are Python numbers, and
    tracing stops with "TypeError: '_DimExpr' object cannot be interpreted as an integer". A request
    is padded to the smallest size that it fits, whose whole cost it then has.

    Args:
      retriever: stays as it is.
      path: a new folder.
      k, nprobe, exact, exclude_history, num_candidates: as for a call of the retriever; fixed in
        the export.
      batch_sizes: numbers of sequences, one program each.
      max_length: items of the longest history; a batch of B has B · max_length token slots.
      max_filter_steps: longest filter program, terms and operators together.
      platforms: what the programs can run on, of "cpu", "cuda", "rocm", "tpu". With more than one
        the portable reference search is exported; for ("cuda",) alone, what runs on this machine's
        GPU, or on that of the `jax.sharding.use_abstract_mesh` in force, with its kernels.

    Raises:
      ExportError: the folder exists, or a size is below 1.
      ValueError: k or nprobe out of range.
    """
    folder = Path(path)
    sizes = sorted({int(size) for size in batch_sizes})
    if not sizes or min(*sizes, max_length, max_filter_steps) < 1:
        raise ExportError(
            f"batch_sizes is {list(batch_sizes)}, max_length {max_length}, max_filter_steps "
            f"{max_filter_steps}; expected at least one batch size, and all of them 1 or more"
        )
    if folder.exists():
        raise ExportError(f"{folder} exists; export to a new folder")
    items = retriever.index
    if not isinstance(items, ItemIndex):
        raise ExportError(
            f"a retriever over a {type(items).__name__} is not exported; give it an ItemIndex, as "
            "a live index has after compact()"
        )
    # The reference search lowers for every platform; a GPU's kernels only for that GPU.
    portable = jax.local_devices(backend="cpu")[0] if set(platforms) != {"cuda"} else None
    with jax.default_device(portable):
        programs, state = _programs(
            retriever, sizes, max_length, max_filter_steps, platforms,
            k=k, nprobe=nprobe, exact=exact, exclude_history=exclude_history,
            num_candidates=num_candidates,
        )  # fmt: skip
    bloom = items.bloom
    about = {
        "format": FORMAT,
        "jax": jax.__version__,
        "calling_convention": programs[sizes[0]].calling_convention_version,
        "platforms": list(platforms),
        "batch_sizes": sizes,
        "max_length": max_length,
        "filter_steps": max_filter_steps,
        "k": k,
        "num_state": len(state),
        "features": list(bloom.catalog.features),
        "seed": bloom.catalog.seed,
        "num_hashes": bloom.num_hashes,
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "arrays").mkdir(parents=True)
    (partial / "programs").mkdir()
    catalog = [bloom.catalog.hashes, bloom.catalog.head_rows]
    for number, array in enumerate([*state, *catalog]):
        write_array(partial / "arrays" / f"{number:05}.npy", array)
    about["dtypes"] = [str(x.dtype) for x in state]
    for size, program in programs.items():
        (partial / "programs" / f"{size}.stablehlo").write_bytes(program.serialize())
    about["files"] = list_files(partial)
    (partial / "exported.json").write_text(json.dumps(about, indent=1))
    partial.rename(folder)
    return folder


def _programs(retriever, sizes, max_length, steps, platforms, **options):
    """(program by batch size, the tensors that all of them take)."""
    from flax import nnx

    graphdef, state = nnx.split(retriever)
    leaves, structure = jax.tree.flatten(state)
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    stored = [jax.random.key_data(x) if key else x for x, key in zip(leaves, keys, strict=True)]
    plain = retriever.compile([None])

    def serve(arrays, batch, plan):
        arrays = [
            jax.random.wrap_key_data(x) if key else x for x, key in zip(arrays, keys, strict=True)
        ]
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, arrays))
        batch = JaggedBatch(**batch)
        return tuple(model(batch, plain._replace(**plan), **options))

    def one(size):
        batch = _batch([], size, max_length)
        hashes = plain.operands.shape[2]
        plan = {
            "opcodes": np.zeros((size, steps), np.int32),
            "operands": np.zeros((size, steps, hashes), np.uint32),
            "term_ids": np.zeros((size, steps), np.int32),
        }
        checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _CUSTOM_CALLS]
        export = jax.export.export(jax.jit(serve), platforms=platforms, disabled_checks=checks)
        return export(stored, batch, plan)

    return {size: one(size) for size in sizes}, stored


def load_exported(path: _Path, *, check: bool = True) -> "ExportedRetriever":
    """The retriever that `export_retriever` wrote.

    Args:
      path: its folder.
      check: read all files once to compare their SHA-256 with the recorded ones; sizes always are.

    Raises:
      ExportError: no export, one of another format or platform, or a damaged file, which is named.
    """
    folder = Path(path)
    try:
        about = json.loads((folder / "exported.json").read_text())
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder} is not an exported retriever ({type(error).__name__}: {error}); make one "
            "with export_retriever"
        ) from error
    if about.get("format") != FORMAT:
        raise ExportError(
            f"{folder} has format {about.get('format')}; this version of jaxrec reads format "
            f"{FORMAT}: export again"
        )
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    if not oldest <= about["calling_convention"] <= newest:
        raise ExportError(
            f"{folder} was exported with jax {about['jax']} (calling convention "
            f"{about['calling_convention']}); jax {jax.__version__} here runs {oldest} to "
            f"{newest}: export again, or install a jax of that age"
        )
    _check_platform(folder, about["platforms"])
    if damage := find_damage(folder, about["files"], contents=check):
        raise ExportError(f"{damage}; copy the folder again, or export again")
    return ExportedRetriever(folder, about)


def _check_platform(folder: Path, platforms: Sequence[str]) -> None:
    here = jax.default_backend()
    # jax calls NVIDIA and AMD GPUs alike "gpu".
    if here not in platforms and not (here == "gpu" and {"cuda", "rocm"} & set(platforms)):
        raise ExportError(
            f"{folder} runs on {', '.join(platforms)}, and this machine's default is {here}; "
            f"export with platforms=({here!r},) or set JAX_PLATFORMS"
        )


class ExportedRetriever:
    """What `load_exported` gives: histories and filter texts in, the best items out.

    Attributes:
      k: results of each query.
      batch_sizes: of its programs, ascending.
      platforms: that the programs run on.
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.k: int = about["k"]
        self.batch_sizes: list[int] = about["batch_sizes"]
        self.platforms: list[str] = about["platforms"]
        self._about, self._folder = about, folder
        count = about["num_state"]
        files = [folder / "arrays" / f"{number:05}.npy" for number in range(count + len(_CATALOG))]
        self._state = [
            read_array(file, dtype)
            for file, dtype in zip(files[:count], about["dtypes"], strict=True)
        ]
        hashes, head_rows = (np.load(file) for file in files[count:])
        self._catalog = TermCatalog(tuple(about["features"]), about["seed"], hashes, head_rows)
        self._programs: dict[int, Any] = {}

    def __call__(
        self,
        histories: Sequence[Int[_Array, "L"] | Sequence[int]],
        filters: Sequence[str | None],
        *,
        timestamps: Sequence[Sequence[int]] | None = None,
    ) -> SearchResult:
        """The best eligible items for each history, as the exported retriever would give them.

        Args:
          histories: item numbers of each user, oldest first, 1 to the export's `max_length`.
          filters: one text a user; None for everything.
          timestamps: seconds of each item, for towers that use them.

        Raises:
          ExportError: more histories than the largest batch size, an empty or a too long one,
            another number of filters, or a longer filter than the export takes.
          FilterError: see `parse_filter`.
        """
        count, longest = len(histories), self._about["max_length"]
        if not 1 <= count <= self.batch_sizes[-1]:
            raise ExportError(
                f"{count} histories; this export takes 1 to {self.batch_sizes[-1]} at once: split "
                "them, or export with larger batch_sizes"
            )
        for number, history in enumerate(histories):
            if not 1 <= len(history) <= longest:
                raise ExportError(
                    f"history {number} has {len(history)} items; this export takes 1 to {longest}"
                )
        if len(filters) != count:
            raise ExportError(f"{len(filters)} filters for {count} histories; give one for each")
        size = next(size for size in self.batch_sizes if size >= count)
        batch = _batch(histories, size, longest, timestamps)
        found = self._program(size)(self._state, batch, self._plan(filters, size))
        return SearchResult(*(x[:count] for x in found))

    def _program(self, size: int) -> Any:
        if size not in self._programs:
            data = (self._folder / "programs" / f"{size}.stablehlo").read_bytes()
            self._programs[size] = jax.jit(jax.export.deserialize(bytearray(data)).call)
        return self._programs[size]

    def _plan(self, filters: Sequence[str | None], size: int) -> dict[str, np.ndarray]:
        trees = [parse_filter(text or "", features=self._catalog.features) for text in filters]
        plan = compile_plan(trees, self._catalog, self._about["num_hashes"])
        lengths = (np.asarray(plan.opcodes) != 0).sum(axis=1)
        steps = self._about["filter_steps"]
        if lengths.max(initial=0) > steps:
            raise ExportError(
                f"filter {int(lengths.argmax())} has {int(lengths.max())} steps; this export takes "
                f"{steps}: shorten it, or export with larger max_filter_steps"
            )
        padded = {}
        for name in _PLAN:
            values = np.asarray(getattr(plan, name))[:, :steps]
            room = [(0, size - len(values)), (0, steps - values.shape[1])]
            padded[name] = np.pad(values, room + [(0, 0)] * (values.ndim - 2))
        return padded


def _batch(histories, size: int, longest: int, timestamps=None) -> dict[str, np.ndarray]:
    """A `JaggedBatch` as a dict: the histories, then empty sequences that ask about slot 0."""
    lengths = np.zeros(size, np.int32)
    lengths[: len(histories)] = [len(history) for history in histories]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def packed(sequences):
        slots = np.zeros(size * longest, np.int32)
        if len(histories):
            values = np.concatenate([np.asarray(x, np.int32) for x in sequences])
            slots[: len(values)] = values
        return slots

    return {
        "item_ids": packed(histories),
        "seq_offsets": offsets,
        "target_positions": np.where(lengths > 0, offsets[1:] - 1, 0).astype(np.int32),
        "target_ids": np.zeros(size, np.int32),
        "timestamps": packed([np.zeros(n) for n in lengths] if timestamps is None else timestamps),
    }
