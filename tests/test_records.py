"""Batches as records: all their tensors move together, and they arrive unchanged from workers and streams."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from train.data.batches.records import CachedBatch, DrawnMasks, DrawnNoise, ImageBatch, Record
from train.data.store.prefetch import read_ahead


def noise(masks: DrawnMasks | None = None) -> DrawnNoise:
    return DrawnNoise(torch.rand(2), torch.rand(2, 4, 3, 3), torch.rand(2, 4, 3, 3), torch.tensor([True, False]), masks)


def images() -> ImageBatch[DrawnNoise]:
    masks = DrawnMasks(torch.ones(2, 1, 6, 6), torch.rand(2, 4, 3, 3))
    return ImageBatch(
        position=torch.arange(2),
        index=torch.arange(2),
        pixels=torch.rand(2, 3, 6, 6),
        captions=["a", "b"],
        drawn=noise(masks),
        damaged=[("x.png", "torn")],
    )


def tensors(record: Record) -> list[Tensor]:
    parts = [getattr(record, field.name) for field in fields(record)]  # type: ignore[arg-type]
    nested = [t for part in parts if isinstance(part, Record) for t in tensors(part)]
    return [part for part in parts if isinstance(part, Tensor)] + nested


def test_all_tensors_of_a_record_move_and_nothing_else_changes() -> None:
    batch = images()
    moved = batch.to(torch.device("meta"))
    assert len(tensors(moved)) == 9
    assert all(t.device.type == "meta" for t in tensors(moved))
    assert all(t.device.type == "cpu" for t in tensors(batch))
    assert moved.captions == batch.captions
    assert moved.damaged == batch.damaged
    cached = CachedBatch(
        position=torch.arange(2),
        index=torch.arange(2),
        mean=torch.rand(2),
        std=torch.rand(2),
        condition=torch.rand(2),
        drawn=noise(),
    ).to(torch.device("meta"))
    assert cached.pixels is None
    assert cached.drawn.masks is None


def test_torch_pins_every_tensor_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch = images()
    assert isinstance(pin_memory(batch), ImageBatch)
    assert {id(t) for t in pinned} == {id(t) for t in tensors(batch)}


@dataclass
class One:
    """Dataset of one batch."""

    batch: ImageBatch[DrawnNoise]

    def __getitems__(self, at: Sequence[int], /) -> ImageBatch[DrawnNoise]:
        return self.batch


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_arrives_from_a_worker_as_it_was(workers: int) -> None:
    batch = images()
    (found,) = read_ahead(One(batch), [[0, 1]], workers, pin_memory=torch.cuda.is_available())
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(batch), strict=True))
    assert (found.captions, found.damaged) == (batch.captions, batch.damaged)
    assert not torch.cuda.is_available() or all(t.is_pinned() for t in tensors(found))
