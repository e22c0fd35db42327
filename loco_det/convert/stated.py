"""Facts about a checkpoint that the user states because the file lacks them: pixels, and the position of strides."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

from loco_det.convert.sources import Pixels, Triple
from loco_det.core.config import read_settings
from loco_det.core.errors import UserError


class PixelsUnknown(UserError):
    """A file does not record its pixels or stride, and the user has not stated them."""


@dataclass(frozen=True)
class Stated:
    """The user's statements, None where not given; order, mean and std come together.

    Attributes:
        channel_order: "RGB" or "BGR", as the backbone was trained.
        mean, std: in 0-255 units, in that order.
        stride_in_1x1: whether bottleneck blocks have their stride in the first convolution (MSRA's weights).
    """

    channel_order: str | None = None
    mean: Triple | None = None
    std: Triple | None = None
    stride_in_1x1: bool | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in astuple(self))

    @classmethod
    def from_d2_config(cls, path: str | Path) -> Stated:
        """Read them from Detectron2's YAML file of the run that made the weights.

        Raises:
            UserError: the file cannot be read, or a key is missing or invalid.
        """
        settings, found = read_settings(path), []
        for key in ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"):
            if key not in settings:
                remedy = "give the config.yaml that Detectron2 wrote into OUTPUT_DIR"
                raise UserError(f"{path}: does not set {key}; {remedy}")
            found.append(settings[key].value)
        order, mean, std, stride = found
        for key, values in (("MODEL.PIXEL_MEAN", mean), ("MODEL.PIXEL_STD", std)):
            numbers = isinstance(values, list | tuple) and [v for v in values if type(v) in (int, float)]
            if not numbers or len(numbers) != 3 or len(values) != 3:
                raise UserError(f"{path}: {key} {values!r} is not three numbers; correct it")
        if not isinstance(stride, bool):
            raise UserError(f"{path}: MODEL.RESNETS.STRIDE_IN_1X1 {stride!r} is neither true nor false; correct it")
        _check_pixels(order, mean, std, ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"), f"{path}: ")
        return cls(order, tuple(map(float, mean)), tuple(map(float, std)), stride)

    def complete(self, path: str | Path, depth: int, known: Pixels | None) -> Pixels:
        """Return the pixels and stride: as stated, else as `known` for the file's source.

        Raises:
            UserError: an invalid value, or one that is neither stated nor known.
        """
        pixels = (self.channel_order, self.mean, self.std)
        if None in pixels and any(value is not None for value in pixels):
            raise UserError("--channel-order, --pixel-mean and --pixel-std belong together; give all three or none")
        if self.channel_order is not None:
            _check_pixels(*pixels, ("--channel-order", "--pixel-mean", "--pixel-std"))
        needs_stride = depth >= 50 and self.stride_in_1x1 is None
        if known is None and (self.channel_order is None or needs_stride):
            raise PixelsUnknown(
                f"{path}: does not say what pixels and stride it was trained with; state --channel-order, "
                "--pixel-mean, --pixel-std and --stride-in-1x1, or give Detectron2's config.yaml of the run as "
                "--d2-config"
            )
        if self.channel_order is None:
            pixels = (known.order, known.mean, known.std)
        stride = self.stride_in_1x1
        if stride is None:
            stride = known.stride_in_1x1 if known else False
        return Pixels(*pixels, stride)


def _check_pixels(order: object, mean: Triple, std: Triple, names: tuple[str, str, str], where: str = "") -> None:
    """Refuse what cannot be, and numbers for pixels from 0 to 1: they would make the input 255 times too large.

    Args:
        names: what the user called the three.
        where: what a message begins with.
    """
    if order not in ("RGB", "BGR"):
        raise UserError(f"{where}{names[0]} {order!r} is neither RGB nor BGR; give one of them")
    if not all(0 < v < float("inf") for v in std):
        raise UserError(f"{where}{names[2]} {std} must be three positive numbers in 0-255 units; correct it")
    if not all(abs(v) < float("inf") for v in mean):
        raise UserError(f"{where}{names[1]} {mean} must be three numbers in 0-255 units; correct it")
    in_units = any(mean) and all(0 <= v < 1 for v in mean), any(v < 1 for v in std)
    for name, values, small in zip(names[1:], (mean, std), in_units):
        if small:
            shown = " ".join(f"{value:g}" for value in values)
            times = " ".join(f"{255 * value:g}" for value in values)
            raise UserError(
                f"{where}{name} {shown} looks like pixels from 0 to 1 instead of 0 to 255; if so, give {name} {times}"
            )
