"""Reading a dataset folder by the file names that its publishers use."""

from pathlib import Path
from typing import NamedTuple

from jaxrec.data.attributes import (
    ItemAttributes,
    read_item_attributes_csv,
    read_item_attributes_json,
)
from jaxrec.data.interactions import Interactions
from jaxrec.data.readers import read_events_jsonl, read_movielens, read_sequences


class Dataset(NamedTuple):
    """Events, the attributes of their items (None if there are none), and the files read."""

    interactions: Interactions
    attributes: ItemAttributes | None
    files: list[Path]


def read_dataset(folder: str | Path) -> Dataset:
    """Reads the first of these that `folder` holds.

    - `sequences.txt`: a user and its items a line; attributes from `item2attributes.json`;
    - `ratings.csv` or `ratings.dat` (MovieLens); genres from `movies.csv`;
    - `train/input.txt`: a user's items a line, without the user;
    - `train.jsonl`: sessions of events (OTTO).

    Raises:
      FileNotFoundError: the folder is missing, or holds none of them.
    """
    folder = Path(folder)
    for name, read in _LAYOUTS.items():
        if (folder / name).is_file():
            return read(folder, folder / name)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"{folder} holds none of {', '.join(_LAYOUTS)} (found: {found}). Read other layouts with "
        "read_sequences, read_movielens, read_events_jsonl or read_table."
    )


def _sequences(folder: Path, path: Path) -> Dataset:
    interactions = read_sequences(path, user_column=True)
    attributes = folder / "item2attributes.json"
    if not attributes.is_file():
        return Dataset(interactions, None, [path])
    read = read_item_attributes_json(attributes, interactions.items)
    return Dataset(interactions, read, [path, attributes])


def _movielens(folder: Path, path: Path) -> Dataset:
    interactions = read_movielens(path)
    movies = folder / "movies.csv"
    if not movies.is_file():
        return Dataset(interactions, None, [path])
    genres = read_item_attributes_csv(
        movies, interactions.items, item_column="movieId", features={"genres": "|"}
    )
    return Dataset(interactions, genres, [path, movies])


def _bare_sequences(folder: Path, path: Path) -> Dataset:
    return Dataset(read_sequences(path, user_column=False), None, [path])


def _events(folder: Path, path: Path) -> Dataset:
    return Dataset(read_events_jsonl(path), None, [path])


_LAYOUTS = {
    "sequences.txt": _sequences,
    "ratings.csv": _movielens,
    "ratings.dat": _movielens,
    "train/input.txt": _bare_sequences,
    "train.jsonl": _events,
}
