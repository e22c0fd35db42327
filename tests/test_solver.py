"""The solver against loops written from its definition, and against Detectron2 itself where it is installed."""

from __future__ import annotations

import math

import pytest
import torch
from pretended_cuda import pretended_cuda
from torch import nn

from loco_det.core.errors import UserError
from loco_det.detection import solver
from loco_det.detection.keys import load_cfg

SCHEDULES = {
    "multi-step": ["SOLVER.MAX_ITER", "60", "SOLVER.STEPS", "(30, 45)", "SOLVER.WARMUP_ITERS", "10"],
    "no warm-up": ["SOLVER.MAX_ITER", "40", "SOLVER.STEPS", "(20,)", "SOLVER.WARMUP_ITERS", "0"],
    "constant warm-up": ["SOLVER.MAX_ITER", "40", "SOLVER.STEPS", "(20,)", "SOLVER.WARMUP_ITERS", "7",
                         "SOLVER.WARMUP_METHOD", "constant", "SOLVER.WARMUP_FACTOR", "0.2"],
    "steps beyond the end": ["SOLVER.MAX_ITER", "40", "SOLVER.STEPS", "(20, 90)", "SOLVER.WARMUP_ITERS", "3"],
    "longer warm-up than training": ["SOLVER.MAX_ITER", "25", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "1000"],
    "step inside warm-up": ["SOLVER.MAX_ITER", "40", "SOLVER.STEPS", "(5, 20)", "SOLVER.WARMUP_ITERS", "10"],
    "cosine": ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.MAX_ITER", "50", "SOLVER.WARMUP_ITERS", "10",
               "SOLVER.BASE_LR", "0.1", "SOLVER.BASE_LR_END", "0.01"],
}  # fmt: skip


class Net(nn.Module):
    """One of everything that gets its own treatment."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.frozen = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 2)
        self.tied = self.fc
        self.frozen.requires_grad_(False)


class Layers(nn.Module):
    """Parts by name."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Transformer(Layers):
    """A plain transformer's parameters, as timm and Detectron2 name them."""

    def __init__(self, depth: int) -> None:
        blocks = [Layers(norm1=nn.LayerNorm(4), fc=nn.Linear(4, 4)) for _ in range(depth)]
        super().__init__(
            patch_embed=Layers(proj=nn.Conv2d(3, 4, 2)), blocks=nn.Sequential(*blocks), norm=nn.LayerNorm(4)
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, 9, 4))


def vit_detector(depth: int = 3) -> nn.Module:
    net = Layers(model=Transformer(depth))
    net.model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    return Layers(backbone=Layers(net=net, simfp_2=nn.Conv2d(4, 4, 1)), roi_heads=nn.Linear(4, 4))


VITDET = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.LAYER_DECAY", "0.7", "SOLVER.BASE_LR", "0.1",
          "SOLVER.WEIGHT_DECAY", "0.2", "SOLVER.WEIGHT_DECAY_POSITIONS", "0.0"]  # fmt: skip


def config(*overrides: str):
    return load_cfg("", list(overrides))[0]


def rates(cfg, count: int | None = None) -> list[float]:
    """The learning rate that each iteration is trained with."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    schedule = solver.build_schedule(cfg, optimizer)
    found = []
    for _ in range(count or cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def expected_rate(cfg, iteration: int) -> float:
    """From the definition: warm-up runs from FACTOR times the first value to the schedule's value at its end."""
    s = cfg.SOLVER

    def main(i: float) -> float:
        if s.LR_SCHEDULER_NAME == "WarmupCosineLR":
            return s.BASE_LR_END + 0.5 * (s.BASE_LR - s.BASE_LR_END) * (1 + math.cos(math.pi * i / s.MAX_ITER))
        return s.BASE_LR * s.GAMMA ** sum(step <= i for step in s.STEPS)

    warmup = min(s.WARMUP_ITERS, s.MAX_ITER)
    if iteration >= warmup:
        return main(iteration)
    if s.WARMUP_METHOD == "constant":
        return s.WARMUP_FACTOR * main(0)
    share = iteration / warmup
    return (1 - share) * s.WARMUP_FACTOR * main(0) + share * main(warmup)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_is_its_definition(name):
    cfg = config(*SCHEDULES[name])
    expected = [expected_rate(cfg, i) for i in range(cfg.SOLVER.MAX_ITER)]
    assert rates(cfg) == pytest.approx(expected, rel=1e-12)


def test_the_schedule_survives_its_end_and_a_restore():
    cfg = config(*SCHEDULES["multi-step"])
    assert len(rates(cfg, 65)) == 65
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    schedule = solver.build_schedule(cfg, optimizer)
    for _ in range(35):
        schedule.step()
    state = schedule.state_dict()
    again = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=99.0)
    restored = solver.build_schedule(cfg, again)
    restored.load_state_dict(state)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == rates(cfg)[35]


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER"),
        (["SOLVER.STEPS", "(20, 10)"], "SOLVER.STEPS"),
        (["SOLVER.STEPS", "(10, 10)"], "SOLVER.STEPS"),
        (["SOLVER.STEPS", "(0.5,)"], "SOLVER.STEPS"),
        (["SOLVER.LR_SCHEDULER_NAME", "Linear"], "SOLVER.LR_SCHEDULER_NAME"),
        (["SOLVER.WARMUP_METHOD", "slow"], "SOLVER.WARMUP_METHOD"),
        (["SOLVER.WARMUP_ITERS", "-1"], "SOLVER.WARMUP_ITERS"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", "1.0"], "SOLVER.BASE_LR_END"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR", "SOLVER.NUM_DECAYS", "0"], "SOLVER.NUM_DECAYS"),
    ],
)
def test_impossible_schedules_are_refused(overrides, word):
    with pytest.raises(UserError, match=word):
        solver.lr_multiplier(config("SOLVER.MAX_ITER", "30", *overrides))


def test_each_parameter_gets_the_hyperparameters_of_its_kind():
    cfg = config("SOLVER.BASE_LR", "0.5", "SOLVER.WEIGHT_DECAY", "0.01", "SOLVER.WEIGHT_DECAY_NORM", "0.002",
                 "SOLVER.BIAS_LR_FACTOR", "2.0", "SOLVER.WEIGHT_DECAY_BIAS", "0.0",
                 "SOLVER.NESTEROV", "True")  # fmt: skip
    net = Net()
    optimizer = solver.build_optimizer(cfg, net)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 8  # tied once, frozen never
    for name, parameter in net.named_parameters():
        if name.startswith("frozen"):
            assert id(parameter) not in found
            continue
        bias = name.endswith("bias")
        decay = 0.0 if bias else 0.002 if name.startswith(("norm", "group")) else 0.01
        group = found[id(parameter)]
        assert (group["lr"], group["weight_decay"]) == (1.0 if bias else 0.5, decay), name
        assert group["nesterov"]
        assert group["momentum"] == 0.9


def test_every_block_of_a_transformer_learns_slower_than_the_one_above():
    net = vit_detector(depth=3)
    optimizer = solver.build_optimizer(config(*VITDET), net)
    assert type(optimizer) is torch.optim.AdamW
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    powers = {"blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "patch_embed": 4, "pos_embed": 4, "cls_token": 4}
    for name, parameter in net.named_parameters():
        power = next((n for part, n in powers.items() if part in name), 0)
        decay = 0.0 if "norm" in name or name.endswith("pos_embed") else 0.2
        group = group_of[id(parameter)]
        assert group["lr"] == pytest.approx(0.1 * 0.7**power, rel=1e-12), name
        assert (group["weight_decay"], group["betas"]) == (decay, (0.9, 0.999)), name


def test_the_blocks_count_from_the_top_whatever_is_frozen():
    net = vit_detector(depth=4)
    for part in (net.backbone.net.model.patch_embed, net.backbone.net.model.blocks[0]):
        part.requires_grad_(False)
    optimizer = solver.build_optimizer(config(*VITDET), net)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(net.backbone.net.model.blocks[1].fc.weight)] == pytest.approx(0.1 * 0.7**3)
    assert id(net.backbone.net.model.blocks[0].fc.weight) not in rates


def test_a_decay_by_layers_needs_a_plain_transformer():
    with pytest.raises(UserError, match=r"SOLVER\.LAYER_DECAY is 0\.7, which is for timm's plain transformers"):
        solver.build_optimizer(config(*VITDET), Net())
    swin = Layers(
        backbone=Layers(bottom_up=Layers(model=Layers(layers_0=Layers(blocks=nn.Sequential(nn.Linear(2, 2))))))
    )
    with pytest.raises(UserError, match="this backbone is none; set it to"):
        solver.build_optimizer(config(*VITDET), swin)


@pytest.mark.parametrize("fast", [False, True])
def test_adamw_does_what_its_equations_say(fast: bool):
    betas = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BETAS", "(0.8, 0.95)"]
    cfg = config("SOLVER.BASE_LR", "0.1", "SOLVER.WEIGHT_DECAY", "0.01", *betas)
    net = nn.Linear(3, 1, bias=False).double()
    net.fast = fast
    optimizer = solver.build_optimizer(cfg, net)
    w = net.weight.detach().clone()
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 5):
        x = torch.full((1, 3), float(step), dtype=torch.float64)
        solver.optimizer_step(cfg, net(x).sum(), optimizer, solver.grad_scaler(cfg, torch.device("cpu")))
        mean, square = 0.8 * mean + 0.2 * x, 0.95 * square + 0.05 * x**2
        w = w * (1 - 0.1 * 0.01)
        w = w - 0.1 * (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
    assert torch.allclose(net.weight, w, rtol=1e-12)


@pytest.mark.parametrize("fast", [False, True])
def test_sgd_does_what_its_equation_says(fast: bool):
    cfg = config("SOLVER.BASE_LR", "0.1", "SOLVER.WEIGHT_DECAY", "0.01")
    net = nn.Linear(3, 1, bias=False).double()
    net.fast = fast
    optimizer = solver.build_optimizer(cfg, net)
    assert optimizer.param_groups[0]["fused"] == fast
    w, velocity = net.weight.detach().clone(), torch.zeros_like(net.weight)
    for step in range(4):
        x = torch.full((1, 3), step + 1.0, dtype=torch.float64)
        solver.optimizer_step(cfg, net(x).sum(), optimizer, solver.grad_scaler(cfg, torch.device("cpu")))
        velocity = 0.9 * velocity + (x + 0.01 * w)
        w = w - 0.1 * velocity
        assert net.weight.grad is None  # the next forward pass has its memory
    assert torch.allclose(net.weight, w, rtol=1e-14)


def test_clipping_is_by_value_or_by_the_norm_of_each_parameter():
    grads = {"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([0.1, 0.2])}
    for kind, want in (("value", {"a": [1.0, -1.0], "b": [0.1, 0.2]}), ("norm", {"a": [0.6, -0.8], "b": [0.1, 0.2]})):
        cfg = config("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind)
        parameters = {name: nn.Parameter(torch.zeros(2)) for name in grads}
        optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
        loss = sum((parameters[name] * grad).sum() for name, grad in grads.items())
        solver.optimizer_step(cfg, loss, optimizer, solver.grad_scaler(cfg, torch.device("cpu")))
        for name, parameter in parameters.items():
            assert (-parameter).tolist() == pytest.approx(want[name], abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["SOLVER.BASE_LR", "-0.1"], "SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR", "1e999"], "SOLVER.BASE_LR"),
        (["SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0.0"], "SOLVER.NESTEROV"),
    ],
)
def test_impossible_optimisers_are_refused(overrides, word):
    with pytest.raises(UserError, match=word):
        solver.build_optimizer(config(*overrides), Net())


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="FREEZE_AT"):
        solver.build_optimizer(config(), nn.Linear(2, 2).requires_grad_(False))


def test_scaling_to_the_processes_keeps_what_one_image_sees():
    cfg = config("SOLVER.IMS_PER_BATCH", "16", "SOLVER.BASE_LR", "0.02", "SOLVER.REFERENCE_WORLD_SIZE", "8",
                 "SOLVER.MAX_ITER", "90000", "SOLVER.STEPS", "(60000, 80000)", "TEST.EVAL_PERIOD", "5000")  # fmt: skip
    assert solver.scale_to_world_size(cfg, 8) is cfg
    two = solver.scale_to_world_size(cfg, 2)
    s = two.SOLVER
    assert (s.IMS_PER_BATCH, s.BASE_LR, s.MAX_ITER, s.STEPS) == (4, 0.005, 360000, (240000, 320000))
    assert (s.WARMUP_ITERS, s.CHECKPOINT_PERIOD, two.TEST.EVAL_PERIOD, s.REFERENCE_WORLD_SIZE) == (
        4000,
        20000,
        20000,
        2,
    )
    assert s.IMS_PER_BATCH * s.MAX_ITER == 16 * 90000
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    with pytest.raises(UserError, match="REFERENCE_WORLD_SIZE"):
        solver.scale_to_world_size(config("SOLVER.IMS_PER_BATCH", "15", "SOLVER.REFERENCE_WORLD_SIZE", "2"), 1)


def test_mixed_precision_on_the_cpu_is_bfloat16_without_loss_scaling():
    cpu = torch.device("cpu")
    on, off = config("SOLVER.AMP.ENABLED", "True"), config()
    x, layer = torch.ones(2, 3), nn.Linear(3, 2)
    with solver.autocast(on, cpu, layer):
        assert layer(x).dtype == torch.bfloat16
    with solver.autocast(off, cpu, layer):
        assert layer(x).dtype == torch.float32
    assert not solver.grad_scaler(on, cpu).is_enabled()


@pytest.mark.parametrize(
    ("chosen", "device", "expected"),
    [
        ("auto", "cpu", torch.bfloat16),
        ("auto", "cuda", torch.float16),
        ("bf16", "cpu", torch.bfloat16),
        ("bf16", "cuda", torch.bfloat16),
        ("fp16", "cpu", torch.float16),
        ("fp16", "cuda", torch.float16),
    ],
)
def test_the_type_of_mixed_precision_and_loss_scaling_for_float16_alone(chosen, device, expected):
    cfg, layer = config("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", chosen), nn.Linear(3, 2)
    with pretended_cuda():
        layer, x = layer.to(device), torch.ones(2, 3).to(device)
        with solver.autocast(cfg, torch.device(device), layer):
            assert layer(x).dtype == expected
        assert solver.grad_scaler(cfg, torch.device(device)).is_enabled() == (expected == torch.float16)


# --- Detectron2 itself ------------------------------------------------------------------------------------------


def their_config(cfg):
    native = pytest.importorskip("detectron2.config").get_cfg()
    native.merge_from_other_cfg(cfg)
    return native


@pytest.mark.detectron2
@pytest.mark.parametrize("name", [*SCHEDULES, "fixed gamma"])
def test_the_schedule_is_detectron2s(name):
    build = pytest.importorskip("detectron2.solver")
    fixed = [
        "SOLVER.LR_SCHEDULER_NAME",
        "WarmupStepWithFixedGammaLR",
        "SOLVER.MAX_ITER",
        "40",
        "SOLVER.WARMUP_ITERS",
        "5",
    ]
    cfg = config(*SCHEDULES.get(name, fixed))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    theirs = build.build_lr_scheduler(their_config(cfg), optimizer)
    trace = []
    for i in range(cfg.SOLVER.MAX_ITER):
        trace.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if i < cfg.SOLVER.MAX_ITER - 1:
            theirs.step()
    assert rates(cfg) == trace


@pytest.mark.parametrize("fast", [False, True])
def test_a_step_is_seen_by_whoever_keeps_copies_of_weights(fast: bool) -> None:
    net = Net()
    net.fast = fast
    optimizer = solver.build_optimizer(config(), net)
    net.fc(net.group(net.norm(net.conv(torch.randn(2, 3, 4, 4)))).mean((2, 3))).square().sum().backward()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    before = [parameter._version for parameter in trained]
    optimizer.step()
    assert all(parameter._version > version for parameter, version in zip(trained, before))


@pytest.mark.detectron2
@pytest.mark.parametrize("clip", ["none", "value", "norm"])
def test_twenty_steps_are_detectron2s(clip):
    build = pytest.importorskip("detectron2.solver")
    cfg = config("SOLVER.BASE_LR", "0.05", "SOLVER.WEIGHT_DECAY_BIAS", "0.001", "SOLVER.BIAS_LR_FACTOR", "2.0",
                 "SOLVER.CLIP_GRADIENTS.ENABLED", str(clip != "none"), "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.05",
                 "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm" if clip == "norm" else "value")  # fmt: skip
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    mine, other = solver.build_optimizer(cfg, ours), build.build_optimizer(their_config(cfg), theirs)
    assert [len(g["params"]) for g in mine.param_groups] == [len(g["params"]) for g in other.param_groups]
    for _ in range(20):
        x = torch.randn(2, 3, 4, 4)

        def loss(net, x=x):
            return net.fc(net.group(net.norm(net.conv(x))).mean((2, 3))).square().sum()

        solver.optimizer_step(cfg, loss(ours), mine, solver.grad_scaler(cfg, torch.device("cpu")))
        other.zero_grad()
        loss(theirs).backward()
        other.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.detectron2
@pytest.mark.parametrize("frozen", [False, True])
def test_vitdets_optimiser_is_detectron2s_parameter_by_parameter(frozen: bool):
    """Names of Detectron2's ViT and of ours; one group for each rate and decay, in the same order."""
    build = pytest.importorskip("detectron2.solver.build")
    from functools import partial

    from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

    theirs = Layers(backbone=Layers(net=Transformer(5), simfp_2=nn.Conv2d(4, 4, 1)), roi_heads=nn.Linear(4, 4))
    ours = Layers(backbone=Layers(net=Layers(model=theirs.backbone.net), simfp_2=theirs.backbone.simfp_2),
                  roi_heads=theirs.roi_heads)  # fmt: skip
    theirs.backbone.net.blocks[:2].requires_grad_(not frozen)
    expected = build.get_default_optimizer_params(
        theirs,
        base_lr=0.1,
        weight_decay_norm=0.0,
        lr_factor_func=partial(get_vit_lr_decay_rate, num_layers=5, lr_decay_rate=0.7),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    for model in (theirs, ours):
        found = solver.build_optimizer(config(*VITDET), model).param_groups
        assert len(found) == len(expected)
        for group, other in zip(found, expected):
            assert [id(p) for p in group["params"]] == [id(p) for p in other["params"]]
            assert (group["lr"], group["weight_decay"]) == (other["lr"], other.get("weight_decay", 0.2))
