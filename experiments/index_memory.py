"""What an item index of a given size takes, beside SilverTorch's published figures.

    python -m experiments.index_memory --items 40_000_000 --width 128

The default is half of SilverTorch's 80 million items, which it serves from two GPUs: 6 features
with about 10 values each, five hashes.
"""

import argparse

from rich.console import Console
from rich.table import Table

from jaxrec.retrieval.memory import IndexBytes, index_bytes

PUBLISHED_GB = {"codes": 5.0, "vectors": 10.0, "bloom": 5.0}
"""Per GPU, for 40 of 80 million items at 1024 Bloom bits (SilverTorch v5, fp16 item cache)."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="bytes of an item index, by part")
    parser.add_argument("--items", type=int, default=40_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--nlist", type=int, default=4_500)
    parser.add_argument("--tail-terms", type=float, default=60)
    parser.add_argument("--head-values", type=int, default=0)
    parser.add_argument("--max-fpr", type=float, default=1e-3)
    options = parser.parse_args()
    sizes = index_bytes(
        options.items, options.width, nlist=options.nlist, head_values=options.head_values,
        tail_terms=options.tail_terms, terms=options.tail_terms, max_fpr=options.max_fpr,
        vector_itemsize=2,
    )  # fmt: skip
    table = Table("part", "GB", "SilverTorch, GB", title=f"{options.items:,} items, computed")
    for name in IndexBytes._fields:
        published = PUBLISHED_GB.get(name)
        shown = f"{published:.1f}" if published and options.items == 40_000_000 else ""
        table.add_row(name, f"{getattr(sizes, name) / 1e9:.2f}", shown)
    table.add_row("total", f"{sizes.total / 1e9:.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
