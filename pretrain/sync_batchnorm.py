"""Synchronised BatchNorm that also runs on a CPU, which torch's own does not support, and on GPUs without host waits.

torch's own makes the host wait three times a layer on a GPU, to leave out processes with an empty batch; all processes
of a run have equally many images.

Shape legend: b images on this process, C channels, N numbers of one channel on all processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from loco_det.core.distributed import gather_replicas, replica_group, replicas


class SyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` with torch's kernels on a GPU; on a CPU the sums are reduced over gloo."""

    def forward(self, input: Tensor) -> Tensor:
        on_gpu = input.device.type != "cpu"
        if not self.training or replicas() == 1:  # torch's own would synchronise the whole job
            return nn.modules.batchnorm._BatchNorm.forward(self, input)
        if on_gpu and self.momentum is None:
            return super().forward(input)
        if on_gpu:
            return self._on_gpu(input)
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), share)
        return output

    def _on_gpu(self, x: Tensor) -> Tensor:
        running = None, None
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            running = self.running_mean, self.running_var
        return _NormaliseOnGpu.apply(x, self.weight, self.bias, *running, self.eps, self.momentum)


class _NormaliseOnGpu(torch.autograd.Function):
    """Normalise (b, c, ...) by statistics over all processes, with the kernels of torch's SyncBatchNorm.

    Source: torch/nn/modules/_functions.py, for processes with equally many numbers of a channel.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
        eps: float, share: float,
    ) -> Tensor:  # fmt: skip
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        mean, inverse = torch.batch_norm_stats(x, eps)
        counts = mean.new_full((replicas(),), x.numel() // x.shape[1])
        means, inverses = gather_replicas(torch.cat([mean, inverse])).view(replicas(), 2, -1).unbind(1)
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x, means.contiguous(), inverses.contiguous(), running_mean, running_var, share, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, inverse, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        if not (gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)):
            gradient = gradient.contiguous()
        total, along, to_weight, to_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse, weight, True, True, True
        )
        sums = torch.cat([total, along])
        dist.all_reduce(sums, group=replica_group())
        total, along = sums.chunk(2)
        to_input = torch.batch_norm_backward_elemt(gradient, x, mean, inverse, weight, total, along, counts)
        return to_input, to_weight, to_bias, None, None, None, None


class _Normalise(torch.autograd.Function):
    """Normalise (b, c, ...) by the mean and biased variance over all processes, also returned in float64."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        around = [d for d in range(x.ndim) if d != 1]
        here = x.numel() / x.shape[1]
        variance, mean = (t.double() for t in torch.var_mean(x.float() if x.itemsize < 4 else x, around, correction=0))
        sums = torch.cat([mean * here, (variance + mean**2) * here, mean.new_tensor([here])])
        dist.all_reduce(sums, group=replica_group())
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        variance = (square - mean**2).clamp(min=0)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.around = eps, around
        ctx.mark_non_differentiable(mean, variance, count)
        shifted = F.batch_norm(x, mean.to(weight), variance.to(weight), weight, bias, eps=eps)
        return shifted, mean, variance, count

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, count = ctx.saved_tensors
        shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
        inverse = (variance + ctx.eps).rsqrt()
        wide = torch.promote_types(x.dtype, torch.float32)
        x, gradient = x.to(wide) - mean.to(wide).view(shape), gradient.to(wide)
        own = torch.cat([gradient.sum(ctx.around), (gradient * x).sum(ctx.around)]).double()
        sums = own.clone()
        dist.all_reduce(sums, group=replica_group())
        total, along = (sums / count).chunk(2)
        slope = (along * inverse**2).to(wide).view(shape)
        scale = (inverse * weight.double()).to(wide).view(shape)
        to_input = ((gradient - total.to(wide).view(shape) - x * slope) * scale).to(ctx.saved_tensors[0].dtype)
        to_bias, to_weight = own.chunk(2)
        return to_input, (to_weight * inverse).to(weight), to_bias.to(weight), None


def sync_anywhere(module: nn.Module) -> nn.Module:
    """Replace every torch SyncBatchNorm in `module` by the one above; tensors and names stay."""
    for name, child in module.named_children():
        if type(child) is nn.SyncBatchNorm:
            new = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            new.load_state_dict(child.state_dict())
            setattr(module, name, new)
        else:
            sync_anywhere(child)
    return module
