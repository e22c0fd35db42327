"""A batch is one tensor from the worker to the step; a stand-in for CUDA writes down what would be copied, and when."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from view_cases import SIZE, config, encode, photograph

from loco_det.core.errors import UserError
from loco_det.images import batches, two_views
from loco_det.images.batched_views import Decoded
from loco_det.images.batches import TwoViews, joined, prefetch
from loco_det.images.folders import open_source
from loco_det.images.two_views import DecodedDataset, TwoViewDataset, build_two_view_loader
from pretrain import train

WHOLE = 2 * 8 * 3 * SIZE * SIZE  # values of a batch
GPU = torch.device("cuda", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(24):
        (tmp_path / f"{i:03d}.jpg").write_bytes(encode(photograph(40, 50, seed=i)))
    return tmp_path


class Copies(TorchDispatchMode):
    """Names of the operations that write as many values as a batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if isinstance(result, Tensor) and result.numel() >= WHOLE and name != "empty":
            memory = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if name.endswith("_") or result.untyped_storage().data_ptr() not in memory:  # else a view
                self.names.append(name)
        return result


def test_on_a_cpu_the_worker_s_tensor_is_the_one_that_is_normalised(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, normalised = [], []
    process, normalise = TwoViewDataset.process, train.normalise
    monkeypatch.setattr(TwoViewDataset, "process", lambda *args: made.append(process(*args)) or made[-1])
    monkeypatch.setattr(train, "normalise", lambda x, *args: normalised.append(x) or normalise(x, *args))
    stream = build_two_view_loader(config(folder), open_source(folder)).batches()
    with Copies() as copies:
        for _ in range(3):
            x = train._input(next(stream).views)
            assert x.is_contiguous(memory_format=torch.channels_last)
    assert [x.data_ptr() for x in normalised] == [views.views.data_ptr() for (views, _) in made]
    assert normalised[0].shape == (16, 3, SIZE, SIZE)
    assert copies.names == []


def test_one_worker_s_part_is_the_whole_and_several_are_written_into_one() -> None:
    parts = [(TwoViews(torch.full((2, n, 3, 40, 40), n, dtype=torch.uint8), torch.arange(n)), []) for n in (3, 4)]
    assert joined(parts[:1], pin=False)[0].views is parts[0][0].views
    with Copies() as copies:
        whole, _ = joined(parts, pin=False)
    assert whole.views[:, :, 0, 0, 0].tolist() == [[3] * 3 + [4] * 4] * 2
    assert copies.names == ["copy_", "copy_"]  # of each part, into its place


# --- as on a GPU ------------------------------------------------------------------------------------------------


class Gpu:
    """What would happen on a GPU, in order; tensors stay where they are."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple] = []
        self.current = SimpleNamespace(name="step", wait_stream=lambda other: self.log("wait", other.name))
        to, empty = Tensor.to, torch.empty

        def moved(tensor: Tensor, *args: object, **named: object) -> Tensor:
            if not args or getattr(args[0], "type", None) != "cuda":
                return to(tensor, *args, **named)
            self.log("copy", tensor.data_ptr(), self.current.name, named.get("non_blocking"))
            return tensor.clone()

        def pinned(tensor: Tensor, *_: object) -> Tensor:
            copy = tensor.clone()
            self.log("pin", tensor.data_ptr(), copy.data_ptr())
            return copy

        def made(*size: object, pin_memory: bool = False, **named: object) -> Tensor:
            tensor = empty(*size, **named)
            if pin_memory:
                self.log("made pinned", tensor.data_ptr())
            return tensor

        @contextmanager
        def inside(stream: SimpleNamespace) -> Iterator[None]:
            before, self.current = self.current, stream
            yield
            self.current = before

        patch.setattr(Tensor, "to", moved)
        patch.setattr(Tensor, "pin_memory", pinned)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: self.log("keep", tensor.data_ptr(), stream.name))
        patch.setattr(torch, "empty", made)
        patch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(name="side"))
        patch.setattr(torch.cuda, "stream", inside)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        for place in (torch.cuda, getattr(torch, "accelerator", torch.cuda)):  # torch 2.4 has none
            patch.setattr(place, "is_available", lambda: True)
        patch.setattr(two_views, "resolve_device", lambda name: GPU)

    def log(self, *event: object) -> None:
        self.events.append(event)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_what_arrives_on_a_gpu_is_what_was_pinned_and_the_next_is_on_its_way(
    folder: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, process = [], TwoViewDataset.process
    monkeypatch.setattr(TwoViewDataset, "process", lambda *args: made.append(process(*args)) or made[-1])
    stream = build_two_view_loader(config(folder), open_source(folder)).batches()
    found = []
    for step in range(3):
        found.append(next(stream))
        gpu.log("step", step)
    worker = [views.data_ptr() for (views, _), _ in made]
    pins = {event[1]: event[2] for event in gpu.events if event[0] == "pin"}
    place = {views: gpu.events.index(("copy", pins[views], "side", True)) for views in worker}
    for step, batch in enumerate(found):
        arrived = gpu.events.index(("keep", batch.views.data_ptr(), "step"))
        assert gpu.events[arrived - 1] == ("wait", "side")
        assert place[worker[step]] < arrived < place[worker[step + 1]] < gpu.events.index(("step", step))
        assert torch.equal(batch.views, made[step][0].views)
        assert batch.index.tolist() == made[step][0].index.tolist()
    assert len([event for event in gpu.events if event[0] == "copy"]) == len(made) == 4  # views alone, each once


def test_an_error_ahead_waits_for_its_turn(gpu: Gpu) -> None:
    """It belongs to the next step, before which this one is to be finished, and perhaps saved."""
    results = [(TwoViews(torch.ones(2, 1, 3, 1, 1), torch.ones(1)), []), UserError("the second")]
    deliver = batches.deliver_views
    stream = prefetch(iter(results), GPU, lambda result: deliver(result, GPU))
    (views, _), _ = next(stream)
    assert views.shape == (2, 1, 3, 1, 1)
    assert next(stream) is results[1]
    assert next(stream, None) is None


@pytest.mark.parametrize("count", [1, 3])
def test_parts_of_tar_workers_are_written_into_one_pinned_tensor(count: int, gpu: Gpu) -> None:
    parts = [(TwoViews(torch.rand(2, n + 2, 3, 5, 5).byte(), torch.arange(n + 2)), []) for n in range(count)]
    (views, _), _ = joined(parts, pin=True)
    assert [event for event in gpu.events if event[0] != "copy"] == [("made pinned", views.data_ptr())]
    assert torch.equal(views, torch.cat([part.views for part, _ in parts], 1))


@pytest.mark.parametrize(("name", "makes"), [("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_decoded_images_travel_pinned_or_else_the_views_made_of_them_do(
    name: str, makes: str, folder: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, process = [], DecodedDataset.process
    monkeypatch.setattr(DecodedDataset, "process", lambda *args: made.append(process(*args)) or made[-1])
    batch = next(build_two_view_loader(config(folder, AUGMENT__DEVICE=name), open_source(folder)).batches())
    pixels = made[0][0].pixels
    pins = {event[1]: event[2] for event in gpu.events if event[0] == "pin"}
    large = [event for event in gpu.events if event[0] == "copy"]
    if makes == "cuda":
        assert large[0] == ("copy", pins[pixels.data_ptr()], "side", True)
    else:
        assert pixels.data_ptr() not in pins
        views = next(event[1] for event in gpu.events if event[0] == "made pinned")
        assert large[0] == ("copy", views, "side", True)
    assert batch.views.shape == (2, 8, 3, SIZE, SIZE)


# --- augmented as a batch ---------------------------------------------------------------------------------------


def test_a_batch_that_is_augmented_at_once_is_the_same_batch(folder: Path) -> None:
    def run(name: str) -> list[TwoViews]:
        loader = build_two_view_loader(config(folder, AUGMENT__DEVICE=name), open_source(folder))
        return list(itertools.islice(loader.batches(2), 5))

    for own, batched in zip(run("workers"), run("auto")):
        assert torch.equal(own.index, batched.index)
        assert own.views.shape == batched.views.shape
        assert (own.views.int() - batched.views.int()).abs().max() <= 2


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:0", ""])
def test_a_device_that_the_run_is_not_on_is_named(name: str, folder: Path) -> None:
    with pytest.raises(
        UserError, match=rf"AUGMENT\.DEVICE is '{name}' and the run is on cpu; use workers, auto or cpu"
    ):
        build_two_view_loader(config(folder, AUGMENT__DEVICE=name), open_source(folder))


def test_workers_give_decoded_images_where_batches_are_augmented(folder: Path) -> None:
    dataset = DecodedDataset(open_source(folder), two_views.view_config(SIZE, {}), seed=0)
    decoded, bad = dataset[0, [3, 4]]
    assert isinstance(decoded, Decoded)
    assert decoded.pixels.shape == (2 * 40 * 50, 3)
    assert decoded.sides.tolist() == [[40, 50]] * 2
    assert decoded.index.tolist() == [3, 4]
    assert bad == []
