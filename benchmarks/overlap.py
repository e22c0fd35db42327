"""How much of the gradients' way between processes is hidden behind computing: local learning against end to end.

    python benchmarks/overlap.py --json overlap.json        # about two minutes on 2 cores

Two gloo processes of ResNet-50 (64 px, 2 x 4 views each, float32, LARS) average their gradients over a link that is
slowed to `--bandwidth`: a thread does the real all-reduce and holds the message back until

    2 (N - 1) latency + 2 (N - 1) / N x bytes / bandwidth           (N = 2; a ring all-reduce)

have passed since both processes were ready and the message before it was through. Sides:

    loco_early   this package's step: messages leave during the backward, a stage is stepped before it next runs
    loco_end     the same step, everything sent and stepped after the last backward
    simclr_ddp   the whole network as one unit under torch's DistributedDataParallel with its 25 MiB buckets, the link
                 as its communication hook; buffers are not broadcast, which only helps it

A turn runs each side over the slow link and over a link that takes no time (its `compute_seconds`), two steps each of
which the last counts, so that messages may cross from one step into the next. `hidden_share` is 1 - (seconds -
compute_seconds) / the seconds that the messages take one after the other. All figures are medians over turns of what
one turn gives, so a machine that is slower for a while disturbs little.

The model replays the trace that rank 0 made over the link without time, segments of computing between messages sent
and messages waited for, against messages that take the time above, one after the other. Its prediction for the two
processes is compared with what the same turn measured (`relative_error`). For 8, 64 and 512 GPUs it assumes
  - one flat ring with `--gpu-bandwidth` and `--gpu-latency` a hop and nothing else on it,
  - computing that takes the shares measured here, scaled so that simclr_ddp's step takes `--gpu-step-ms` without
    communication; a GPU's shares differ, and so do those of other image sizes,
  - NT-Xent's gather and its backward (2 x `--gpu-images` embeddings of 128 numbers for each GPU and loss), during
    which computing stands still; three losses in LoCo, one end to end; gradients go on meanwhile,
  - BatchNorm's statistics stay on each GPU; processes are equally fast; communication slows no computing.
No GPU was measured: the predictions are this arithmetic.

JSON: {"sides": {side: {"seconds", "compute_seconds", "communication_seconds", "hidden_share", "predicted_seconds",
"relative_error", "bytes", "messages", "turns": {"seconds": [...], ...}}},
"loco_early_over_simclr_ddp": ratio of the seconds, "loco_early_over_loco_end": likewise, "largest_relative_error": x,
"model": {"8" | "64" | "512": {side: {"seconds", "hidden_share"}}}, "setting": {...}}.
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist
from _common import parser, report
from torch import Tensor, nn

from loco_det.core.distributed import averaged, is_main, rank, world_size
from loco_det.core.launch import launch
from pretrain.average import GradientAverage
from pretrain.defaults import get_cfg
from pretrain.optim import build_optimizer
from pretrain.stepping import Stepping
from pretrain.train import Learner, local_trainer

GPUS = (8, 64, 512)
REPLAYED = 20  # steps of the model, of which the second half counts
EMBEDDING = 128


def ring_seconds(bytes: float, processes: int, bandwidth: float, latency: float) -> float:
    """What an all-reduce takes in a ring."""
    return 2 * (processes - 1) * latency + 2 * (processes - 1) / processes * bytes / bandwidth


# --- the slow link ----------------------------------------------------------------------------------------------


class Transfer:
    """A message under way, as `torch.distributed.Work`; tells the link's trace when it is waited for."""

    def __init__(self, flat: Tensor, number: int, link: Link) -> None:
        self.flat, self.number, self.link, self.slow = flat, number, link, link.slow
        self.future: torch.futures.Future = torch.futures.Future()

    def is_completed(self) -> bool:
        return self.slow and self.future.done()  # in a trace it must not look as if it had arrived

    def wait(self) -> None:
        self.link.note("wait", self.number)
        self.future.wait()


class Link:
    """Between the processes, one message at a time; not `slow` it takes no time, sends nothing, and keeps a trace."""

    def __init__(self, bandwidth: float, latency: float) -> None:
        self.bandwidth, self.latency, self.slow = bandwidth, latency, True
        self.events: list[tuple[float, str, int, int]] = []
        self.sent = 0
        self.group = dist.new_group()
        self.queue: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def note(self, kind: str, number: int, bytes: int = 0) -> None:
        self.events.append((time.perf_counter(), kind, number, bytes))

    def send(self, flat: Tensor) -> Transfer:
        transfer = self.last = Transfer(flat, self.sent, self)
        self.sent += 1
        self.note("send", transfer.number, flat.nbytes)
        if self.slow:
            self.queue.put(transfer)
        else:
            transfer.future.set_result(flat)
        return transfer

    def _run(self) -> None:
        ready = torch.zeros(1)
        while True:
            transfer = self.queue.get()
            dist.all_reduce(ready, group=self.group)  # both have come so far
            begun = time.perf_counter()
            dist.all_reduce(transfer.flat, group=self.group)
            takes = ring_seconds(transfer.flat.nbytes, world_size(), self.bandwidth, self.latency)
            time.sleep(max(0.0, begun + takes - time.perf_counter()))
            transfer.future.set_result(transfer.flat)


# --- the sides --------------------------------------------------------------------------------------------------


class EndToEnd(nn.Module):
    """SimCLR whose forward is the loss, as DistributedDataParallel wants it."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, x: Tensor) -> Tensor:
        return self.learner.loss(0, self.learner.backbone(x)["res5"])


def build_side(name: str, link: Link) -> Callable[[Tensor], None]:
    """One training step of the side."""
    cfg = get_cfg()
    cfg.METHOD = "simclr" if name == "simclr_ddp" else "loco"
    torch.manual_seed(0)
    learner = Learner(cfg)
    optimizer = build_optimizer(cfg, learner)
    if name == "simclr_ddp":
        return ddp_step(learner, optimizer, link)
    early = name == "loco_early"
    parameters = list(learner.parameters())
    average = GradientAverage(parameters if early else (), link.send)
    stepping = Stepping(optimizer, learner.parts(), average, torch.amp.GradScaler("cpu", enabled=False), early)
    stepping.lr = 1e-3
    trainer = local_trainer(learner, stepping)

    def step(x: Tensor) -> None:
        trainer.step(x)
        if not early:
            for p in parameters:
                average.add(p)
            stepping.finish()

    return step


def ddp_step(learner: Learner, optimizer: torch.optim.Optimizer, link: Link) -> Callable[[Tensor], None]:
    model = averaged(EndToEnd(learner), torch.device("cpu"))
    model.register_comm_hook(None, lambda _, bucket: link.send(bucket.buffer().div_(world_size())).future)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3

    def step(x: Tensor) -> None:
        first = link.sent
        optimizer.zero_grad(set_to_none=True)
        model(x).backward()
        for number in range(first, link.sent):  # it has waited for them
            link.note("wait", number)
        optimizer.step()

    return step


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One side's step and what every turn measured of it."""

    step: Callable[[Tensor], None]
    seconds: list[float] = field(default_factory=list)  # over the slow link
    compute: list[float] = field(default_factory=list)  # over the link that takes no time
    traces: list[Trace] = field(default_factory=list)  # likewise


def run_block(side: Side, x: Tensor, link: Link, slow: bool) -> None:
    """Two steps, of which the second is measured and, if not slow, traced."""
    link.slow = slow
    dist.barrier()
    side.step(x)
    first, link.events = link.sent, []
    begun = time.perf_counter()
    side.step(x)
    ended = time.perf_counter()
    (side.seconds if slow else side.compute).append(ended - begun)
    if not slow:
        side.traces.append(Trace.of(link.events, begun, ended, first))
    link.last.future.wait()


# --- the model --------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """One step: seconds of computing before each event and after the last; events (kind, message, bytes).

    Messages are numbered from the step's first, those of the step before by negative numbers.
    """

    computing: list[float]
    events: list[tuple[str, int, int]]

    @staticmethod
    def of(events: list[tuple[float, str, int, int]], begun: float, ended: float, first: int) -> Trace:
        times = [begun, *(event[0] for event in events), ended]
        gaps = [b - a for a, b in pairwise(times)]
        return Trace(gaps, [(kind, number - first, bytes) for _, kind, number, bytes in events])

    @staticmethod
    def median(traces: list[Trace]) -> Trace:
        assert all(trace.events == traces[0].events for trace in traces), "steps differ in what they send"
        return Trace([statistics.median(gaps) for gaps in zip(*(t.computing for t in traces))], traces[0].events)

    def messages(self) -> list[int]:
        return [bytes for kind, _, bytes in self.events if kind == "send"]

    def replay(self, takes: Callable[[float], float], scale: float = 1.0, standing: float = 0.0) -> float:
        """Seconds a step in the long run, if a message of so many bytes takes `takes(bytes)`.

        Args:
            scale: of all computing.
            standing: seconds a step in which computing stands still but messages do not.
        """
        per_step = len(self.messages())
        clock = free = middle = 0.0
        arrived: dict[int, float] = {}
        for step in range(REPLAYED):
            if step == REPLAYED // 2:
                middle = clock
            for gap, (kind, number, bytes) in zip(self.computing, self.events):
                clock += gap * scale
                if kind == "send":
                    free = max(free, clock) + takes(bytes)
                    arrived[step * per_step + number] = free
                else:
                    clock = max(clock, arrived.get(step * per_step + number, 0.0))
            clock += self.computing[-1] * scale + standing
        return (clock - middle) / (REPLAYED - REPLAYED // 2)


def hidden_share(seconds: float, compute: float, communication: float) -> float:
    return 1 - (seconds - compute) / communication


def figures_of(side: Side, link: Link) -> dict[str, object]:
    """What the JSON says of one side."""

    def takes(bytes: float) -> float:
        return ring_seconds(bytes, world_size(), link.bandwidth, link.latency)

    messages = side.traces[0].messages()
    communication = sum(map(takes, messages))
    predicted = [trace.replay(takes) for trace in side.traces]
    turns = list(zip(side.seconds, side.compute, predicted))
    return {
        "seconds": statistics.median(side.seconds),
        "compute_seconds": statistics.median(side.compute),
        "communication_seconds": communication,
        "hidden_share": statistics.median(hidden_share(s, c, communication) for s, c, _ in turns),
        "predicted_seconds": statistics.median(predicted),
        "relative_error": statistics.median(p / s - 1 for s, _, p in turns),
        "bytes": sum(messages),
        "messages": len(messages),
        "turns": {"seconds": side.seconds, "compute_seconds": side.compute, "predicted_seconds": predicted},
    }


def on_gpus(sides: dict[str, Side], args: Namespace, processes: int) -> dict[str, dict[str, float]]:
    """The model's answer for so many GPUs."""
    traces = {name: Trace.median(side.traces) for name, side in sides.items()}
    scale = args.gpu_step_ms / 1e3 / sum(traces["simclr_ddp"].computing)
    embeddings = 2 * args.gpu_images * processes * EMBEDDING * 4

    def takes(bytes: float) -> float:
        return ring_seconds(bytes, processes, args.gpu_bandwidth * 1e9, args.gpu_latency * 1e-6)

    found = {}
    for name, trace in traces.items():
        losses = 1 if name == "simclr_ddp" else 3
        standing = losses * 1.5 * takes(embeddings)  # a gather is half an all-reduce
        seconds = trace.replay(takes, scale, standing)
        alone = sum(trace.computing) * scale + standing
        share = hidden_share(seconds, alone, sum(map(takes, trace.messages())))
        found[name] = {"seconds": seconds, "hidden_share": share}
    return found


def worker(args: Namespace) -> None:
    torch.set_num_threads(args.threads)
    link = Link(args.bandwidth * 1e6, args.latency * 1e-6)
    sides = {name: Side(build_side(name, link)) for name in ("loco_early", "loco_end", "simclr_ddp")}
    x = torch.randn(2 * args.images, 3, args.size, args.size, generator=torch.Generator().manual_seed(rank()))
    for side in sides.values():
        run_block(side, x, link, slow=True)  # memory is touched for the first time
        side.seconds = []
    for _ in range(args.turns):
        for side in sides.values():
            for slow in (True, False):
                run_block(side, x, link, slow)
    if is_main():
        tell(args, sides, link)


def tell(args: Namespace, sides: dict[str, Side], link: Link) -> None:
    """The table and the JSON."""
    found = {name: figures_of(side, link) for name, side in sides.items()}

    def ratio(other: str) -> float:
        return statistics.median(a / b for a, b in zip(sides["loco_early"].seconds, sides[other].seconds))

    model = {str(n): on_gpus(sides, args, n) for n in GPUS}
    header = ["side", "s/step", "without link", "link", "hidden", "predicted", "error", "MB", "messages"]
    header += [f"{n} GPUs: ms (hidden)" for n in GPUS]
    rows = [
        [name, *list(f.values())[:6], f["bytes"] / 1e6, f["messages"]]
        + [f"{m[name]['seconds'] * 1e3:.1f} ({m[name]['hidden_share']:.2f})" for m in model.values()]
        for name, f in found.items()
    ]
    setting = {**vars(args), "torch": torch.__version__, "processes": world_size()}
    figures = {
        "sides": found,
        "loco_early_over_simclr_ddp": ratio("simclr_ddp"),
        "loco_early_over_loco_end": ratio("loco_end"),
        "largest_relative_error": max(abs(f["relative_error"]) for f in found.values()),
        "model": model,
        "setting": {key: value for key, value in setting.items() if key != "json"},
    }
    report(header, rows, figures, args.json)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=4)
    options.add_argument("--size", type=int, default=64, help="pixels")
    options.add_argument("--images", type=int, default=4, help="images of each process, two views each")
    options.add_argument("--threads", type=int, default=1, help="of each process")
    options.add_argument("--bandwidth", type=float, default=125.0, help="of the slow link in MB/s")
    options.add_argument("--latency", type=float, default=100.0, help="of the slow link in microseconds")
    options.add_argument("--gpu-bandwidth", type=float, default=12.5, help="model: of a ring's link in GB/s")
    options.add_argument("--gpu-latency", type=float, default=5.0, help="model: of a hop in microseconds")
    options.add_argument("--gpu-step-ms", type=float, default=100.0, help="model: computing of an end-to-end step")
    options.add_argument("--gpu-images", type=int, default=64, help="model: images of each GPU")
    launch(worker, 2, options.parse_args())


if __name__ == "__main__":
    main()
