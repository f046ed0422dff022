"""Checks of model configurations, made when the configuration is."""

from collections.abc import Sequence


def check_at_least(config: object, **least: int) -> None:
    """Raises ValueError for the first field that is below its least value."""
    for name, low in least.items():
        value = getattr(config, name)
        if value < low:
            raise ValueError(f"{type(config).__name__}.{name} is {value}; expected {low} or more")


def check_share(config: object, name: str, *, below_one: bool) -> None:
    """Raises ValueError unless 0 ≤ value ≤ 1, or < 1 for `below_one`."""
    value = getattr(config, name)
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        limit = "below 1" if below_one else "at most 1"
        raise ValueError(f"{type(config).__name__}.{name} is {value}; expected 0 or more, {limit}")


def check_choice(config: object, name: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the field is one of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        listed = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{type(config).__name__}.{name} is {value!r}; expected {listed}")


def check_heads(config: object, width: int, num_heads: int) -> None:
    """Raises ValueError unless the heads share the width equally."""
    if width % num_heads:
        raise ValueError(
            f"{type(config).__name__}: width {width} does not divide into num_heads={num_heads}; "
            f"choose a width that is a multiple of num_heads"
        )
