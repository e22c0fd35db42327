"""Numbers recorded from Detectron2 guard the detector where Detectron2 is absent.

The tolerances leave room for another processor's or thread count's rounding, no more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import detection_cases as cases
import pytest
import torch
from record_golden import CASES, TRACE, TRACED, first_ones

from loco_det.annotations.instances import Instances
from loco_det.detection.keys import get_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.tta import AugmentedRCNN

GOLDEN = json.loads((Path(__file__).parent / "golden" / "detection.json").read_text())


def close(actual: torch.Tensor, expected: Any, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def test_the_record_says_where_it_comes_from() -> None:
    assert len(GOLDEN["commit"]) == 40
    assert GOLDEN["detectron2"]
    assert set(GOLDEN["cases"]) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_training_gives_the_recorded_losses_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, golden = cases.formula_weights(build_model(cases.configure(get_cfg(), *CASES[name]))), GOLDEN["cases"][name]
    monkeypatch.setattr(torch, "randperm", first_ones)
    losses = model(cases.our_batch(train=True))
    assert list(losses) == list(golden["losses"])
    for key, value in golden["losses"].items():
        close(losses[key].detach(), value, rtol=1e-4, atol=1e-6)
    sum(losses.values()).backward()
    norms = {key: p.grad.norm() for key, p in model.named_parameters() if p.grad is not None}
    assert list(norms) == list(golden["gradient_norms"])
    for key, value in golden["gradient_norms"].items():
        close(norms[key], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", TRACED)
def test_ten_steps_give_the_recorded_losses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randperm", first_ones)
    trace, _ = cases.our_trace(TRACE[0], *CASES[name], TRACE[1])
    for losses, expected in zip(trace, GOLDEN["traces"][name], strict=True):
        assert losses == pytest.approx(expected, rel=1e-3, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_inference_gives_the_recorded_proposals_and_detections(name: str) -> None:
    cfg, golden = cases.configure(get_cfg(), *CASES[name]), GOLDEN["cases"][name]
    model = cases.formula_weights(build_model(cfg)).eval()
    batch = cases.our_batch(train=False)
    images, sizes = model.preprocess(batch)
    proposals, _ = model.proposal_generator(model.backbone(images), sizes)
    for proposal, expected in zip(proposals, golden["proposals"], strict=True):
        close(proposal.boxes[:8], expected["boxes"], rtol=0, atol=0.02)
        close(proposal.scores[:8], expected["logits"], rtol=1e-4, atol=1e-4)
    if golden["detections"]:  # a proposal network has none
        check_detections(model(batch), golden["detections"])
    if golden["augmented"]:
        check_detections(AugmentedRCNN(cfg, model)(batch), golden["augmented"])


def check_detections(detections: list[Instances], golden: list[dict[str, Any]]) -> None:
    for found, expected in zip(detections, golden, strict=True):
        close(found.boxes[:8], expected["boxes"], rtol=0, atol=0.02)
        close(found.scores[:8], expected["scores"], rtol=1e-4, atol=1e-5)
        assert found.classes[:8].tolist() == expected["classes"]
        if expected["mask_pixels"] is None:
            assert found.masks is None
        else:
            close(found.masks[:8].sum(dim=(1, 2)), expected["mask_pixels"], rtol=0.01, atol=3)
