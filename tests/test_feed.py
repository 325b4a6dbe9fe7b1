"""A run's position in its examples, when its batch size or the order of its examples changes."""

from collections import Counter
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

import numpy as np
import pytest
import torch

from train.data.batches.buckets import Buckets
from train.data.batches.images import StreamOrder
from train.data.batches.records import Examples
from train.data.order.permutation import Order, Repeated, Shifted, Shuffled
from train.engine.feed import Feed


class Indices(NamedTuple):
    """A dataset without images."""

    order: Order

    def shifted(self, shift: int) -> Self:
        return self._replace(order=Shifted(self.order, shift))

    def __getitems__(self, positions: list[int]) -> Examples:
        at = np.asarray(positions, np.int64)
        return Examples(position=torch.from_numpy(at), index=torch.from_numpy(self.order.at(at)))


START = {"position": 0, "order": "", "shift": 0, "epochs": 0}


def read(
    order: Order, start: int, steps: int, batch_size: int, state: dict[str, Any] = START, **change: Any
) -> tuple[list[int], list[int], dict[str, Any]]:
    """Return the positions and examples of steps start … steps − 1 in order, and the state after them."""
    world, data = change.pop("world", 1), change.pop("data", "")
    settings = {"steps": steps, "batch_size": batch_size, "accumulation": 1, "workers": 0} | change
    ranks = []
    for rank in range(world):
        accelerator = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
        feed = Feed(SimpleNamespace(**settings), accelerator, data, lambda _: None)  # type: ignore[arg-type]
        feed.restore(start, state)
        ranks.append(list(feed.batches(Indices(order), start)))
    parts = [
        part
        for step in zip(*ranks, strict=True)
        for k in range(settings["accumulation"])
        for part in (rank[k] for rank in step)
    ]
    positions, examples = (torch.cat([getattr(p, name) for p in parts]).tolist() for name in ("position", "index"))
    return positions, examples, feed.state(steps)


@pytest.mark.parametrize("how", [{}, {"accumulation": 2}, {"world": 2}, {"world": 2, "accumulation": 2}], ids=str)
@pytest.mark.parametrize("sizes", [(8, 4), (4, 8), (8, 20)], ids=str)
def test_another_batch_size_neither_repeats_nor_loses_an_example(sizes: tuple[int, int], how: dict[str, int]) -> None:
    order = Shuffled(50, 3)
    first, a, state = read(order, 0, 3, sizes[0], **how)
    second, b, state = read(order, 3, 40, sizes[1], state, **how)
    assert first + second == list(range(state["position"]))
    assert a + b == order.at(range(state["position"])).tolist()
    counts = Counter((a + b)[:50])
    assert set(counts.values()) == {1}
    # Continued once more, it is the same run.
    _, c, middle = read(order, 3, 9, sizes[1], read(order, 0, 3, sizes[0])[2], **how)
    _, d, last = read(order, 9, 40, sizes[1], middle, **how)
    assert (c + d, last) == (b, state)


ORDERS = {
    "more": (Shuffled(50, 3), Shuffled(70, 3)),
    "fewer": (Shuffled(50, 3), Shuffled(20, 3)),
    "another seed": (Shuffled(50, 3), Shuffled(50, 4)),
    "repeats": (Shuffled(50, 3), Repeated(np.array([2, 0, 3, 1] * 5), 3)),
    "buckets": (Shuffled(50, 3), Buckets([(8, 4), (4, 8)], np.array([0, 1, 1] * 10), 8, 3)),
}


@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS)
def test_another_order_begins_a_new_epoch(orders: tuple[Order, Order]) -> None:
    old, new = orders
    _, _, state = read(old, 0, 10, 8)  # 30 examples of the second epoch
    positions, examples, after = read(new, 10, 40, 8, state)
    assert positions == list(range(80, 320))  # random numbers go on
    assert state["epochs"] == 2
    epoch = new.at(range(2 * new.length, 3 * new.length)).tolist()
    assert examples[: new.length] == epoch
    for cut in (11, 25):
        _, before, middle = read(new, 10, cut, 8, state)
        assert before + read(new, cut, 40, 8, middle)[1] == examples
    assert after["epochs"] == 2 + -(-240 // new.length)
    # Back to the first order: a third permutation, not one of the first two epochs.
    _, back, _ = read(old, 40, 47, 8, after)
    assert back[:50] not in (old.at(range(50)).tolist(), old.at(range(50, 100)).tolist())
    assert sorted(back[:50]) == list(range(50))


def test_other_data_of_the_same_number_begin_a_new_epoch() -> None:
    order = Shuffled(50, 3)
    _, _, state = read(order, 0, 10, 8, data="one")
    assert read(order, 10, 20, 8, state, data="one")[1] == order.at(range(80, 160)).tolist()
    assert read(order, 10, 20, 8, state, data="two")[1] == order.at(range(100, 180)).tolist()


def test_another_batch_size_with_buckets_begins_a_new_epoch() -> None:
    old, new = (Buckets([(8, 4), (4, 8)], np.array([0, 1, 1] * 10), size, 3) for size in (5, 4))
    _, _, state = read(old, 0, 3, 5)
    positions, examples, _ = read(new, 3, 40, 4, state)
    assert positions[0] == 15
    assert {len({new.size(k) for k in examples[i : i + 4]}) for i in range(0, len(examples), 4)} == {1}
    assert set(examples[: new.length]) == set(range(30))


def test_a_stream_of_other_data_is_read_from_its_start() -> None:
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    config: Any = SimpleNamespace(steps=9, batch_size=4, accumulation=1, workers=0)
    shifts: list[int] = []

    class Stream(NamedTuple):
        order: StreamOrder = StreamOrder("1000 3")

        def shifted(self, shift: int) -> Self:
            shifts.append(shift)
            return self

        def __getitems__(self, positions: list[int]) -> Examples:
            return Examples(position=torch.tensor(positions), index=torch.tensor(positions))

    for data, expected in (("one", []), ("two", [-12])):
        feed = Feed(config, accelerator, "one", lambda _: None)
        feed.batches(Stream(), 0)
        state = feed.state(3)
        feed = Feed(config, accelerator, data, lambda _: None)
        feed.restore(3, state)
        assert next(feed.batches(Stream(), 3))[0].position.tolist() == [12, 13, 14, 15]
        assert shifts == expected
        assert feed.state(5) == state | {"position": 20, "order": feed.order, "shift": sum(expected)}
