"""What a setting consists of, and how its data is read."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxrec.data import (
    Dataset,
    EvalSet,
    SequenceDataset,
    Split,
    dataset_of,
    filter_min_count,
    leave_one_out,
    read_dataset,
    read_sequences,
)
from jaxrec.data.splits import SplitReport
from jaxrec.nn import HSTU, HSTUConfig, MoEConfig, SASRec, SASRecConfig
from jaxrec.train import LossConfig, OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class Published:
    """A figure of a paper or repository; None where it was not given."""

    source: str
    hr10: float | None
    ndcg10: float | None

    def __str__(self) -> str:
        shown = ["-" if f is None else f"{f:.4f}" for f in (self.hr10, self.ndcg10)]
        return f"{' / '.join(shown)} ({self.source})"


@dataclass(frozen=True)
class Setting:
    """One dataset, one model, one way to train it.

    Attributes:
      data: folder that `--data` defaults to; see `load_split` for what it may hold.
      model: `SASRecConfig` or `HSTUConfig`; `num_items` is filled in from the data.
      attributes: whether items are embedded with their attributes.
      min_count: users and items with fewer events are dropped (k-core).
      published: what others reached.
    """

    data: Path
    model: SASRecConfig | HSTUConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    attributes: bool = False
    min_count: int = 1
    published: tuple[Published, ...] = ()


SMALL_CATALOGUE = TrainConfig(
    token_budget=1024,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
    ema_decay=0.999,
    num_epochs=40,
    eval_users=8192,
    patience=5,
)
"""Training for catalogues of some ten thousand items and short histories."""


LARGE_CATALOGUE = TrainConfig(
    loss=LossConfig("sampled", num_negatives=512),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
    num_epochs=100,
    eval_users=8192,
    patience=10,
)
"""Training for catalogues too large for a softmax over all items; batch sizes are a setting's."""


def sasrec(data: Path, *published: Published) -> Setting:
    """SASRec as it is known: attention only, item numbers only, full softmax."""
    model = SASRecConfig(num_items=1, max_len=50, width=64, num_blocks=2, dropout=0.5)
    return Setting(data, model, SMALL_CATALOGUE, published=published)


def hstu(data: Path, *published: Published) -> Setting:
    """HSTU with the width, depth and loss of `sasrec`."""
    model = HSTUConfig(num_items=1, max_len=50, width=64, num_blocks=2, dropout=0.5)
    return Setting(data, model, SMALL_CATALOGUE, published=published)


def filtered(data: Path, *published: Published, attributes: bool) -> Setting:
    """`sasrec` with a causal frequency filter beside attention, and the items' attributes."""
    model = SASRecConfig(num_items=1, max_len=50, width=64, dropout=0.5, filter_share=0.7)
    return Setting(data, model, SMALL_CATALOGUE, attributes=attributes, published=published)


def with_experts(setting: Setting, *, num_experts: int, slots: int, hidden: int) -> Setting:
    """The setting with experts for a feed-forward network, balanced by loss and by bias.

    A token's multiply-adds, but for the router's, depend on slots · hidden alone.
    """
    balanced = num_experts > slots
    moe = MoEConfig(
        setting.model.width,
        num_experts,
        hidden,
        slots,
        balance_weight=0.01 if balanced else 0.0,
        z_weight=0.001 if balanced else 0.0,
        bias_rate=1e-3 if balanced else 0.0,
    )
    return replace(setting, model=replace(setting.model, moe=moe), published=())


def load_split(folder: Path, *, min_count: int = 1) -> tuple[Dataset, Split]:
    """A dataset and its split.

    With `val/input.txt` and `val/output.txt` (gSASRec's layout) these are the questions, both for
    validation and, as the folder holds no other complete ones, for the final figures. Everything
    else is split leave-one-out.
    """
    if (folder / "val/input.txt").is_file():
        return _given_split(folder)
    dataset = read_dataset(folder)
    if min_count > 1:
        kept = filter_min_count(dataset.interactions, min_user=min_count, min_item=min_count)
        attributes = dataset.attributes and dataset.attributes.aligned_to(kept.items)
        dataset = Dataset(kept, attributes, dataset.files)
    return dataset, leave_one_out(dataset.interactions)


def _given_split(folder: Path) -> tuple[Dataset, Split]:
    paths = [folder / "train/input.txt", folder / "val/input.txt", folder / "val/output.txt"]
    interactions = read_sequences(paths[0], user_column=False)
    train = dataset_of(interactions)
    numbers = interactions.items.indices_of
    histories = [numbers(line.split()) for line in paths[1].read_text().splitlines()]
    questions = EvalSet(
        SequenceDataset.from_sequences(
            [history.tolist() for history in histories], num_items=train.num_items
        ),
        np.asarray(numbers(paths[2].read_text().split()), np.int32),
    )
    users = len(train)
    report = SplitReport(users, len(questions), len(questions), users - len(questions), 0)
    return Dataset(interactions, None, paths), Split(train, questions, questions, report)


def build_model(setting: Setting, dataset: Dataset, split: Split, *, seed: int) -> SASRec | HSTU:
    """The setting's model for this data."""
    changes: dict[str, Any] = {"num_items": split.train.num_items}
    attribute_ids = None
    if setting.attributes:
        if dataset.attributes is None:
            raise ValueError("the setting embeds attributes, and the data folder has none")
        attribute_ids, num_attributes = dataset.attributes.matrix()
        changes |= {"num_attributes": num_attributes, "attribute_slots": attribute_ids.shape[1]}
    config = replace(setting.model, **changes)
    if isinstance(config, SASRecConfig):
        return SASRec(config, rngs=nnx.Rngs(seed), attribute_ids=attribute_ids)
    return HSTU(config, rngs=nnx.Rngs(seed), attribute_ids=attribute_ids)
