"""Which device, back end, group and start a process gets; what a GPU would keep in memory or wait for."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from forked import forked
from pretended_cuda import Pretended, pretended_cuda
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loco_det.backbones.artifact import load_backbone
from loco_det.core import device as device_module
from loco_det.core.config import load_config
from loco_det.core.device import arithmetic, loader_workers, resolve_device
from loco_det.core.distributed import is_main, local_rank, rank, replica_rank
from loco_det.core.errors import UserError
from loco_det.evaluation.probes.linear import Recipe, linear_probe
from loco_det.evaluation.probes.ridge import fit_ridge
from pretrain import average, train
from pretrain.average import GradientAverage
from pretrain.decoders import Decoder
from pretrain.defaults import get_cfg
from pretrain.sync_batchnorm import SyncBatchNorm
from pretrain.train import pretrain

# --- places -----------------------------------------------------------------------------------------------------


def test_a_process_has_its_launchers_number_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "SLURM_GPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    assert local_rank() == 0
    monkeypatch.setenv("SLURM_LOCALID", "2")  # srun alone
    assert local_rank() == 2
    with pretended_cuda(gpus=4):
        assert resolve_device("auto") == torch.device("cuda", 2)
        assert resolve_device("cuda:3") == torch.device("cuda", 3)
        monkeypatch.setenv("LOCAL_RANK", "5")
        with pytest.raises(UserError, match="needs GPU 5 but 4 are usable"):
            resolve_device("cuda")
        monkeypatch.setattr(device_module, "world_size", lambda: 2)
        with pytest.raises(UserError, match=r"'cuda:3' is one GPU for 2 processes; use cuda"):
            resolve_device("cuda:3")
    with pretended_cuda(gpus=1):
        monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")  # each process sees its own only
        assert resolve_device("cuda") == torch.device("cuda", 0)


def test_the_device_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_cuda(gpus=4):
        chosen = []
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        resolve_device("cuda:3")
    assert chosen == [torch.device("cuda", 3)]


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "usable_cores", lambda: 12)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert [loader_workers(n) for n in (-1, 0, 5, 40)] == [12, 0, 5, 12]
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "5")
    assert loader_workers(-1) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert loader_workers(-1) == 1


def _arithmetic() -> tuple:
    """What torch is told of: benchmark, TF32 in convolutions, precision of products, determinism of both."""
    cudnn = torch.backends.cudnn
    products, exact = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return cudnn.benchmark, cudnn.allow_tf32, products, cudnn.deterministic, exact


def test_arithmetic_of_a_gpu_and_none_of_a_cpu_restored_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before, gpu = _arithmetic(), torch.device("cuda")
    assert before == (False, True, "highest", False, False)
    with arithmetic(torch.device("cpu"), benchmark=True, precision="high", deterministic=True):
        assert _arithmetic() == before
    with arithmetic(gpu, benchmark=True):
        assert _arithmetic() == (True, *before[1:])
    for precision, tf32 in (("highest", False), ("high", True)):
        with arithmetic(gpu, benchmark=False, precision=precision):
            assert _arithmetic() == (False, tf32, precision, False, False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with arithmetic(gpu, benchmark=True, deterministic=True):
        assert _arithmetic() == (False, True, "highest", True, True)  # timing would choose anew in every run
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert _arithmetic() == before


# --- messages ---------------------------------------------------------------------------------------------------


def test_gradients_on_gpus_travel_in_the_jobs_own_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two NCCL communicators must not be busy at the same time; gloo's may."""
    groups = []
    monkeypatch.setattr(average, "replicas", lambda: 2)
    fake = SimpleNamespace(new_group=lambda: "own", all_reduce=lambda flat, group, async_op: groups.append(group))
    monkeypatch.setattr(average, "dist", fake)
    for device in ("cpu", "cuda"):
        with pretended_cuda():
            layer = nn.Linear(3, 4).to(device)
            means = GradientAverage(layer.parameters())
            for p in layer.parameters():
                p.grad = torch.ones_like(p)
                means.add(p)
            means.flush()
    assert groups == ["own", None]


def _synchronised() -> dict[str, torch.Tensor]:
    """SyncBatchNorm's GPU path over two processes; outputs, gradients, statistics and waits."""
    torch.manual_seed(0)
    x = (torch.randn(8, 3, 5, 5, dtype=torch.float64) * 3 + 1).chunk(2)[rank()]
    gradient = torch.randn(8, 3, 5, 5, dtype=torch.float64).chunk(2)[rank()]
    norm = SyncBatchNorm(3).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    with pretended_cuda(gpus=2) as waits:
        norm, x = norm.to("cuda"), x.to("cuda").to(memory_format=torch.channels_last).requires_grad_()
        gradient = gradient.to("cuda")
        waits.clear()
        out = norm(x)
        out.backward(gradient)
        assert waits.total() == 0, waits.table()
        assert isinstance(out, Pretended)
        values = {"out": out, "x": x.grad, **norm.state_dict()}
        values |= {"to weight": norm.weight.grad, "to bias": norm.bias.grad}
        return {name: value.detach().cpu() for name, value in values.items()}


def _two_ranks(folder: str) -> None:
    with pretended_cuda(gpus=2):
        pretrain(configured(Path(folder), Path(folder) / "cuda", "DEVICE", "cuda", "BACKBONE.NORM", "SyncBN"))
    pretrain(configured(Path(folder), Path(folder) / "cpu", "DEVICE", "cpu", "BACKBONE.NORM", "SyncBN"))


def _start_apart(folder: str) -> list[torch.Tensor]:
    """Machines without a common folder, and whose random numbers differ."""
    seen: list[torch.Tensor] = []
    own = Path(folder) / f"machine{rank()}"
    more = ("DEVICE", "cpu", "CHECKPOINT_PERIOD", 2, "KNN.PERIOD", 1, "KNN.K", 1)
    with pytest.MonkeyPatch.context() as patch:
        seed = torch.manual_seed
        patch.setattr(torch, "manual_seed", lambda number: seed(number + 7 * rank()))
        probe = train.KnnProbe.__call__

        def watched(self, backbone):
            seen.extend(v.clone() for v in backbone.state_dict().values())
            return probe(self, backbone)

        patch.setattr(train.KnnProbe, "__call__", watched)
        pretrain(configured(Path(folder), own, *more, "SOLVER.MAX_STEPS", 2))
        pretrain(configured(Path(folder), own, *more, "SOLVER.MAX_STEPS", 2), resume=True)  # rank 0 has the checkpoint
    assert is_main() == (own / "checkpoint_00000002.pth").is_file()
    assert replica_rank() == rank()
    return seen


def _all_of_it(folder: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    norm = _synchronised()
    _two_ranks(folder)
    return norm, _start_apart(folder)


def configured(folder: Path, output: Path, *more: object):
    text = f"""BACKBONE.NAME resnet18 BACKBONE.STEM cifar BACKBONE.WIDTH 8 DECODER.HIDDEN_DIM 16 DECODER.OUT_DIM 8
        DATA.PATH {folder / "images"} DATA.IMAGE_SIZE 16 DATA.NUM_WORKERS 0 SOLVER.BATCH_SIZE 4 SOLVER.MAX_STEPS 2
        SOLVER.WARMUP_EPOCHS 0 SOLVER.BASE_LR 0.01 LOG_PERIOD 1 KNN.PERIOD 0 OUTPUT_DIR {output}"""
    return load_config(get_cfg(), "", [*text.split(), *map(str, more)])[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, Path]:
    folder = tmp_path_factory.mktemp("two")
    rng = np.random.default_rng(0)
    for i in range(8):
        (folder / "images" / str(i % 2)).mkdir(exist_ok=True, parents=True)
        cv2.imwrite(str(folder / "images" / str(i % 2) / f"{i}.png"), rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    return forked(2, _all_of_it, folder / "job", str(folder)), folder


def test_synchronised_batchnorm_on_gpus_is_batchnorm_of_all_and_waits_for_nothing(two) -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 3, 5, 5, dtype=torch.float64) * 3 + 1).requires_grad_()
    gradient = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    norm = nn.BatchNorm2d(3).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    out = norm(x)
    out.backward(gradient)
    first, second = (one[0] for one in two[0])
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([first["out"], second["out"]]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([first["x"], second["x"]]), x.grad, **close)
    for name in ("weight", "bias"):  # each process has its share
        shares = first[f"to {name}"] + second[f"to {name}"]
        torch.testing.assert_close(shares, getattr(norm, name).grad, **close)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(first[name], norm.state_dict()[name], **close)
        assert torch.equal(first[name], second[name])


def test_two_ranks_on_pretended_gpus_compute_what_two_on_the_cpu_do(two) -> None:
    got, want = (load_backbone(two[1] / d / "backbone.safetensors")[0] for d in ("cuda", "cpu"))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)


def test_all_processes_start_with_rank_0s_weights_and_probe_its_statistics(two) -> None:
    """Though each drew others, and only rank 0's folder has the checkpoint to resume from."""
    first, second = (one[1] for one in two[0])
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pooled_gradient_stays_one_number_for_each_map(dtype: torch.dtype) -> None:
    """In half precision too, where autograd would expand it before the cast."""
    decoder = Decoder(4, None, mlp_layers=1, hidden_dim=0, out_dim=2)
    x = torch.randn(3, 4, 6, 6).to(dtype).requires_grad_()
    caught = []
    x.register_hook(caught.append)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        decoder(x.view_as(x)).sum().backward()
    assert caught[0].dtype == dtype
    total = decoder.mlp[0].weight.detach().float().sum(0) / 36
    want = total.expand(3, 4)[..., None, None].expand(3, 4, 6, 6)
    torch.testing.assert_close(x.grad.float(), want, rtol=0.02, atol=1e-4)
    hidden = []
    y = torch.randn(3, 4, 6, 6, dtype=dtype, requires_grad=True)
    z = y * 1
    z.register_hook(lambda g: hidden.append(g.stride()))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        decoder(z).sum().backward()
    assert hidden[0][2:] == (0, 0)


class _Largest(TorchDispatchMode):
    """The most numbers that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        for t in made:
            if t.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, t.numel() * t.itemsize)
        return out


def test_probes_make_no_copy_of_all_features() -> None:
    """ImageNet's res5 features take 10 GB, its labels as one row of classes each 20."""
    torch.manual_seed(0)
    features, labels = torch.randn(40_000, 16), torch.arange(40_000) % 50
    with _Largest() as largest:
        fit_ridge(features, labels, 50, (1.0,), standard=lambda x: x * 2)
    assert largest.most <= 8192 * 50 * 8
    with _Largest() as largest:
        linear_probe(features, labels, 50, Recipe(epochs=1, rates=(0.1,), batch=4096))
    assert largest.most < features.nbytes
