"""DETERMINISTIC of a detector: ROIAlign's own gradient, and training in which a GPU has a choice nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretended_cuda import pretended_cuda
from tiny_detection import tiny_cfg
from torchvision.ops import roi_align

from loco_det.core.device import arithmetic
from loco_det.detection import deterministic
from loco_det.detection.deterministic import deterministic_roi_align
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.detection.poolers import RoiPooler
from loco_det.detection.train import train_net


def regions_of(count: int, images: list[int]) -> torch.Tensor:
    """(count, 5) regions of `images`, in any order; some are empty, or beyond the map of 9 x 7 cells of 4 pixels."""
    random = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=random, dtype=torch.float64) * 50 - 10
    size = torch.rand(count, 2, generator=random, dtype=torch.float64) * 40 - 2
    image = torch.tensor(images, dtype=torch.float64)[torch.randint(len(images), (count, 1), generator=random)]
    return torch.cat([image, corner, corner + size.clamp(min=0)], 1)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize(("count", "images"), [(90, [0, 2]), (3, [1]), (0, [0])])
def test_roi_align_and_its_gradient_are_torchvisions(count, images, sampling_ratio, aligned, monkeypatch) -> None:
    """In float64; image 1, or all, may be without regions, and image 0 have more than are taken at once."""
    monkeypatch.setattr(deterministic, "REGIONS_AT_ONCE", 16)
    random = torch.Generator().manual_seed(0)
    features = [torch.randn(3, 5, 9, 7, generator=random, dtype=torch.float64).requires_grad_()]
    features.append(features[0].detach().clone().requires_grad_())
    gradient = torch.randn(count, 5, 3, 3, generator=random, dtype=torch.float64)
    options = ((3, 3), 0.25, sampling_ratio, aligned)
    regions = regions_of(count, images)
    for align, feature in zip((roi_align, deterministic_roi_align), features):
        pooled = align(feature, regions, *options)
        (pooled * gradient).sum().backward()
        assert torch.equal(pooled, roi_align(features[0], regions, *options))
    torch.testing.assert_close(features[1].grad, features[0].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2"])
def test_a_pooler_takes_it_on_a_gpu_under_deterministic_algorithms_alone(kind: str) -> None:
    """The pretended GPU refuses torchvision's gradient there, as a GPU of older torchvision does."""
    grads = {}
    feature, boxes = torch.randn(1, 4, 8, 8), [torch.tensor([[3.0, 2.0, 25.0, 30.0], [0.0, 0.0, 12.0, 9.0]])]
    for device, exact in (("cpu", False), ("cpu", True), ("cuda", False), ("cuda", True)):
        with pretended_cuda(), arithmetic(torch.device("cuda"), benchmark=False, deterministic=exact):
            x = feature.clone().to(device).detach().requires_grad_()
            out = RoiPooler(3, [4], 0, kind)([x], [b.to(device) for b in boxes])
            if device == "cuda":
                assert (type(out.grad_fn).__name__ == "_AlignBackward") == exact
            out.square().sum().backward()
            grads[device, exact] = x.grad.cpu()
    for got in grads.values():
        torch.testing.assert_close(got, grads["cpu", False])


def test_training_is_deterministic_where_the_key_is_set(tiny_data: Path, tmp_path: Path, monkeypatch) -> None:
    """Twice the same, and up to rounding what it is without; the flags are set meanwhile."""
    seen, losses = [], TorchvisionEngine.losses

    def watched(self, *args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return losses(self, *args)

    monkeypatch.setattr(TorchvisionEngine, "losses", watched)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    changes = {"MODEL__DEVICE": "cuda", "MODEL__BACKBONE__FREEZE_AT": 0, "MODEL__RESNETS__NORM": "BN",
               "INPUT__MASK_FORMAT": "bitmask", "SOLVER__MAX_ITER": 2, "SOLVER__STEPS": ()}  # fmt: skip
    states = []
    for name, exact in (("a", True), ("b", True), ("c", False)):
        with pretended_cuda():
            tested = {} if name == "a" else {"DATASETS__TEST": ()}
            train_net(tiny_cfg(tmp_path / name, DETERMINISTIC=exact, **changes, **tested), engine="torchvision")
        states.append(torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"])
    assert seen == [True] * 4 + [False] * 2
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    for name, value in states[2].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-3, atol=1e-4)
