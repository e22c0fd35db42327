"""Images that fail to decode: counted, logged, and tolerated up to a share of the set."""

from __future__ import annotations

from collections.abc import Iterable

from loco_det.core.errors import UserError
from loco_det.core.log import log

SUBSTITUTES = 100  # images tried in place of an unusable one before giving up
_NAMED = 20  # logged, one line each; later ones at every power of two


class Unusable(dict[int, str]):
    """Unusable images found so far by this process, image index -> reason.

    Args:
        images: total number of images.
        share: tolerated share; at least one image in a small set, unless 0.
        where: name of the set in the message that ends a run.
        setting: the user's setting for `share`.
    """

    def __init__(self, images: int, share: float, where: str, setting: str) -> None:
        super().__init__()
        self.images, self.share, self.where, self.setting = images, share, where, setting

    def count(self, found: Iterable[tuple[int, str]], instead: str = "a neighbour takes its place") -> None:
        """Add and log images with their reason and what happens `instead`.

        Raises:
            UserError: more than the tolerated share.
        """
        for image, reason in found:
            if image in self:
                continue
            self[image] = reason
            count = len(self)
            if count <= _NAMED or count & (count - 1) == 0:
                log.warning("%s; %s (%d such of %d images)", reason.rstrip("."), instead, count, self.images)
            if count > max(self.share * self.images, self.share > 0):
                raise UserError(
                    f"{self.where}: {count} of {self.images} images cannot be read, which is more than "
                    f"{self.setting} {self.share:g} (the last: {reason.rstrip('.')}); repair them or raise it"
                )
