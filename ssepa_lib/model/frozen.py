"""What a frozen backbone says about an image never changes, so it is computed once and kept.

The features are those of one view at one size: tokens for the classifiers, and the queries and keys that the
affinity is made of. They are found by the content of the image. All are rounded to half precision, those that
find no room as well, so that the size of the memory changes no result.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor, nn

from ssepa_lib.errors import UserError
from ssepa_lib.model.encoder import BackboneOutput
from ssepa_lib.private_api import versions

Encode = Callable[[Tensor, bool], BackboneOutput]


def _packed(tensor: Tensor) -> Tensor:
    """On the CPU, in half precision."""
    return tensor.to("cpu", torch.float16 if tensor.dtype == torch.float32 else tensor.dtype)


def _unpacked(*tensors: Tensor) -> Tensor:
    """Several images as one batch; half precision becomes single precision again."""
    return torch.cat([x.float() if x.dtype == torch.float16 else x for x in tensors])


class FeatureCache:
    """Features of the images that one frozen backbone has seen.

    An image is looked up by the hash of its pixels, its size and the precision in use, and the cache empties
    itself when a parameter of the backbone is written to, so that it never answers with stale features. Once
    it is full it keeps what it has, because epochs visit every image equally often. On a CPU images are
    encoded one by one, so that features do not depend on which others are known: a resumed run equals an
    uninterrupted one.

    Args:
        limit: memory, in bytes; 0: nothing is kept.
    """

    def __init__(self, limit: int):
        self.limit, self.used, self.found, self.missed = limit, 0, 0, 0
        self._owner: nn.Module | None = None
        self._written: tuple[int, ...] = ()
        self._known: dict[Hashable, BackboneOutput] = {}
        self._shared: dict[Hashable, Tensor] = {}  # what features of several images have in common

    def encode(self, backbone: nn.Module, encode: Encode, image: Tensor, capture: bool) -> BackboneOutput:
        """The features of images, known or new.

        Args:
            backbone: whose features these are.
            encode: images [B, 3, H, W] and `capture` → output; called for those that are not known.
            image: [B, 3, H, W], 0..255.
            capture: whether the attention is needed.

        Raises:
            UserError: the cache holds features of another backbone.
        """
        self._require(backbone)
        keys = [self._key(one) for one in image]
        known = [self._known.get(key) for key in keys]
        new = [i for i, item in enumerate(known) if item is None or (capture and item.attention is None)]
        self.found, self.missed = self.found + len(keys) - len(new), self.missed + len(new)
        together = 1 if image.device.type == "cpu" else max(1, len(new))
        for part in (new[start : start + together] for start in range(0, len(new), together)):
            output = encode(image[part], capture)
            if output.attention is not None:
                output = replace(output, attention=output.attention.sharing(self._shared))
            for place, i in enumerate(part):
                known[i] = output.map(lambda x, place=place: _packed(x[place : place + 1].detach()))
                self._keep(keys[i], known[i])
        if not capture:
            known = [item.without_attention() for item in known]
        return known[0].map(lambda *x: _unpacked(*x).to(image.device), *known[1:])

    def _require(self, backbone: nn.Module) -> None:
        """Empty the cache where the weights have changed; refuse another backbone."""
        if self._owner is None:
            self._owner = backbone
        if self._owner is not backbone:
            raise UserError(
                "the cached features belong to another backbone; give every frozen backbone a FeatureCache "
                "of its own."
            )
        current = versions(backbone)
        if current != self._written:
            self._known, self._shared, self.used, self._written = {}, {}, 0, current

    @staticmethod
    def _key(image: Tensor) -> Hashable:
        """What identifies an image [3, H, W] and the precision in which it is encoded."""
        kind = image.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        pixels = image.contiguous().cpu().view(torch.uint8).numpy()
        return blake2b(pixels, digest_size=16).digest(), image.shape, image.dtype, precision

    def _keep(self, key: Hashable, item: BackboneOutput) -> None:
        """Store features as long as there is room; those with attention replace those without."""
        size = item.nbytes - (self._known[key].nbytes if key in self._known else 0)
        if self.used + size <= self.limit:
            self._known[key] = item
            self.used += size
