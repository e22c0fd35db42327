"""Every number of a pretraining configuration: valid values pass, all others give one sentence that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from loco_det.core import config
from loco_det.core.config import flat, load_config
from loco_det.core.errors import UserError
from pretrain.check import check
from pretrain.defaults import get_cfg

NAN, INF = float("nan"), float("inf")
# Least and most that can be; written by hand, not taken from the code.
COUNTS = {
    "DECODER.CONV_BLOCKS": (0, 1000),
    "DECODER.MLP_LAYERS": (1, 4),
    "DECODER.HIDDEN_DIM": (0, 2**20),
    "DECODER.OUT_DIM": (1, 2**20),
    "BACKBONE.WIDTH": (64, 64),  # with the imagenet stem
    "LOSS.CHUNK": (0, 10**9),
    "DATA.IMAGE_SIZE": (1, 16384),
    "DATA.NUM_WORKERS": (-1, 10**9),  # -1: by the cores
    "DATA.SHUFFLE_BUFFER": (1, 10**9),
    "SOLVER.BATCH_SIZE": (1, 10**9),
    "SOLVER.ACCUMULATE": (1, 256),  # the batch
    "SOLVER.EPOCHS": (1, 10**9),  # where MAX_STEPS is 0
    "SOLVER.MAX_STEPS": (0, 10**9),
    "KNN.PERIOD": (0, 10**9),
    "KNN.IMAGES": (1, 10**9),
    "KNN.K": (1, 10**9),
    "LOG_PERIOD": (1, 10**9),
    "CHECKPOINT_PERIOD": (1, 10**9),
    "SEED": (-(2**63), 2**63 - 1),
}
REALS = {  # (values that can be, values that cannot); infinity and nan never can
    "LOSS.TEMPERATURE": ([0.01, 1.0, 1e9], [-1.0, 0.0, 1e-9, 1e300]),
    "DATA.MAX_BAD_SHARE": ([0.0, 0.5, 1.0], [-0.1, 1.1, 1e300]),
    "SOLVER.BASE_LR": ([0.0, 4.8, 100.0], [-0.1, 1e300]),
    "SOLVER.MOMENTUM": ([0.0, 0.9, 1.0], [-1.0, -0.1, 1.1, 1e300]),
    "SOLVER.WEIGHT_DECAY": ([0.0, 1e-6, 0.1], [-1e-6, 1e300]),
    "SOLVER.WARMUP_EPOCHS": ([0.0, 0.5, 10.0], [-1.0, 1e300]),
    "KNN.TEMPERATURE": ([0.07, 1.0], [-1.0, 0.0, 1e300]),
    "AUGMENT.FLIP_PROB": ([-1.0, 0.0, 0.5, 1.0], [-0.5, 1.1, 1e300]),  # -1 is unset
    "AUGMENT.JITTER_PROB": ([-1.0, 0.0, 1.0], [-0.5, 1.1]),
    "AUGMENT.GRAY_PROB": ([-1.0, 0.0, 1.0], [-0.5, 1.1]),
    "AUGMENT.BLUR_PROB": ([-1.0, 0.0, 1.0], [-0.5, 1.1]),
    "AUGMENT.SOLARIZE_PROB": ([-1.0, 0.0, 1.0], [-0.5, 1.1]),
    "SHARING.PENALTY": ([0.0, 1e-3, 1e9], [-1.0, 1e300]),
}
LISTS = {
    "AUGMENT.CROP_SCALE": ([[0.2, 1.0]], [[0.0, 1.0], [0.5, 0.2], [0.2, 1.5], [0.2], [NAN, 1.0], [0.2, INF]]),
    "AUGMENT.JITTER": (
        [[0.0, 0.0, 0.0, 0.0], [5.0, 1, 1, 0.5]],
        [[-1, 0, 0, 0], [0, 0, 0, 0.6], [INF, 0, 0, 0], [NAN, 0, 0, 0], [1e300, 0, 0, 0], [1.0]],
    ),
    "AUGMENT.BLUR_SIGMA": ([[0.1, 2.0]], [[0.0, 2.0], [2.0, 0.1], [0.1, INF], [0.1, 1e300], [NAN, 2.0]]),
}


def judge(key: str, value: object) -> None:
    cfg, settings = load_config(get_cfg(), "", ["SHARING.MODE", "soft"] if key == "SHARING.PENALTY" else [])
    if type(value) is type(config.value(cfg, key)):  # as from a file, where nan and infinity can be written
        cfg = config.changed(cfg, **{key: value})
    else:
        cfg, settings = load_config(cfg, "", [key, str(value)])
    check(cfg, settings)


def refused(key: str, value: object) -> None:
    with pytest.raises(UserError) as told:
        judge(key, value)
    assert key in str(told.value)
    assert "\n" not in str(told.value)


def test_a_refusal_says_who_set_the_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("SEED: 1\nSOLVER:\n  EPOCHS: -1\n")
    with pytest.raises(UserError, match=r"a\.yaml, line 3: SOLVER\.EPOCHS is -1; use 0 or more"):
        check(*load_config(get_cfg(), tmp_path / "a.yaml"))
    with pytest.raises(UserError, match=r"^the command line: SOLVER\.AMP is 'fp8'; use one of none, bf16, fp16"):
        check(*load_config(get_cfg(), tmp_path / "a.yaml", ["SOLVER.EPOCHS", "1", "SOLVER.AMP", "fp8"]))
    with pytest.raises(UserError, match=r"^SOLVER\.AMP is 'fp8'"):
        check(load_config(get_cfg(), "", ["SOLVER.AMP", "fp8"])[0])


def test_no_number_is_forgotten() -> None:
    cfg = get_cfg()
    numbers = {key for key, value in flat(cfg).items() if type(value) in (int, float)}
    assert numbers == COUNTS.keys() | REALS.keys()


@pytest.mark.parametrize("key", COUNTS)
def test_counts(key: str) -> None:
    least, most = COUNTS[key]
    for value in (least, most):
        judge(key, value)
    for value in (least - 1, most + 1, -(10**30), 10**30, NAN, "many", 0.5):
        refused(key, value)


@pytest.mark.parametrize("key", REALS)
def test_reals(key: str) -> None:
    legal, illegal = REALS[key]
    for value in legal:
        judge(key, value)
    for value in (*illegal, NAN, INF, -INF, "many", "[1, 2]"):
        refused(key, value)


@pytest.mark.parametrize("key", LISTS)
def test_lists(key: str) -> None:
    legal, illegal = LISTS[key]
    for value in legal:
        judge(key, value)
    for value in (*illegal, 1, "many"):
        refused(key, value)
