"""The Gaussian over position and colour behind the dense energy: exactly, and on a bilateral grid.

The grid (Chen et al. 2007) spans y, x and three colour axes. Values are splatted onto its nodes, blurred one
axis after the other, and sliced at the pixels. Splatting dithers: a pixel goes to a few single nodes, drawn
so that on average it is spread by a quadratic B-spline; over the thousands of pixels in a sum the draw
averages out. Slicing interpolates with the same spline in full, because there nothing averages. The blur's
variance is that of the Gaussian less that of both splines. Against the exact sum, 40 VOC images at 224²:
gradient of the dense energy 0.7 % off in the median, 1.4 % at most (relative L2 norm per image), its value
1.1 % at most.
"""

from functools import partial
from itertools import product
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 0.7  # grid spacing in units of σ
DRAWS = 2**17  # dithered positions of all pixels together: the fewer pixels, the more for each
EXACT_PIXELS = 64**2  # up to here the exact sum is cheaper than a grid
PIECE = {"cpu": 2**20, "cuda": 2**26}  # bytes blurred at once: a CPU has a cache to keep to
TINY = 1e-7  # taken as 0: products of such numbers become denormal, which CPUs multiply very slowly
GOLDEN = 1.068297188920841  # root of x¹¹ = x + 1: its powers give an evenly spread ten-dimensional sequence


def bilateral_filter(
    image: Tensor, values: Tensor, sigma_xy: float, sigma_rgb: float, exact: bool = False
) -> Tensor:
    """Σ_j exp(−‖Δxy_ij‖² / 2σ_xy² − ‖Δrgb_ij‖² / 2σ_rgb²) · values_j over all pixels j, i itself included.

    Args:
        image: [B, 3, H, W], RGB in 0..255.
        values: [B, K, H, W].
        sigma_xy, sigma_rgb: in pixels and grey levels.
        exact: sum over all pairs, in bounded memory; small images always are.

    Returns:
        [B, K, H, W], float32, not normalised, without gradient.
    """
    b, _, height, width = values.shape
    axes = (torch.arange(n, device=values.device) / sigma_xy for n in (height, width))
    position = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(b, -1, -1, -1)
    features = torch.cat([position, image.float() / sigma_rgb], 1).flatten(2)  # [B, 5, H·W], in units of σ
    one = _all_pairs if exact or height * width <= EXACT_PIXELS else _grid
    with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
        pairs = zip(features, values.float().flatten(2).mT, strict=True)
        return torch.stack([one(f, v) for f, v in pairs]).mT.view_as(values)


def _all_pairs(features: Tensor, values: Tensor) -> Tensor:
    """Gaussian sums of values [P, K] between features [5, P], a block of rows at a time."""
    features = features.T.contiguous()
    features = features - features.mean(0)  # so that the matrix product in the distances cancels few digits
    distance = partial(torch.cdist, x2=features, compute_mode="use_mm_for_euclid_dist")
    blocks = features.split(max(1, 2**24 // len(features)))
    # e⁻⁸⁰ is the smallest weight, as below it products would become denormal
    return torch.cat([distance(b).square_().mul_(-0.5).clamp_(min=-80).exp_() @ values for b in blocks])


def _grid(features: Tensor, values: Tensor) -> Tensor:
    """The same by splat, blur and slice."""
    where = (
        _compact(features) / STEP + 1.2
    )  # room for the splines; black on a node exactly would come out too heavy
    pixels, channels = values.shape
    shape = [ceil(end) + 2 for end in where.amax(1).tolist()]
    strides = [prod(shape[axis + 1 :]) for axis in range(5)]

    def node(coordinates: Tensor) -> Tensor:
        return sum(c * s for c, s in zip(coordinates.long(), strides, strict=True))

    # splat: nearest-node assignment after adding two uniform offsets spreads by a quadratic B-spline
    draws = ceil(DRAWS / pixels)
    count = torch.arange(draws * pixels, dtype=torch.float64, device=values.device)
    offsets = torch.stack([count.mul(GOLDEN**-k).remainder_(1).float() for k in range(1, 11)])
    index = node((where.repeat(1, draws) + offsets[:5] + offsets[5:] - 1).round())
    del count, offsets
    values = values.where(values.abs() > TINY, 0) / draws
    grid = values.new_zeros(prod(shape), channels)
    for draw in index.split(pixels):
        grid.index_add_(0, draw, values)
    # blur colours for some positions at a time, then positions for some colours at a time
    kernels = [_kernel(size, grid) for size in shape]
    _blur(
        grid.view(prod(shape[:2]), *shape[2:], channels), {axis - 1: kernels[axis] for axis in (4, 3, 2)}, 0
    )
    _blur(grid.view(*shape[:2], -1), {axis: kernels[axis] for axis in (1, 0)}, 2)
    # slice: the 27 nodes around a colour at once, for each of the 9 around a position
    nearest = where.round()
    t = where - nearest
    taps = torch.stack(
        [(0.5 - t).square() / 2, 0.75 - t.square(), (0.5 + t).square() / 2]
    )  # [3 nodes, 5 axes, P]
    weights = torch.einsum("ap,bp,cp->pabc", *taps[:, 2:].unbind(1)).reshape(pixels, 27)
    around = [
        sum(a * s for a, s in zip(step, strides[2:], strict=True)) for step in product((-1, 0, 1), repeat=3)
    ]
    index = node(nearest)[:, None] + torch.tensor(around, device=values.device)
    result = torch.zeros_like(values)
    for y, x in product(range(3), repeat=2):
        at = index + (y - 1) * strides[0] + (x - 1) * strides[1]
        colours = F.embedding_bag(at, grid, per_sample_weights=weights, mode="sum")
        result.addcmul_(colours, (taps[y, 0] * taps[x, 1])[:, None])
    return result


def _kernel(size: int, grid: Tensor) -> Tensor:
    """The blur along one axis as a matrix, [size, size]; a quadratic B-spline has variance 1/4."""
    nodes = torch.arange(size, device=grid.device)
    deviation = (STEP**-2 - 2 / 4) ** 0.5  # in nodes
    kernel = torch.exp(-((nodes[:, None] - nodes) / deviation).square() / 2) / (STEP * deviation)
    return kernel.where(kernel > TINY, 0)


def _blur(grid: Tensor, kernels: dict[int, Tensor], split: int) -> None:
    """Apply a matrix to each of some axes in place, piece by piece along another, without a copy."""
    pieces = ceil(grid.nbytes / PIECE.get(grid.device.type, 2**26))
    for piece in grid.tensor_split(min(grid.shape[split], pieces), split):
        part = piece
        for axis, kernel in kernels.items():
            part = (kernel @ part.reshape(prod(part.shape[:axis]), part.shape[axis], -1)).view(part.shape)
        piece.copy_(part)


def _compact(features: Tensor) -> Tensor:
    """Features [5, P] shifted to start at 0, in RGB or on opponent axes, whichever spans the smaller grid."""
    opponent = F.normalize(features.new_tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]]))
    both = torch.stack([features, torch.cat([features[:2], opponent @ features[2:]])])
    both = both - both.amin(2, keepdim=True)
    return both[both.amax(2).add(1).prod(1).argmin()]
