"""Published settings, one typed file a dataset; `find("beauty-hstu")` gives one of them."""

import importlib
import inspect
import pkgutil

from experiments.settings.base import Setting


def names() -> list[str]:
    """All settings, as `<dataset>-<model>`."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        makers = inspect.getmembers(loaded, inspect.isfunction)
        found += [
            f"{module.name}-{name.replace('_', '-')}"
            for name, maker in makers
            if maker.__module__ == loaded.__name__ and not name.startswith("_")
        ]
    return sorted(found)


def find(name: str) -> Setting:
    """The setting of that name; an unknown one is a ValueError that lists them."""
    known = names()
    if name not in known:
        raise ValueError(f"unknown setting {name!r}; known are {', '.join(known)}")
    dataset, model = name.split("-", 1)
    return getattr(importlib.import_module(f"{__name__}.{dataset}"), model.replace("-", "_"))()
