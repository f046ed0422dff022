"""Publishing: a trained model and its indexes as one versioned, checked Orbax checkpoint.

    <folder>/<version>/tower        weights, all variables but random state (.npy)
    <folder>/<version>/index        index tensors and the term catalogue (.npy)
    <folder>/<version>/metadata     model config, static index fields, value model, merge policy
    <folder>/<version>/vocabulary   raw item ids (JSON)
    <folder>/<version>/files.json   sizes and SHA-256 of all files above; written last

A version is published once its files.json is there. Weights and index are one version, and no file
of it can be exchanged for another version's unnoticed. Loading rebuilds nothing.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxrec.file_manifest import find_damage, list_files
from jaxrec.nn import ValueModel
from jaxrec.orbax_log import hushed_orbax
from jaxrec.retrieval.array_handler import RestoreArrays, SaveArrays
from jaxrec.retrieval.bloom_index import BloomIndex
from jaxrec.retrieval.item_index import ItemIndex
from jaxrec.retrieval.ivf_index import IVFIndex, Metric
from jaxrec.retrieval.merge import Policy, Quota
from jaxrec.retrieval.retriever import Retriever, Vocabulary
from jaxrec.retrieval.terms import TermCatalog

FORMAT = 4
_ITEMS = ("tower", "index", "metadata", "vocabulary")
_NODES = {cls.__name__: cls for cls in (ItemIndex, IVFIndex, BloomIndex)}
_FILES = "files.json"

type _Path = str | os.PathLike[str]


class PublishError(ValueError):
    """A published version that is missing, damaged, or does not fit the model."""


class PublishWarning(UserWarning):
    """A damaged or unfinished version was passed over."""


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
    columns: Mapping[str, Any] | None = None,
    value_model: ValueModel | None = None,
    merge: str | Policy = "union",
    component_dtype: Literal["float32", "bfloat16"] = "float32",
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
        max_fpr=max_fpr, recall=recall, sample_queries=sample_queries, columns=columns,
        value_model=value_model, merge=merge, component_dtype=component_dtype,
        vocabulary=vocabulary,
    )  # fmt: skip
    return save_retriever(retriever, folder, model_config=model_config)


def save_retriever(
    retriever: Retriever, folder: _Path, *, model_config: Mapping[str, Any] | None = None
) -> int:
    """Writes a built retriever as the next version of `folder`; returns the version."""
    if not isinstance(retriever.index, ItemIndex):
        raise PublishError(
            f"a {type(retriever.index).__name__} is not published: publish the whole ItemIndex, "
            "and split it after loading, onto as many devices as there are then"
        )
    tower, value_model = _tower_arrays(retriever.model), retriever.value_model
    index: dict[str, Any] = {}
    layout = _describe(retriever.index, "index", index)
    metadata = {
        "format": FORMAT,
        "model_config": dict(model_config or {}),
        "index": layout,
        "value_model": value_model.to_json() if value_model is not None else None,
        "merge": _merge_json(retriever.merge),
        "tower_arrays": _shapes(tower),
        "index_arrays": _shapes(index),
    }
    vocabulary = retriever.vocabulary
    raw_ids = None if vocabulary is None else list(vocabulary.raw_ids)
    with _manager(Path(folder), create=True) as manager:
        version = (manager.latest_step() or 0) + 1
        manager.save(
            version,
            args=ocp.args.Composite(
                tower=SaveArrays(tower),
                index=SaveArrays(index),
                metadata=ocp.args.JsonSave(metadata),  # type: ignore[call-arg]
                vocabulary=ocp.args.JsonSave({"raw_ids": raw_ids}),  # type: ignore[call-arg]
            ),
        )
        manager.wait_until_finished()
    _seal(Path(folder) / str(version))
    return version


def _seal(version: Path) -> None:
    """Lists the files of a version that is written, which makes it a published one."""
    partial = version / f".{_FILES}.partial"
    partial.write_text(json.dumps(list_files(version), indent=1))
    partial.rename(version / _FILES)


def load_retriever(
    folder: _Path,
    *,
    build_model: Callable[[dict[str, Any]], nnx.Module],
    version: int | None = None,
    check: bool = True,
) -> Retriever:
    """Restores a published version; its answers are bit for bit those of the published retriever.

    Args:
      folder: as given to `publish`.
      build_model: makes the untrained model from the published `model_config`.
      version: None takes the newest one that is whole; a newer one that is damaged or unfinished
        is passed over with a `PublishWarning` that names the file.
      check: read all files once to compare their SHA-256 with the published ones, before anything
        is made of them; presence and sizes are checked always.

    Raises:
      PublishError: no such version; a file is missing or damaged; or the weights do not fit the
        model that `build_model` made.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PublishError(f"{root} is not a folder; publish a retriever there first")
    with _manager(root, create=False) as manager:
        chosen = _choose(root, sorted(manager.all_steps()), version, check)
        at = root / str(chosen)
        read = _Reader(manager, chosen, at)
        metadata = read.json("metadata")
        if metadata.get("format") != FORMAT:
            raise PublishError(
                f"{at / 'metadata'} has format {metadata.get('format')}; this version of jaxrec "
                f"reads format {FORMAT}: publish again"
            )
        model = build_model(metadata["model_config"])
        _check_model(at / "tower", metadata["tower_arrays"], _shapes(_tower_arrays(model)))
        tower = read.arrays("tower", metadata["tower_arrays"])
        index = read.arrays("index", metadata["index_arrays"])
        raw_ids = read.json("vocabulary")["raw_ids"]
    _set_tower_arrays(model, tower)
    items = _rebuild(metadata["index"], index)
    described, merge = metadata["value_model"], metadata["merge"]
    return Retriever(
        model,
        items,
        value_model=None if described is None else ValueModel.from_json(described),
        merge=merge if isinstance(merge, str) else Quota(tuple(merge["quota"])),
        vocabulary=None if raw_ids is None else Vocabulary(tuple(raw_ids)),
    )


def _choose(root: Path, versions: Sequence[int], wanted: int | None, check: bool) -> int:
    """The version asked for, which must be whole, or the newest that is."""
    if not versions or (wanted is not None and wanted not in versions):
        raise PublishError(
            f"{root} has no version{'' if wanted is None else f' {wanted}'}; "
            f"published are: {', '.join(map(str, versions)) or 'none'}"
        )
    passed_over = []
    for version in reversed(versions) if wanted is None else [wanted]:
        damage = _damage(root / str(version), check)
        if damage is None:
            for what in passed_over:
                warnings.warn(f"{what}: version {version} is used", PublishWarning, stacklevel=3)
            return version
        passed_over.append(damage)
    raise PublishError(
        f"{'; '.join(passed_over)}. Restore the whole version folder from a copy, load another "
        "version, or publish again"
    )


def _damage(version: Path, check: bool) -> str | None:
    try:
        files = json.loads((version / _FILES).read_text())
    except FileNotFoundError:
        return f"{version / _FILES} is missing: the version was never finished, or was damaged"
    except ValueError as error:
        return f"{version / _FILES} is damaged ({error})"
    return find_damage(version, files, contents=check)


def _shapes(arrays: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}


def _check_model(tower: Path, published: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raises PublishError unless the model has the arrays that were published."""
    for name in sorted({*published, *model}):
        kinds = [f"{x[name][1]}{x[name][0]}" if name in x else "absent" for x in (published, model)]
        if kinds[0] != kinds[1]:
            raise PublishError(
                f"{tower}: {name} is {kinds[0]} there and {kinds[1]} in the model; build_model "
                "must make the model that was published"
            )


def _merge_json(merge: str | Policy) -> Any:
    if isinstance(merge, str):
        return merge
    if isinstance(merge, Quota):
        return {"quota": list(merge.shares)}
    raise PublishError(
        f"the merge policy {merge!r} is a function of yours, which cannot be published: publish "
        "with a named one, and pass yours on as Retriever(..., merge=...) after loading"
    )


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

    def arrays(self, item: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
        return self._restore(
            item, RestoreArrays({name: dtype for name, (_, dtype) in shapes.items()})
        )

    def _restore(self, item: str, args: Any) -> Any:
        try:
            return self.manager.restore(self.version, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:
            # Whatever Orbax or the file system raises, people need to know which part it was.
            raise PublishError(
                f"{self.folder / item} cannot be read ({type(error).__name__}: {error}); load "
                "another version, or publish again"
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


def _describe(node: Any, name: str, arrays: dict[str, Any]) -> Any:
    """The node as JSON; its arrays go to `arrays` under their paths, and the JSON names them."""
    if isinstance(node, jax.Array | np.ndarray):
        if not node.size:
            return {"empty": [list(node.shape), str(node.dtype)]}
        arrays[name] = node
        return {"array": name}
    if isinstance(node, bytes):
        return {"bytes": _describe(np.frombuffer(node, np.uint8), name, arrays)}
    if isinstance(node, TermCatalog):
        # JAX has no uint64 by default: hashes travel as pairs of uint32.
        hashes = np.asarray(node.hashes).view(np.uint32).reshape(-1, 2)
        return {
            "catalog": {"features": list(node.features), "seed": node.seed},
            "hashes": _describe(hashes, f"{name}.hashes", arrays),
            "head_rows": _describe(node.head_rows, f"{name}.head_rows", arrays),
        }
    if type(node).__name__ in _NODES:
        parts = {field.name: getattr(node, field.name) for field in fields(node)}
        return {"node": type(node).__name__, "fields": _describe(parts, name, arrays)}
    if isinstance(node, Mapping):
        return {"map": {key: _describe(x, f"{name}.{key}", arrays) for key, x in node.items()}}
    if isinstance(node, list | tuple):
        return {"tuple": [_describe(x, f"{name}.{i}", arrays) for i, x in enumerate(node)]}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise PublishError(f"{name} is a {type(node).__name__}, which cannot be published")


def _rebuild(layout: Any, arrays: Mapping[str, Any]) -> Any:
    """The node that `_describe` described."""
    match layout:
        case {"array": name}:
            return arrays[name]
        case {"empty": [shape, dtype]}:
            return np.zeros(shape, dtype)
        case {"bytes": inner}:
            return np.asarray(_rebuild(inner, arrays)).tobytes()
        case {"catalog": catalog, "hashes": hashes, "head_rows": head_rows}:
            return TermCatalog(
                tuple(catalog["features"]),
                catalog["seed"],
                np.array(_rebuild(hashes, arrays)).view(np.uint64).reshape(-1),
                np.array(_rebuild(head_rows, arrays)),
            )
        case {"node": name, "fields": parts}:
            return _NODES[name](**_rebuild(parts, arrays))
        case {"map": parts}:
            return {key: _rebuild(part, arrays) for key, part in parts.items()}
        case {"tuple": parts}:
            return tuple(_rebuild(part, arrays) for part in parts)
        case {"value": value}:
            return value
    raise PublishError(f"the metadata describe an unknown part: {layout}")
