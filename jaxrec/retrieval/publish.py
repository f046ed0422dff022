"""Publishing: a trained model and its indexes as one versioned, checked Orbax checkpoint.

    <folder>/<version>/tower        weights, all variables but random state
    <folder>/<version>/index        index tensors and the term catalogue
    <folder>/<version>/metadata     model config, static index fields, content hashes (JSON)
    <folder>/<version>/vocabulary   raw item ids (JSON)

A version appears in one rename, complete or not at all. Loading rebuilds nothing.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxrec.orbax_log import hushed_orbax
from jaxrec.retrieval.bloom_index import BloomIndex
from jaxrec.retrieval.item_index import ItemIndex
from jaxrec.retrieval.ivf_index import IVFIndex, Metric
from jaxrec.retrieval.retriever import Retriever, Vocabulary
from jaxrec.retrieval.terms import TermCatalog

FORMAT = 3
_ITEMS = ("tower", "index", "metadata", "vocabulary")
_BLOOM_ARRAYS = ("rows", "row_offsets", "live", "term_offsets", "term_values")
_BLOOM_STATIC = ("num_items", "num_head", "num_hashes", "max_item_terms")
_IVF_ARRAYS = ("centroids", "codes", "scales", "vectors", "row_ids", "id_order", "live",
               "tile_offsets", "error_bounds")  # fmt: skip
_COLUMN = "column_"

type _Path = str | os.PathLike[str]


class PublishError(ValueError):
    """A published version that is missing, damaged, or does not fit the model."""


def publish(
    model: nnx.Module,
    features: Mapping[str, Any],
    *,
    folder: _Path,
    model_config: Mapping[str, Any] | None = None,
    key: Key[Array, ""] | None = None,
    nlist: int | None = None,
    metric: Metric = "ip",
    max_fpr: float = 1e-3,
    recall: float = 0.95,
    sample_queries: Float[Array, "S D"] | None = None,
    vocabulary: Sequence[str] | None = None,
) -> int:
    """Builds a model's `Retriever` and writes it as the next version of `folder`.

    Args:
      model: see `UserTower`.
      features: attributes of the items 1..V-1; see `Retriever.build`, as for the other arguments.
      folder: where versions live; made if missing.
      model_config: what `load_retriever` hands to `build_model`; JSON values.
      key: None uses key 0, so that publishing the same model twice gives the same index.

    Returns:
      The version, from 1.
    """
    retriever = Retriever.build(
        model, features, key=jax.random.key(0) if key is None else key, nlist=nlist, metric=metric,
        max_fpr=max_fpr, recall=recall, sample_queries=sample_queries, vocabulary=vocabulary,
    )  # fmt: skip
    return save_retriever(retriever, folder, model_config=model_config)


def save_retriever(
    retriever: Retriever, folder: _Path, *, model_config: Mapping[str, Any] | None = None
) -> int:
    """Writes a built retriever as the next version of `folder`; returns the version."""
    tower, index = _tower_arrays(retriever.model), _index_arrays(retriever)
    bloom, ivf = retriever.index.bloom, retriever.index.ivf
    metadata = {
        "format": FORMAT,
        "model_config": dict(model_config or {}),
        "nprobe": retriever.index.nprobe,
        "shares": [list(point) for point in retriever.index.shares],
        "bloom": {name: getattr(bloom, name) for name in _BLOOM_STATIC},
        "catalog": {"features": list(bloom.catalog.features), "seed": bloom.catalog.seed},
        "ivf": {"metric": ivf.metric, "num_items": ivf.num_items},
        "tower_sha256": content_hash(tower),
        "index_sha256": content_hash(index),
        "index_shapes": {name: [list(x.shape), str(x.dtype)] for name, x in index.items()},
    }
    vocabulary = retriever.vocabulary
    raw_ids = None if vocabulary is None else list(vocabulary.raw_ids)
    with _manager(Path(folder), create=True) as manager:
        version = (manager.latest_step() or 0) + 1
        manager.save(
            version,
            args=ocp.args.Composite(
                tower=ocp.args.StandardSave(tower),  # type: ignore[call-arg]
                index=ocp.args.StandardSave(index),  # type: ignore[call-arg]
                metadata=ocp.args.JsonSave(metadata),  # type: ignore[call-arg]
                vocabulary=ocp.args.JsonSave({"raw_ids": raw_ids}),  # type: ignore[call-arg]
            ),
        )
        manager.wait_until_finished()
    return version


def load_retriever(
    folder: _Path,
    *,
    build_model: Callable[[dict[str, Any]], nnx.Module],
    version: int | None = None,
) -> Retriever:
    """Restores a published version; its answers are bit for bit those of the published retriever.

    Args:
      folder: as given to `publish`.
      build_model: makes the untrained model from the published `model_config`.
      version: None takes the newest.

    Raises:
      PublishError: no such version; a part is missing or damaged; the weights do not fit the model
        that `build_model` made; or weights and index are not the pair that was published.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PublishError(f"{root} is not a folder; publish a retriever there first")
    with _manager(root, create=False) as manager:
        versions = sorted(manager.all_steps())
        if not versions or (version is not None and version not in versions):
            raise PublishError(
                f"{root} has no version{'' if version is None else f' {version}'}; "
                f"published are: {', '.join(map(str, versions)) or 'none'}"
            )
        chosen = versions[-1] if version is None else version
        at = root / str(chosen)
        read = _Reader(manager, chosen, at)
        metadata = read.json("metadata")
        if metadata.get("format") != FORMAT:
            raise PublishError(
                f"{at / 'metadata'} has format {metadata.get('format')}; this version of jaxrec "
                f"reads format {FORMAT}: publish again"
            )
        model = build_model(metadata["model_config"])
        tower = read.arrays("tower", _tower_arrays(model))
        shapes = metadata["index_shapes"].items()
        index = read.arrays("index", {n: jax.ShapeDtypeStruct(s, d) for n, (s, d) in shapes})
        raw_ids = read.json("vocabulary")["raw_ids"]
    for part, arrays in (("tower", tower), ("index", index)):
        if content_hash(arrays) != metadata[f"{part}_sha256"]:
            raise PublishError(
                f"{at / part} is not what was published as version {chosen}: weights and index "
                "belong together; restore the whole version folder or publish again"
            )
    _set_tower_arrays(model, tower)
    return _assemble(model, index, metadata, raw_ids)


def content_hash(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes, dtypes and contents."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(np.asarray(arrays[name]))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@contextmanager
def _manager(folder: Path, *, create: bool) -> Iterator[ocp.CheckpointManager]:
    with hushed_orbax():
        options = ocp.CheckpointManagerOptions(
            create=create, read_only=not create, enable_async_checkpointing=False
        )
        path = folder.absolute()
        with ocp.CheckpointManager(path, options=options, item_names=_ITEMS) as manager:
            yield manager


class _Reader:
    """Reads the parts of one version, with errors that name the part."""

    def __init__(self, manager: ocp.CheckpointManager, version: int, folder: Path):
        self.manager, self.version, self.folder = manager, version, folder

    def json(self, item: str) -> dict[str, Any]:
        return self._restore(item, ocp.args.JsonRestore())

    def arrays(self, item: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        # Saved on other devices than this machine has, perhaps: everything goes to the first one.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = {
            n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for n, x in wanted.items()
        }
        restored = self._restore(item, ocp.args.StandardRestore(abstract))  # type: ignore[call-arg]
        for name, leaf in abstract.items():
            if restored[name].shape != leaf.shape:
                raise PublishError(
                    f"{self.folder / item}: {name} has shape {restored[name].shape} and the model "
                    f"{leaf.shape}; build_model must make the model that was published"
                )
        return restored

    def _restore(self, item: str, args: Any) -> Any:
        if not (self.folder / item).exists():
            raise PublishError(
                f"{self.folder / item} is missing; restore the whole version folder from a copy, "
                "load another version, or publish again"
            )
        try:
            return self.manager.restore(self.version, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:
            # Whatever Orbax or the file system raises, people need to know which part it was.
            raise PublishError(
                f"{self.folder / item} cannot be read ({type(error).__name__}: {error}). It is "
                "damaged, or build_model makes another model than the published one; restore the "
                "folder from a copy, load another version, or publish again"
            ) from error


def _tower_variables(model: nnx.Module) -> list[tuple[str, nnx.Variable]]:
    """All variables but random state, by path."""
    _, _, state = nnx.split(model, nnx.RngState, ...)
    return [("/".join(map(str, path)), value) for path, value in nnx.to_flat_state(state)]


def _tower_arrays(model: nnx.Module) -> dict[str, Any]:
    return {name: variable[...] for name, variable in _tower_variables(model)}


def _set_tower_arrays(model: nnx.Module, arrays: Mapping[str, Any]) -> None:
    _, _, state = nnx.split(model, nnx.RngState, ...)
    flat = nnx.to_flat_state(state)
    named = [(path, variable.replace(arrays["/".join(map(str, path))])) for path, variable in flat]
    nnx.update(model, nnx.from_flat_state(named))


def _index_arrays(retriever: Retriever) -> dict[str, Any]:
    bloom, ivf = retriever.index.bloom, retriever.index.ivf
    arrays = {f"bloom_{name}": getattr(bloom, name) for name in _BLOOM_ARRAYS}
    arrays |= {f"ivf_{name}": getattr(ivf, name) for name in _IVF_ARRAYS}
    arrays |= {f"{_COLUMN}{name}": column for name, column in retriever.index.columns.items()}
    arrays["ivf_list_tiles"] = np.frombuffer(ivf.list_tiles, np.int32)
    # JAX has no uint64 by default: hashes travel as pairs of uint32.
    arrays["catalog_hashes"] = bloom.catalog.hashes.view(np.uint32).reshape(-1, 2)
    arrays["catalog_head_rows"] = bloom.catalog.head_rows
    return arrays


def _assemble(model, index, metadata, raw_ids) -> Retriever:
    catalog = TermCatalog(
        tuple(metadata["catalog"]["features"]),
        metadata["catalog"]["seed"],
        np.array(index["catalog_hashes"]).view(np.uint64).reshape(-1),
        np.array(index["catalog_head_rows"]),
    )
    bloom_arrays = {name: jnp.asarray(index[f"bloom_{name}"]) for name in _BLOOM_ARRAYS}
    ivf_arrays = {name: jnp.asarray(index[f"ivf_{name}"]) for name in _IVF_ARRAYS}
    list_tiles = np.array(index["ivf_list_tiles"], np.int32).tobytes()
    columns = {n.removeprefix(_COLUMN): x for n, x in index.items() if n.startswith(_COLUMN)}
    items = ItemIndex(
        IVFIndex(**ivf_arrays, **metadata["ivf"], list_tiles=list_tiles),
        BloomIndex(**bloom_arrays, **metadata["bloom"], catalog=catalog),
        columns,
        metadata["nprobe"],
        tuple(tuple(point) for point in metadata["shares"]),
    )
    return Retriever(
        model, items, vocabulary=None if raw_ids is None else Vocabulary(tuple(raw_ids))
    )
