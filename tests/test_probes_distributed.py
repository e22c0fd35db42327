"""The linear readout and frozen features on several processes: the same numbers as on one."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from forked import forked

from loco_det.cli import main
from loco_det.core.distributed import share_of
from loco_det.evaluation.probes.backbones import load_backbone_for_probe
from loco_det.evaluation.probes.features import Extractor
from loco_det.evaluation.probes.images import open_probe_data
from loco_det.evaluation.probes.linear_paper import PaperRecipe, paper_probe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 9 and val/ with 5 noisy patches of two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (5, 4)), ("val", (3, 2))):
        for name, colour, count in zip(("blue", "red"), ((220, 30, 30), (30, 30, 220)), counts):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 60, (16, 16, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(root / split / name / f"{i}.png"), pixels)
    return root


def work(root: Path, cache: Path) -> dict[str, torch.Tensor]:
    """Classifiers after two epochs in batches of 4, 4 and 1, the test images' features, computed and cached, and the
    number of images that went through the network for them.
    """
    data = open_probe_data(str(root), None, limit=0, seed=0)
    backbone = load_backbone_for_probe("random:resnet18-cifar", seed=0)
    extractor = Extractor(backbone, 16, torch.device("cpu"), batch=2, workers=0, cache=cache)
    extractor.measure(data.train, 0)
    seen, pool = [], extractor.pool
    extractor.pool = lambda x, stages: seen.append(len(x)) or pool(x, stages)
    heads = paper_probe(extractor, ["res2", "res5"], data.train, 2, PaperRecipe(epochs=2, batch=4, rate=0.1))
    found = {f"{stage} head": head.weight.detach() for stage, head in heads.items()}
    for again in ("", " again"):
        found |= {f"{stage}{again}": f for stage, f in extractor(data.test, ["res2", "res5"], "test").items()}
    return {**found, "images": torch.tensor(sum(seen))}


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_have_the_numbers_of_one(count: int, images: Path, tmp_path: Path) -> None:
    shares = forked(count, work, tmp_path / "job", images, tmp_path / "cache")
    alone = work(images, tmp_path / "cache of one")
    assert sum(found.pop("images") for found in shares) == alone.pop("images") == 2 * 9 + 5
    for found in shares:
        assert list(found) == list(alone)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 7])
def test_shares_are_consecutive_and_whole(count: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    for rank in range(count):
        monkeypatch.setattr("loco_det.core.distributed.world_size", lambda: count)
        monkeypatch.setattr("loco_det.core.distributed.rank", lambda rank=rank: rank)
        part = list(range(rows))[share_of(rows)]
        assert len(part) <= -(-rows // count)
        found += part
    assert found == list(range(rows))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--protocol", "semi", "--num-gpus", "2"], "--protocol semi runs in one process"),
        (["--protocol", "knn", "--num-gpus", "0"], "--num-gpus is 0"),
    ],
)
def test_what_runs_alone_is_refused(more: list[str], said: str, images: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["probe", "random:resnet18-cifar", "--data", str(images), *more]) == 2
    assert said in capsys.readouterr().err
