"""Where the mass of a map lies: on the head, the body or the ground; how high its background is; and masks on
the grid of patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.data import IGNORE
from ssepa_lib.errors import UserError

PARTS = ("head", "body", "ground")  # order of the shares


def mass_by_part(maps: Tensor, parts: Tensor) -> Tensor:
    """Share of a map's mass on head, body and ground; the three add up to 1.

    Args:
        maps: [..., H, W]; values below 0 count as 0.
        parts: integer, of the same size: 1 head, 2 body, anything else ground.

    Returns:
        [..., 3] in the order of `PARTS`, 0..1; NaN for a map without mass.

    Raises:
        UserError: the sizes differ.
    """
    if maps.shape != parts.shape:
        raise UserError(f"maps {list(maps.shape)} and parts {list(parts.shape)} must have the same size.")
    maps, parts = maps.clamp_min(0).double(), parts.to(maps.device)
    head, body = ((maps * (parts == part)).sum((-2, -1)) for part in (1, 2))
    total = maps.sum((-2, -1))
    return (torch.stack([head, body, total - head - body], -1) / total[..., None]).float()


def floor(map: Tensor, mask: Tensor) -> float:
    """Median of a map on the background divided by its maximum: what a threshold has to get over.

    Args:
        map: [H, W], not negative.
        mask: [H, W], 0 on the background.

    Returns:
        0..1; NaN without background, or for a map that is 0 everywhere.

    Raises:
        UserError: the sizes differ.
    """
    if map.shape != mask.shape:
        raise UserError(f"map {list(map.shape)} and mask {list(mask.shape)} must have the same size.")
    background, highest = map[mask.to(map.device) == 0], float(map.max())
    if not background.numel() or highest <= 0:
        return float("nan")
    return float(background.float().median()) / highest


def patch_ids(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The class that most pixels of each patch have: the one labelling of whole patches that the fewest
    pixels contradict. A single pixel of the patch would miss thin objects, or move them by half a patch.

    Args:
        mask: [H, W], 0 background, 255 ignored; H and W at least those of the grid.
        grid: h, w.

    Returns:
        [h, w], integer; of equally frequent classes the lowest. Ignored pixels have no say; a patch without
        any other is 255.
    """
    ids = [i for i in mask.unique().tolist() if i != IGNORE]
    if not ids:
        return torch.full(grid, IGNORE, device=mask.device)
    same = torch.stack([(mask == i).float() for i in ids])  # [ids, H, W]
    best, index = F.adaptive_avg_pool2d(same[None], grid)[0].max(0)  # [h, w] each
    return torch.tensor(ids, device=mask.device)[index].masked_fill(best == 0, IGNORE)
