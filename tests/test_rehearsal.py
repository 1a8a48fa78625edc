"""What a step did is undone, whatever kind of state a module keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lte.rehearsal import untouched


@dataclass(slots=True)
class Counted:
    samples: int = 0


@dataclass(slots=True)
class CountedAndListed(Counted):
    seen: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Frozen:
    seen: list[int]


class Private:
    """Slots that are private, empty, and beside a dict."""

    __slots__ = ("__dict__", "__own", "later")

    def __init__(self) -> None:
        self.__own = 0
        self.free = 0

    def count(self) -> None:
        self.__own += 1
        self.free += 1

    def counts(self) -> tuple[int, int]:
        return self.__own, self.free


def holding(**values: Any) -> Any:
    module: Any = nn.Module()
    for name, value in values.items():
        setattr(module, name, value)
    return module


def test_objects_with_slots_are_put_back() -> None:
    own = CountedAndListed(3, [1])
    seen, private = own.seen, Private()
    module = holding(own=own, frozen=Frozen([1]), private=private)
    with untouched(module) as again:
        for _ in range(2):
            module.own.samples += 5
            module.own.seen.append(2)
            module.own.seen = None
            module.frozen.seen.append(2)
            private.count()
            private.later = 1
            again()
            assert own == CountedAndListed(3, [1]) and own.seen is seen and module.own is own
            assert module.frozen == Frozen([1])
            assert private.counts() == (0, 0) and not hasattr(private, "later")
        del own.samples
    assert own.samples == 3
