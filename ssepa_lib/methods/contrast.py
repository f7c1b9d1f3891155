"""Local crops for class token contrast, cut where the auxiliary CAM is unsure (ToCo, Section 3.3)."""

import torch
from torch import Tensor

from ssepa_lib.device import own_share
from ssepa_lib.errors import UserError


@torch.no_grad()
def region_map(aux_cam: Tensor, low: float, high: float) -> Tensor:
    """Certainty of an object per pixel from a valid auxiliary CAM [B, C, H, W] in 0..1.

    Returns:
        long [B, H, W]: 0 where the strongest class is ≤ low, 2 where it is ≥ high, else 1.
    """
    value = aux_cam.amax(1)
    return torch.ones_like(value, dtype=torch.long).masked_fill(value <= low, 0).masked_fill(value >= high, 2)


@torch.no_grad()
def local_views(
    source: Tensor, regions: Tensor, number: int, size: int, negative_below: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cut square crops centred on background or uncertain places, and say which of them show an object.

    Args:
        source: [B, 3, S, S], any dtype.
        regions: [B, S, S], the `region_map` of the same pixels.
        number: crops per image (V), all centred at different pixels.
        size: side of a crop, pixels.
        negative_below: a crop whose mean region value is at most this is negative.
        generator: draws the places; a CPU generator gives the same crops on every device.

    Returns:
        crops [B, V, 3, size, size] and positive, bool [B, V].

    Raises:
        UserError: the source is too small for that many crops of that size.
    """
    b, _, height, width = source.shape
    rows, columns = height - size + 1, width - size + 1  # possible corners
    if min(rows, columns) < 1 or rows * columns < number:
        crop = min(height, width)
        raise UserError(
            f"contrast.local_size {size} leaves no room for {number} crops in data.crop {crop}; lower it."
        )
    middle = size // 2
    allowed = (regions[:, middle : middle + rows, middle : middle + columns] <= 1).flatten(1)
    allowed |= allowed.sum(1, keepdim=True) < number  # too few such places: anywhere
    draw = lambda n: torch.rand(n, rows * columns, generator=generator, device=generator.device)  # noqa: E731
    lottery = own_share(draw, b).to(source.device)
    corner = lottery.masked_fill(~allowed, -1).topk(number).indices  # [B, V]
    side = torch.arange(size, device=source.device)
    y = (corner // columns)[:, :, None, None] + side[:, None]
    x = (corner % columns)[:, :, None, None] + side
    image = torch.arange(b, device=source.device)[:, None, None, None]
    crops = source.permute(0, 2, 3, 1)[image, y, x].permute(0, 1, 4, 2, 3)
    positive = regions[image, y, x].float().mean((2, 3)) > negative_below
    return crops.contiguous(), positive
