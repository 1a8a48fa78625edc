"""What loaders tell of the batches that heads are to share."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_lte.batch import REMEDY, Layout


def first_layout(batch: Any, loader: Any, count: int, combined: type) -> Layout:
    """See how batches are laid out, from the first one.

    Args:
        batch: the first one.
        loader: of the training; a DataLoader, or what Lightning makes one of, such as several.
        count: n, local heads, where they are most.
        combined: Lightning's CombinedLoader.

    Raises:
        ValueError: local heads don't divide the batch of a device, or batches that come together differ in size; or it
            can't be told where samples are.
    """
    if not isinstance(loader, DataLoader):
        _check_sizes(combined(loader).flattened)
        return Layout(batch)
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    length = _length(loader)
    expected = min(batch_size, length) if batch_size and length else batch_size
    try:
        layout = Layout(batch, expected)
    except ValueError:
        if loader.batch_size is not None or expected is None:
            raise
        layout = Layout(batch)  # a batch sampler of the user's own may count other things than samples
    if batch_size is not None and batch_size % count and layout.size(batch) == expected:
        above = -(-batch_size // count) * count
        raise ValueError(
            f"The batch of a device is split evenly over its {count} heads; received a batch size of {batch_size}."
            f" Give a multiple of {count}, such as batch_size={above}. (A smaller last batch of an epoch is fine.)"
        )
    return layout


def _check_sizes(together: list[Any]) -> None:
    """Refuse loaders whose batches come together and differ in size."""
    known = [(own.batch_size, _length(own)) for own in together if isinstance(own, DataLoader) and own.batch_size]
    sizes = sorted({min(size, length or size) for size, length in known})
    if len(sizes) > 1:
        raise ValueError(
            "Local heads share a device by splitting the batch, for which the batches of several loaders must have"
            f" one size; received batch sizes {sizes}. Give all loaders the same. {REMEDY}."
        )


def _length(loader: Any) -> int:
    """Samples in an epoch of a loader; 0 where it can't tell."""
    try:
        return len(loader.sampler)
    except (AttributeError, TypeError):
        return 0
