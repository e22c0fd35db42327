"""The simulator of pipelines against schedules whose times are known."""

from __future__ import annotations

import pytest
from pipeline_model import Work, end_to_end_programs, local_programs, seconds_a_step, simulate

WORK = Work(forward=1.0, loss=0.25, input_only=0.75, parameter=2.0)


def seconds(method: str, schedule: str, devices: int, transfer: float = 0.0) -> float:
    return seconds_a_step(simulate(local_programs([WORK] * devices, method, schedule, 60), transfer)[0])


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_nobody_waits_in_gim_and_in_streaming(devices: int) -> None:
    """A step is what the busiest device computes, if messages take less than it waits anyway."""
    busiest = 4.0 if devices > 2 else 3.25  # of two, neither has an input-only pass
    for transfer in (0.0, 0.1):
        for schedule in ("exact", "streaming"):
            assert seconds("gim", schedule, devices, transfer) == pytest.approx(3.25)
        assert seconds("loco", "streaming", devices, transfer) == pytest.approx(busiest)


def test_exact_loco_waits_for_its_neighbour_only() -> None:
    """Two devices: forward, the upper's forward, loss and pass, then the lower's pass; no more with many devices."""
    assert seconds("loco", "exact", 2) == pytest.approx(1 + (1 + 0.25 + 2) + 2)
    assert seconds("loco", "exact", 2, transfer=0.5) == pytest.approx(1 + (1 + 0.25 + 2) + 2 + 2 * 0.5)
    assert seconds("loco", "exact", 8) == pytest.approx(seconds("loco", "exact", 32))


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("devices", "parts"), [(1, 4), (2, 2), (4, 8), (8, 8)])
def test_pipelines_with_a_flush_have_the_known_bubble(kind: str, devices: int, parts: int) -> None:
    """(m + N - 1) / m of the time without a bubble: Huang et al. 2019, Narayanan et al. 2021."""
    programs = end_to_end_programs([1.0] * devices, [2.0] * devices, parts, kind)
    ends, waited = simulate(programs, ahead=parts)
    assert max(times[-1] for times in ends) == pytest.approx(3.0 * (parts + devices - 1) / parts)
    assert waited <= (devices - 1) / (parts + devices - 1)


def test_a_sender_waits_for_a_receiver_that_is_behind() -> None:
    fast, slow = [[("compute", 1.0), ("send", "a")]] * 6, [[("receive", "a"), ("compute", 5.0)]] * 6
    ends, _ = simulate([fast, slow], ahead=2)
    assert ends[1][-1] == pytest.approx(31)
    assert ends[0][-1] == pytest.approx(16)  # the sixth may go when the fourth is received, at 1 + 3 x 5
    assert simulate([fast, slow], ahead=9)[0][0][-1] == pytest.approx(6)


def test_devices_that_wait_for_each_other_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="wait for each other"):
        simulate([[[("receive", "a"), ("send", "b")]], [[("receive", "b"), ("send", "a")]]])
