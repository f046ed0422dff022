"""A synthetic catalogue with known structure: the data that needs no download.

Every item has a topic and a few successors. A user's next item mostly is a successor of the
last item, or of the one before it; otherwise one of the topic of the moment, or any popular
one. So the last items tell much, popularity tells little, and the second-last item tells what
the last alone cannot.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxrec.data.attributes import ItemAttributes
from jaxrec.data.interactions import Interactions, build_interactions
from jaxrec.data.vocabulary import Vocabulary

CATEGORIES = (
    "music",
    "pop",
    "film",
    "sport",
    "news",
    "games",
    "food",
    "travel",
    "craft",
    "science",
)
LANGUAGES = ("en", "es", "pt", "de", "fr", "hi", "ja", "ko")
PRICE_BANDS = ("free", "low", "middle", "high", "luxury")
_FIRST_SECOND = 1_704_067_200  # 2024-01-01 UTC
_DAY = 86_400
_DRAWS_PER_EVENT = 4


@dataclass(frozen=True)
class SyntheticConfig:
    """Sizes and probabilities of a synthetic catalogue.

    Attributes:
      num_users: users; each has min_events to max_events events, mean_events or so on average.
      num_items: catalogue items; rare ones may have no event.
      num_topics: latent topics; never shown, but `category` and `tags` follow them.
      num_creators: values of `creator`; each item has one.
      num_tags: values of `tags`; each item has 1 to 5.
      num_successors: items that may follow an item, the first far more often than the last.
      follow_last: probability that the next item is a successor of the last.
      follow_second_last: … of the one before the last.
      from_topic: … is drawn by popularity from the topic of the moment; what is left to 1 is
        drawn by popularity from all items.
      drift: probability, at the start of a session, that the user's topic changes.
      session_events: average events of a session.
      zipf_exponent: popularity of rank r is proportional to r ** -zipf_exponent.
      seed: the same config gives the same data (with the same NumPy).
    """

    num_users: int = 5_000
    num_items: int = 2_000
    num_topics: int = 20
    num_creators: int = 3_000
    num_tags: int = 300
    min_events: int = 5
    mean_events: float | int = 24.0
    max_events: int = 60
    num_successors: int = 4
    follow_last: float | int = 0.5
    follow_second_last: float | int = 0.2
    from_topic: float | int = 0.2
    drift: float | int = 0.3
    session_events: float | int = 6.0
    zipf_exponent: float | int = 1.0
    seed: int = 0

    def __post_init__(self):
        smallest = {"num_users": 1, "num_topics": 1, "num_creators": 1, "num_tags": 1}
        smallest |= {"min_events": 1, "num_successors": 1, "num_items": self.num_topics}
        smallest |= {"mean_events": self.min_events, "max_events": self.min_events}
        smallest |= {"session_events": 1, "zipf_exponent": 0, "seed": 0}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}.")
        shares = (self.follow_last, self.follow_second_last, self.from_topic)
        if min(*shares, self.drift) < 0 or sum(shares) > 1 or self.drift > 1:
            raise ValueError(
                f"follow_last, follow_second_last and from_topic are {shares}, drift is "
                f"{self.drift}; expected probabilities, the first three with a sum of at most 1."
            )


class SyntheticData(NamedTuple):
    """Interactions and the attributes of all items of the catalogue."""

    interactions: Interactions
    attributes: ItemAttributes


class _Catalogue(NamedTuple):
    """Items numbered from 0, with what decides who follows whom."""

    topic: np.ndarray  # [N]
    successors: np.ndarray  # [N, num_successors]
    successor_share: np.ndarray  # [num_successors], running total
    by_topic: np.ndarray  # [N], items sorted by topic
    weight_by_topic: np.ndarray  # [N + 1], running total of popularity in that order
    topic_start: np.ndarray  # [num_topics + 1], places in by_topic


def synthetic_catalogue(config: SyntheticConfig | None = None) -> SyntheticData:
    """Generates users, items and attributes; None takes the default sizes.

    Items are numbered 1..num_items and all of them are in the vocabulary. No user meets an item
    twice. Raw ids are "1", "2", …. Features: `category` (10 values, follows the topic), `language`
    (8, mostly "en"), `creator` (thousands, one an item), `tags` (hundreds, 1 to 5 an item),
    `price_band` (5).

    Cost: vectorised over users, one round an event; 5,000 users × 2,000 items take below 1 s.
    """
    config = config or SyntheticConfig()
    catalogue_rng, user_rng, attribute_rng = (
        np.random.default_rng([config.seed, part]) for part in range(3)
    )
    catalogue = _make_catalogue(config, catalogue_rng)
    users = Vocabulary.create("user", map(str, range(1, config.num_users + 1)), first_index=0)
    items = Vocabulary.create("item", map(str, range(1, config.num_items + 1)), first_index=1)
    events, seconds = _walk(config, catalogue, user_rng)
    user_index, place = np.nonzero(events)
    interactions = build_interactions(
        user_index.astype(np.int32),
        events[user_index, place],
        seconds[user_index, place],
        users=users,
        items=items,
        source="synthetic catalogue",
    )
    values = _make_attributes(config, catalogue.topic, attribute_rng)
    return SyntheticData(interactions, ItemAttributes(values, items))


def _make_catalogue(config: SyntheticConfig, rng: np.random.Generator) -> _Catalogue:
    n = config.num_items
    # Every topic has an item, so that a draw from a topic always has one to give.
    topic = np.concatenate(
        [np.arange(config.num_topics), rng.integers(config.num_topics, size=n - config.num_topics)]
    )
    topic = rng.permutation(topic)
    popularity = rng.permutation(np.arange(1, n + 1) ** -config.zipf_exponent)
    by_topic = np.argsort(topic, kind="stable")
    topic_start = np.searchsorted(topic[by_topic], np.arange(config.num_topics + 1))
    # One successor in four leads to a neighbouring topic; the others stay.
    leads_to = topic[:, None] + (rng.random((n, config.num_successors)) < 0.25)
    leads_to %= config.num_topics
    first, last = topic_start[leads_to], topic_start[leads_to + 1]
    share = np.cumsum(0.5 ** np.arange(config.num_successors))
    return _Catalogue(
        topic=topic,
        successors=by_topic[rng.integers(first, last)],
        successor_share=share / share[-1],
        by_topic=by_topic,
        weight_by_topic=np.insert(np.cumsum(popularity[by_topic]), 0, 0.0),
        topic_start=topic_start,
    )


def _walk(
    config: SyntheticConfig, catalogue: _Catalogue, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Item numbers from 1 (0 where there is no event) and seconds, both [users, max_events]."""
    num_users = config.num_users
    extra = rng.exponential(config.mean_events - config.min_events, num_users)
    lengths = np.minimum(config.min_events + extra.astype(np.int64), config.max_events)
    events = np.zeros((num_users, config.max_events), dtype=np.int32)
    seconds = np.zeros((num_users, config.max_events), dtype=np.int64)
    topic = rng.integers(config.num_topics, size=num_users)
    last = np.full(num_users, -1)
    second_last = np.full(num_users, -1)
    now = _FIRST_SECOND + rng.integers(60 * _DAY, size=num_users)
    for step in range(int(lengths.max())):
        active = np.flatnonzero(lengths > step)
        session_starts = rng.random(len(active)) < 1 / config.session_events
        drifts = session_starts & (rng.random(len(active)) < config.drift)
        # A drift leads to the next topic or, as often, to any.
        moves = rng.integers(config.num_topics, size=len(active))
        moves[rng.random(len(active)) < 0.5] = 1
        topic[active] = (topic[active] + drifts * moves) % config.num_topics
        pause = np.where(session_starts, _DAY, 90) * rng.lognormal(0.0, 0.8, len(active))
        now[active] += 1 + pause.astype(np.int64)
        item = _new_items(
            config,
            catalogue,
            rng,
            met=events[active, :step],
            topic=topic[active],
            last=last[active],
            second_last=second_last[active],
        )
        found = item >= 0
        active, item = active[found], item[found]
        events[active, step] = item + 1
        seconds[active, step] = now[active]
        second_last[active], last[active] = last[active], item
    return events, seconds


def _new_items(
    config: SyntheticConfig,
    catalogue: _Catalogue,
    rng: np.random.Generator,
    met: np.ndarray,
    topic: np.ndarray,
    last: np.ndarray,
    second_last: np.ndarray,
) -> np.ndarray:
    """The next item of each user, one not met before; -1 where a few draws found none."""
    item = np.full(len(topic), -1)
    for _ in range(_DRAWS_PER_EVENT):
        open_ = np.flatnonzero(item < 0)
        drawn = _draw(config, catalogue, rng, topic[open_], last[open_], second_last[open_])
        new = (met[open_] != drawn[:, None] + 1).all(axis=1)
        item[open_[new]] = drawn[new]
    return item


def _draw(
    config: SyntheticConfig,
    catalogue: _Catalogue,
    rng: np.random.Generator,
    topic: np.ndarray,
    last: np.ndarray,
    second_last: np.ndarray,
) -> np.ndarray:
    """One candidate a user, by the mixture that `SyntheticConfig` describes."""
    n = len(topic)
    kind = np.searchsorted(
        np.cumsum([config.follow_last, config.follow_second_last, config.from_topic]),
        rng.random(n),
        side="right",
    )
    origin = np.where(kind == 0, last, second_last)
    which = np.searchsorted(catalogue.successor_share, rng.random(n), side="right")
    follows = (kind < 2) & (origin >= 0)
    anywhere = kind == 3
    low = np.where(anywhere, 0, catalogue.topic_start[topic])
    high = np.where(anywhere, config.num_items, catalogue.topic_start[topic + 1])
    weight = catalogue.weight_by_topic
    place = np.searchsorted(
        weight, weight[low] + rng.random(n) * (weight[high] - weight[low]), side="right"
    )
    popular = catalogue.by_topic[np.clip(place - 1, low, high - 1)]
    return np.where(follows, catalogue.successors[origin, which], popular)


def _make_attributes(
    config: SyntheticConfig, topic: np.ndarray, rng: np.random.Generator
) -> dict[str, list[tuple[str, ...]]]:
    n = config.num_items
    follows_topic = rng.random(n) < 0.9
    category = np.where(follows_topic, topic, rng.integers(len(CATEGORIES), size=n))
    language = rng.choice(len(LANGUAGES), size=n, p=_zipf(len(LANGUAGES), 1.5))
    creator = rng.choice(config.num_creators, size=n, p=_zipf(config.num_creators, 0.5))
    price = rng.choice(len(PRICE_BANDS), size=n, p=[0.2, 0.3, 0.3, 0.15, 0.05])
    # Half of the tags are those of the topic: a block of the tag numbers.
    block = max(1, config.num_tags // config.num_topics)
    own = topic[:, None] * block + rng.integers(block, size=(n, 5))
    tags = np.where(rng.random((n, 5)) < 0.5, own, rng.integers(config.num_tags, size=(n, 5)))
    tags %= config.num_tags
    num_tags = rng.integers(1, 6, size=n)
    tag_rows = [
        tuple(dict.fromkeys(f"tag_{tag}" for tag in row[:count]))
        for row, count in zip(tags.tolist(), num_tags.tolist(), strict=True)
    ]
    return {
        "category": [(), *((CATEGORIES[c % len(CATEGORIES)],) for c in category.tolist())],
        "language": [(), *((LANGUAGES[i],) for i in language.tolist())],
        "creator": [(), *((str(i + 1),) for i in creator.tolist())],
        "tags": [(), *tag_rows],
        "price_band": [(), *((PRICE_BANDS[i],) for i in price.tolist())],
    }


def _zipf(n: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, n + 1) ** -exponent
    return weights / weights.sum()
