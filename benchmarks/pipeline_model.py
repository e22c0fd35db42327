"""A simulator of devices that compute and send messages in a fixed order: stage-parallel schedules, GPipe, 1F1B.

A device's program for one step is a list of ("compute", seconds), ("send", channel) and ("receive", channel); a channel
is any name. A message arrives `transfer` seconds after it is sent and does not occupy a device. A sender waits while
more than `ahead` of its messages on a channel have not been received.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

Item = tuple[str, float | Hashable]
Program = list[Item]


@dataclass
class Work:
    """Seconds that one device's stages take in one step."""

    forward: float
    loss: float
    input_only: float
    parameter: float

    def total(self) -> float:
        return self.forward + self.loss + self.input_only + self.parameter


def simulate(programs: list[list[Program]], transfer: float = 0.0, ahead: int = 2) -> tuple[list[list[float]], float]:
    """Run all programs.

    Args:
        programs: for each device its steps, in order.

    Returns:
        When each device ends each of its steps, and the share of time that devices wait, up to the last one's end.

    Raises:
        RuntimeError: the devices wait for each other.
    """
    flat = [[(item, number) for number, program in enumerate(steps) for item in program] for steps in programs]
    at, clock, waited = [0] * len(flat), [0.0] * len(flat), 0.0
    ends: list[list[float]] = [[0.0] * len(steps) for steps in programs]
    sent: dict[Hashable, list[float]] = {}
    received: dict[Hashable, list[float]] = {}
    moved = True
    while moved:
        moved = False
        for device, items in enumerate(flat):
            while at[device] < len(items):
                (kind, value), number = items[at[device]]
                if kind == "compute":
                    clock[device] += value
                elif kind == "send":
                    messages, taken = sent.setdefault(value, []), received.setdefault(value, [])
                    if len(messages) >= ahead + len(taken):
                        break
                    if len(messages) >= ahead:
                        waited += max(0.0, taken[len(messages) - ahead] - clock[device])
                        clock[device] = max(clock[device], taken[len(messages) - ahead])
                    messages.append(clock[device] + transfer)
                else:
                    messages, taken = sent.get(value, []), received.setdefault(value, [])
                    if len(messages) <= len(taken):
                        break
                    waited += max(0.0, messages[len(taken)] - clock[device])
                    clock[device] = max(clock[device], messages[len(taken)])
                    taken.append(clock[device])
                at[device] += 1
                ends[device][number] = clock[device]
                moved = True
    if any(a < len(items) for a, items in zip(at, flat)):
        raise RuntimeError("the devices wait for each other")
    return ends, waited / (max(clock) * len(clock))


def seconds_a_step(ends: list[list[float]]) -> float:
    """Return the time of a step in the long run: the second half of them, at the device that ends last."""
    last = max(ends, key=lambda times: times[-1])
    half = len(last) // 2
    return (last[-1] - last[half - 1]) / (len(last) - half)


def local_programs(work: list[Work], method: str, schedule: str, steps: int) -> list[list[Program]]:
    """Return the programs of devices with one stage each, for gim or loco, exact or streaming."""
    count = len(work)
    programs = []
    for device, seconds in enumerate(work):
        own: list[Program] = []
        has_loss = method == "gim" or device > 0
        from_above = method == "loco" and device < count - 1
        for step in range(steps):
            program: Program = []
            if device > 0:
                program.append(("receive", ("up", device)))
            program.append(("compute", seconds.forward))
            if device < count - 1:
                program.append(("send", ("up", device + 1)))
            if has_loss:
                program.append(("compute", seconds.loss))
            if method == "loco" and device > 0:
                # The top stage's only pass is its parameter pass, which gives the gradient for below, too.
                program.append(("compute", seconds.input_only if from_above else seconds.parameter))
                program.append(("send", ("down", device - 1)))
            if from_above and (schedule == "exact" or step > 0):
                program += [("receive", ("down", device)), ("compute", seconds.parameter)]
            elif not from_above and (method == "gim" or device == 0):
                program.append(("compute", seconds.parameter))
            own.append(program)
        programs.append(own)
    return programs


def end_to_end_programs(forward: list[float], backward: list[float], parts: int, kind: str) -> list[list[Program]]:
    """Return one step of GPipe or 1F1B with `parts` micro-batches, and a flush at its end.

    Both are for losses that are sums over images; NT-Xent's needs all embeddings before the first backward, so it has
    GPipe's order only. 1F1B has GPipe's time and less memory.
    """
    count = len(forward)
    programs = []
    for device in range(count):

        def run(what: str, device: int = device) -> Program:
            seconds = (forward if what == "up" else backward)[device] / parts
            below, above = device > 0, device < count - 1
            program: Program = []
            if below if what == "up" else above:
                program.append(("receive", (what, device)))
            program.append(("compute", seconds))
            if above if what == "up" else below:
                program.append(("send", (what, device + (1 if what == "up" else -1))))
            return program

        first = parts if kind == "gpipe" else min(parts, count - device)
        order = ["up"] * first
        for _ in range(parts - first):
            order += ["down", "up"]
        order += ["down"] * (parts - order.count("down"))
        programs.append([[item for what in order for item in run(what)]])
    return programs
