"""Dealing batches out loses no sample and mixes none."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors

from lightning_lte.batch import Layout, copied, layout_of

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: torch.Tensor
    names: list[str]


def numbers(n: int) -> torch.Tensor:
    return torch.arange(n)


@pytest.mark.parametrize(
    "batch",
    [
        numbers(6),
        (numbers(6), torch.zeros(6, 3)),
        [numbers(6), 3.5, None, np.int64(3), np.float32(0.5)],
        {"x": numbers(6), "nested": {"y": [torch.zeros(6, 2, 2)]}, "mode": "train"},
        OrderedDict(x=numbers(6)),
        Pair(numbers(6), torch.ones(6)),
        Record(numbers(6), list("abcdef")),
        (numbers(6), torch.tensor(1.0)),
    ],
)
def test_structures_are_measured_and_kept(batch: Any) -> None:
    layout = Layout(batch)
    assert layout.size(batch) == 6
    parts = layout.split(batch, 3)
    assert len(parts) == 3 and all(type(part) is type(batch) and layout.size(part) == 2 for part in parts)


class Table:
    """Tensors with dimensions in common, as tensordict's `tensorclass` has them: assigning one leaves the others."""

    def __init__(self, batch_size: list[int], **columns: torch.Tensor) -> None:
        self._size, self.columns = torch.Size(batch_size), columns

    @property
    def batch_size(self) -> torch.Size:
        return self._size

    def __getitem__(self, rows: slice) -> Table:
        cut = {name: column[rows] for name, column in self.columns.items()}
        return Table([len(next(iter(cut.values()))), *self._size[1:]], **cut)

    def clone(self) -> Table:
        return Table(list(self._size), **{name: column.clone() for name, column in self.columns.items()})

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Table:
        assert function is torch.cat
        tables = args[0]
        columns = {name: torch.cat([table.columns[name] for table in tables]) for name in tables[0].columns}
        return Table([sum(table.batch_size[0] for table in tables)], **columns)


class TableOfKeys(Table, Mapping):  # type: ignore[type-arg]
    """The same, and a mapping, as `TensorDict` is."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return self._size[0]


@pytest.mark.parametrize("kind", [Table, TableOfKeys])
def test_tables_of_tensors_are_cut_as_one(kind: Any) -> None:
    batch = {"in": kind([6], x=numbers(6), y=torch.zeros(6, 3)), "weight": torch.ones(6)}
    layout = Layout(batch)
    assert layout.size(batch) == 6
    parts = layout.split(batch, 3)
    assert [part["in"].batch_size for part in parts] == [(2,)] * 3
    assert [part["in"].columns["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    parts[1]["in"].columns["x"] += 1
    copied(batch)["in"].columns["x"] += 1
    assert batch["in"].columns["x"].tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.filled_up(batch, 4)["in"].columns["x"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_tables_that_have_no_dimension_in_common_are_refused() -> None:
    with pytest.raises(ValueError, match=r"received Table \(batch_size \[\]\) of tensors"):
        Layout(Table([], x=numbers(6)))


@pytest.mark.parametrize(
    "batch", [3, "text", [], {"x": numbers(6), "y": numbers(5)}, (numbers(6), object()), [torch.tensor(1.0)]]
)
def test_what_can_not_be_measured_is_refused_with_the_remedy(batch: Any) -> None:
    with pytest.raises(ValueError, match="one head per device, or define `split_batch"):
        Layout(batch)


@pytest.mark.parametrize("expected", [None, 8])
@pytest.mark.parametrize(
    "batch",
    [
        {"labelled": [numbers(8), numbers(8)], "unlabelled": [numbers(16), numbers(16)]},
        {"labelled": [numbers(8)], "unlabelled": [numbers(16)]},
        [[numbers(8), numbers(8)], [numbers(16), numbers(16)]],
        {"levels": [numbers(64), numbers(16), numbers(4)]},
        {"views": [{"x": numbers(8)}, {"x": numbers(16)}]},
    ],
    ids=["pairs", "singles", "sequence", "pyramid", "mappings"],
)
def test_lists_of_the_parts_of_a_batch_are_not_taken_for_lists_of_samples(batch: Any, expected: int | None) -> None:
    """As two loaders of different batch sizes give them: every head would train on items of the lists."""
    with pytest.raises(ValueError, match=r"received tensors with dimension 0 of sizes \[.*16.* or define `split_batch"):
        Layout(batch, expected)


def uncuttable(kind: str) -> torch.Tensor:
    dense = torch.eye(4)
    if kind in ("nested", "jagged"):
        rows = [dense[: 1 + i] for i in range(4)]
        return torch.nested.nested_tensor(rows, layout=torch.jagged if kind == "jagged" else torch.strided)
    return dense.to_sparse() if kind == "sparse_coo" else dense.to_sparse_csr()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse")
@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "nested", "jagged"])
def test_tensors_that_can_not_be_cut_are_refused_with_their_kind(kind: str) -> None:
    odd = uncuttable(kind)
    name = "nested" if kind == "jagged" else kind
    for batch in (odd, {"x": odd}, {"x": odd, "y": numbers(4)}, {"x": [odd, odd]}):
        with pytest.raises(ValueError, match=rf"must be dense .*received .*{name} tensors.* define `split_batch"):
            Layout(batch, 4)
    with pytest.raises(ValueError, match=rf"made as the first one is.* {name} tensors"):
        Layout({"x": numbers(4), "y": numbers(4)}).size({"x": odd, "y": numbers(4)})
    # Whole items need no cut.
    first, _ = halves({"x": numbers(4), "targets": [{"mask": odd}] * 4})
    assert len(first["targets"]) == 2 and first["targets"][0]["mask"] is odd


@given(samples=st.integers(1, 40), count=st.integers(1, 9), least=st.integers(1, 3))
def test_every_sample_is_used_in_order_and_no_head_goes_without(samples: int, count: int, least: int) -> None:
    parts = Layout(numbers(samples)).split(numbers(samples), count, least)
    assert len(parts) == count
    sizes = [len(part) for part in parts]
    assert min(sizes) >= least and max(sizes) - min(sizes) <= 1
    dealt = torch.cat(parts).tolist()
    assert dealt[:samples] == list(range(samples)) and len(dealt) == max(samples, count * least)


@given(samples=st.integers(1, 40), count=st.integers(1, 9))
def test_filling_up_repeats_from_the_start(samples: int, count: int) -> None:
    filled = Layout(numbers(samples)).filled_up(numbers(samples), count).tolist()
    assert len(filled) % count == 0 and len(filled) - samples < count
    assert filled[:samples] == list(range(samples))


def halves(batch: Any, expected: int | None = None) -> tuple[Any, Any]:
    first, second = Layout(batch, expected).split(batch, 2)
    return first, second


def test_strings_are_dealt_out_with_their_samples() -> None:
    first, second = halves({"x": numbers(4), "text": ["a", "b", "c", "d"]})
    assert first["text"] == ["a", "b"] and second["text"] == ["c", "d"]


def test_items_of_any_kind_are_dealt_out_with_their_samples() -> None:
    meta: list[Any] = [{"id": 0, "box": torch.zeros(3, 4)}, {"id": 1}, {"id": 2}, {"id": 3}]
    first, second = halves({"x": numbers(4), "meta": meta, "pairs": [(0, 1)] * 4, "maybe": ["a", None, "b", None]})
    assert [m["id"] for m in first["meta"]] == [0, 1] and [m["id"] for m in second["meta"]] == [2, 3]
    assert first["meta"][0]["box"].shape == (3, 4)
    assert len(first["pairs"]) == len(second["pairs"]) == 2 and first["maybe"] == ["a", None]


def test_images_of_different_sizes_and_of_one_size_are_dealt_out_whole() -> None:
    """As detection has them: Lightning takes the three channels for the batch."""
    for sizes in ([5, 6, 7, 8], [5, 5, 5, 5]):
        images = [torch.full((3, size, 4), float(i)) for i, size in enumerate(sizes)]
        targets = [{"boxes": torch.zeros(i, 4), "labels": torch.zeros(i)} for i in range(4)]
        for batch in ((images, targets), [images, tuple(targets)]):
            first, second = halves(batch, expected=4)
            assert [int(image.max()) for image in first[0]] == [0, 1] and second[0][0] is images[2]
            assert len(second[1]) == 2 and second[1][1]["boxes"].shape == (3, 4)
        layout = Layout((images, targets), 4)
        assert layout.size((images[:3], targets[:3])) == 3  # as the channels, and yet a list of images


def test_lists_beside_one_of_images_are_lists_of_samples_too_whatever_their_lengths() -> None:
    """A vector of 4 numbers, or 4 boxes, for each of 4 images of different sizes, as `zip(*samples)` has them."""
    images = [torch.zeros(3, 5 + i, 4) for i in range(4)]
    for shape in ((4,), (4, 4)):
        vectors = [torch.full(shape, float(i)) for i in range(4)]
        for batch in ((images, vectors), {"vectors": vectors, "images": images}):
            _, second = halves(batch, expected=4)
            own = second["vectors"] if isinstance(second, dict) else second[1]
            assert [int(v.max()) for v in own] == [2, 3] and own[0].shape == shape


@dataclass
class Graphs:
    """Graphs in one, as chemprop has them: what its `__init__` takes is none of its fields."""

    sizes: InitVar[list[int]]
    nodes: torch.Tensor = field(init=False)
    owner: torch.Tensor = field(init=False)
    later: Any = field(init=False)

    def __post_init__(self, sizes: list[int]) -> None:
        self.nodes, self.owner = torch.zeros(sum(sizes), 2), torch.arange(len(sizes))


def test_fields_of_dataclasses_that_are_set_later_count() -> None:
    """Every head would have all graphs, and targets for some of them."""
    with pytest.raises(ValueError, match=r"received tensors with dimension 0 of sizes \[4, 9\].* define `split_batch"):
        Layout((Graphs([1, 2, 2, 4]), numbers(4)), 4)
    first, second = halves((Graphs([1, 1, 1, 1]), numbers(4)), 4)
    assert first[0].owner.tolist() == [0, 1] and second[0].owner.tolist() == second[1].tolist() == [2, 3]


def test_images_beside_their_targets_are_told_without_a_batch_size() -> None:
    images = [torch.full((3, 5 + i, 4), float(i)) for i in range(4)]
    targets = [{"boxes": torch.zeros(i, 4)} for i in range(4)]
    for expected in (None, 6):
        first, second = halves((images, targets), expected)
        assert [int(image.max()) for image in first[0]] == [0, 1] and second[1] == targets[2:]


@pytest.mark.parametrize("rows", [[0, 1], [3, 1]])
def test_classes_of_tensors_are_kept_with_what_they_know(rows: list[int]) -> None:
    image = tv_tensors.Image(torch.arange(16.0).view(4, 1, 2, 2))
    boxes = tv_tensors.BoundingBoxes(torch.arange(16).view(4, 4), format="CXCYWH", canvas_size=(5, 6))
    batch = {"image": image, "boxes": boxes, "plain": numbers(4)}
    part = Layout(batch).take(batch, rows)
    assert {name: type(value) for name, value in part.items()} == {k: type(v) for k, v in batch.items()}
    assert part["boxes"].format == boxes.format and part["boxes"].canvas_size == (5, 6)
    assert torch.equal(part["image"].as_subclass(torch.Tensor), image.as_subclass(torch.Tensor)[rows])


def test_classes_of_tensors_that_slice_themselves_are_believed() -> None:
    class Labelled(torch.Tensor):
        labels: list[str]

        def __getitem__(self, index: Any) -> Any:
            part = super().__getitem__(index)
            part.labels = self.labels[index]
            return part

    labelled = numbers(4).as_subclass(Labelled)
    labelled.labels = list("abcd")
    first, second = halves(labelled)
    assert first.labels == ["a", "b"] and second.labels == ["c", "d"]


def test_a_loader_may_leave_samples_out_but_not_hold_more() -> None:
    assert Layout((numbers(15), numbers(15)), expected=16).size((numbers(16), numbers(16))) == 16
    with pytest.raises(ValueError, match="sizes \\[32\\] from a loader with batch_size=16"):
        Layout(numbers(32), expected=16)


def test_batches_that_are_made_otherwise_later_are_refused() -> None:
    layout = Layout({"x": numbers(4), "y": numbers(4)})
    for other in ({"x": numbers(4), "y": numbers(5)}, {"x": numbers(4), "z": numbers(4)}):
        with pytest.raises(ValueError, match="made as the first one is"):
            layout.size(other)


def images(count: int, channels: int = 3) -> list[torch.Tensor]:
    return [torch.full((channels, 5 + i, 4), float(i)) for i in range(count)]


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({"x": numbers(4)}, {"x": numbers(3), "mask": torch.arange(3)}),
        ({"x": numbers(4), "mask": None}, {"x": numbers(3), "mask": torch.arange(3)}),
        ({"x": numbers(4)}, {"x": numbers(3), "mask": [0, 1, 2]}),
        ({"mask": images(4), "y": numbers(4)}, {"mask": torch.arange(3), "y": numbers(3)}),
        ({"mask": numbers(4), "y": numbers(4)}, {"mask": images(3), "y": numbers(3)}),
        ({"mask": images(4), "y": numbers(4)}, {"mask": images(3)}),
    ],
    ids=["key", "none", "list", "stacked", "unstacked", "alone"],
)
def test_keys_that_come_later_are_dealt_out_as_those_that_were_there(first: Any, later: Any) -> None:
    """Four samples at first, and then three, which images have as channels."""
    known = [Layout(first, 4)]
    layout = layout_of(later, known)
    assert known == [known[0], layout] and layout.size(later) == 3
    mask = [int(torch.as_tensor(part).max()) for part in layout.take(later, [0, 2])["mask"]]
    assert mask == [0, 2]
    assert layout_of(first, known) is known[0] and layout_of(later, known) is layout


def test_as_many_views_of_all_samples_as_samples_are_not_taken_for_samples() -> None:
    """Beside images, and in the last batch of an epoch, which is of another structure than the others."""
    known = [Layout({"views": [torch.zeros(4, 2)] * 2, "images": images(4), "boxes": [{}] * 4}, 4)]
    assert known[0].size({"views": [torch.zeros(2, 2)] * 2, "images": images(2), "boxes": [{}] * 2}) == 2
    batch = {"views": [torch.zeros(2, 2)] * 2, "images": images(2, 2), "boxes": [{}] * 2, "mask": numbers(2)}
    part = layout_of(batch, known).take(batch, [1])
    assert [view.shape for view in part["views"]] == [(1, 2), (1, 2)]
    assert len(part["images"]) == len(part["boxes"]) == 1 and part["mask"].tolist() == [1]


@pytest.mark.parametrize(
    ("later", "found"),
    [
        ({"x": numbers(4), "mask": numbers(5)}, r"\[4, 5\] \(4 in batch\['x'\]; 5 in batch\['mask'\]\)"),
        ({"x": numbers(4), "meta": object()}, r"\[4\] and objects of kind object \(batch\['meta'\]\)"),
        ({"x": {"a": numbers(3), "b": [numbers(4), numbers(4)]}}, r"3 in batch\['x'\]\['a'\]; 4 in .*\['b'\]\[1\]"),
    ],
)
def test_what_is_refused_later_is_named(later: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"{found}.* define `split_batch"):
        layout_of(later, [Layout({"x": numbers(4)}, 4)])


def test_the_difference_between_structures_is_named() -> None:
    known = [Layout({"x": numbers(4), "y": numbers(4), "z": None})]
    later = layout_of({"x": numbers(4), "z": numbers(4), "w": 3}, known)
    assert later.difference(known[0]) == "with batch['w'], without batch['y'], with other kinds of things in batch['z']"


def test_lists_of_what_is_shared_by_all_samples_are_of_one_structure_whatever_their_lengths() -> None:
    known = [Layout({"x": numbers(4), "captions": ["a"] * 7, "pairs": [(0, 1), (2, 3)]}, 4)]
    for length in (9, 4, 1):
        batch = {"x": numbers(4), "captions": ["b"] * length, "pairs": [(0, 1)] * length}
        assert layout_of(batch, known) is known[0] and known[0].take(batch, [0])["captions"] == ["b"] * length


def test_empty_batches_are_left_alone() -> None:
    layout = Layout(numbers(4))
    assert [len(part) for part in layout.split(numbers(0), 3)] == [0, 0, 0]


def test_mappings_of_other_classes() -> None:
    class Encoding(UserDict):  # type: ignore[type-arg]
        """As transformers' BatchEncoding is."""

    first, second = halves(Encoding(ids=torch.arange(8).view(4, 2), mask=numbers(4)))
    assert isinstance(first, Encoding) and second["ids"].tolist() == [[4, 5], [6, 7]]
    first, _ = halves(MappingProxyType({"x": numbers(4)}))
    assert first["x"].tolist() == [0, 1]


def test_a_mapping_whose_copies_share_its_items_is_left_as_it_is() -> None:
    class Wrapping(MutableMapping):  # type: ignore[type-arg]
        def __init__(self, **items: Any) -> None:
            self.items_by_key = items

        def __getitem__(self, key: str) -> Any:
            return self.items_by_key[key]

        def __setitem__(self, key: str, value: Any) -> None:
            self.items_by_key[key] = value

        def __delitem__(self, key: str) -> None:
            del self.items_by_key[key]

        def __iter__(self) -> Iterator[str]:
            return iter(self.items_by_key)

        def __len__(self) -> int:
            return len(self.items_by_key)

    name, x = "name", numbers(4)
    batch = Wrapping(name=name, x=x)
    assert Layout(batch).size(batch) == 4 and batch["name"] is name and batch["x"] is x
    first, second = halves(batch)
    assert (first["name"], first["x"].tolist(), second["x"].tolist()) == ("name", [0, 1], [2, 3])
    copied(batch)["x"].zero_()
    assert batch["x"] is x and x.tolist() == [0, 1, 2, 3]


def test_a_copy_may_be_written_to() -> None:
    kept = {"x": numbers(6).double(), "rows": [torch.ones(6, 2), "text"], "mask": tv_tensors.Mask(torch.ones(6, 4, 4))}
    copy = copied(kept)
    copy["x"].zero_()
    copy["rows"][0].zero_()
    copy["rows"].append(3)
    assert type(copy["mask"]) is tv_tensors.Mask and copy.pop("mask") is not kept["mask"]
    assert kept["x"].sum() == 15 and kept["rows"][0].sum() == 12 and len(kept["rows"]) == 2 and "mask" in kept


def test_slices_are_tensors_of_their_own_to_autograd() -> None:
    """And all of them lie in the batch, which sees what is written to them."""
    x = torch.ones(6, 2)
    first, second = Layout(x).split(x, 2)
    weight = torch.ones(2, requires_grad=True)
    loss = (first * weight).sum()
    second.div_(2)
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [3, 3] and x[3:].sum() == 3
