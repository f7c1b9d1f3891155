"""Patch affinity from attention, and head-average attention fusion (SS-EPA, Sections 3.2 and 3.3).

The N×N affinity is a linear operator on class activation maps. It is almost never built: `affinity @ cam` is
ordinary attention with the map as its values, which fused attention computes in O(N) memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssepa_lib.errors import UserError, require_index
from ssepa_lib.model.attention import Attention

PIECE = 2**22  # numbers: as many images at once as have no more in the maps of all their layers


class HAAF(nn.Module):
    """Head-average attention fusion: an MLP from one pooled number per layer to one weight per layer
    (SS-EPA, Eq. 6).

    The output is K·softmax: non-negative, mean 1, and all ones before training, so that an untrained HAAF
    is plain patch affinity. The descriptor of probabilities is about 1/N at any depth, so it enters as its
    logarithm, centred over layers; that of logits has a sign, so it enters divided by its root mean square
    over layers.

    Args:
        layers: K.
        hidden: width of the MLP.
        signed: the descriptor comes from logits.

    Shape:
        descriptor [B, K] → weights [B, K].
    """

    def __init__(self, layers: int, hidden: int = 32, *, signed: bool = False):
        super().__init__()
        self.signed = signed
        self.mlp = nn.Sequential(nn.Linear(layers, hidden), nn.GELU(), nn.Linear(hidden, layers))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self, descriptor: Tensor) -> Tensor:
        x = descriptor.float()
        if self.signed:
            x = x / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
        else:
            x = x.clamp_min(1e-12).log()
            x = x - x.mean(1, keepdim=True)
        with torch.autocast(x.device.type, enabled=False):
            return descriptor.shape[1] * self.mlp(x).softmax(1)


class LayerWeights(nn.Module):
    """Stands in for HAAF with weights fixed by hand, [K], the same for every image."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32))

    def forward(self, descriptor: Tensor) -> Tensor:
        """The weights for every image of a descriptor [B, K]: [B, K].

        Raises:
            UserError: there are not as many weights as layers.
        """
        if len(self.weights) != descriptor.shape[1]:
            raise UserError(
                f"{len(self.weights)} layer weights were given for {descriptor.shape[1]} layers; "
                "give one weight per layer."
            )
        return self.weights.to(descriptor.device).expand_as(descriptor)


def covered(maps: Tensor, valid: Tensor | None = None) -> Tensor:
    """How much of the image maps cover: their mean over the patches after min-max scaling.

    Args:
        maps: [B, N, C], no value below 0.
        valid: [B, N], 1 on the image, 0 on padding, which does not count; None: no padding.

    Returns:
        [B, 1, C] in 0..1; 0 for a constant map.
    """
    area = torch.ones_like(maps[:, :, :1]) if valid is None else valid[:, :, None].to(maps.dtype)
    low = maps.masked_fill(area == 0, torch.inf).amin(1, keepdim=True)
    high = (maps * area).amax(1, keepdim=True)
    scaled = (maps - low) / (high - low).clamp_min(1e-9)
    return (scaled.clamp(0, 1) * area).sum(1, keepdim=True) / area.sum(1, keepdim=True).clamp_min(1)


class PatchAffinity:
    """Patch affinity A = (1/K) Σ_k w_k · mean_h A_kh without the prefix tokens' rows and columns (SS-EPA, Eq.
    5 to 7).

    A_kh is the attention map of layer k and head h.

    Args:
        attention: captured queries and keys.
        weigh: maps the pooled descriptor [B, K] to layer weights [B, K] (HAAF); None weighs all layers alike.
        kind: "probabilities" (softmax(QKᵀ/√d)) or "logits" (QKᵀ/√d).
        strategy: "matrix_free" never builds a map; "stack_layers" stacks the head means [B, K, P+N, P+N];
            "stack_heads" stacks every head [B, K, H, P+N, P+N]. The numbers are the same, the memory is not.
        descriptor: "full" pools the (P+N)² map, "patch" the patch-to-patch block.
        pooling: "mean" or "max" over that map.
        iterations: how often the map is multiplied, at most.
        coverage: after the first multiplication, multiply further only those maps of which `covered` is below
            this share, 0..1; 0: all of them. A map that covers little has to spread, one that covers much
            would only lose its shape.
        balance: multiply by S = (B + Bᵀ)/2 instead of A, where B is A with its columns and then its
            rows divided by their sums. Softmax normalises rows alone, so that patches which everybody
            attends to dominate; S gives every patch about the same weight, and passes a map in both
            directions (one round of Sinkhorn and Knopp, 1967; three in CLIP-ES, CVPR 2023). It exists as a
            matrix [B, N, N], built from the maps of all layers of a few images at a time.
        deflate: after the last multiplication subtract the mean over the patches, then ReLU. A row-stochastic
            affinity pulls every map towards the constant one; deflation removes that component.
        valid: [B, N], 1 on the image, 0 on padding, which balance, coverage and deflation leave out; None: no
            padding.
    """

    def __init__(
        self,
        attention: Attention,
        *,
        weigh: Callable[[Tensor], Tensor] | None = None,
        kind: str = "probabilities",
        strategy: str = "matrix_free",
        descriptor: str = "patch",
        pooling: str = "mean",
        iterations: int = 1,
        coverage: float = 0.0,
        balance: bool = False,
        deflate: bool = False,
        valid: Tensor | None = None,
    ):
        self.attention, self.weigh = attention, weigh
        self.iterations, self.coverage = iterations, coverage
        self.balance, self.deflate, self.valid = balance, deflate, valid
        self.pooling = pooling
        self.probabilities = kind == "probabilities"
        self.strategy = strategy
        self.first = attention.num_prefix_tokens
        self.pooled_from = (
            self.first if descriptor == "patch" else 0
        )  # first row and column that the pool sees
        self._weights: Tensor | None = None

    def __len__(self) -> int:
        return self.attention.depth

    def layer_map(self, layer: int, rows: slice = slice(None)) -> Tensor:
        """All heads of one layer with prefix tokens, [B, H, rows, P+N], for viewing and analysis."""
        return self.attention.layer_map(layer, rows, probabilities=self.probabilities)

    def _pool(self, maps: Tensor) -> Tensor:
        """Global pool of head-mean maps [..., P+N, P+N] → [...]."""
        maps = maps[..., self.pooled_from :, self.pooled_from :]
        return maps.amax((-2, -1)) if self.pooling == "max" else maps.mean((-2, -1))

    def propagate(self, cam: Tensor) -> tuple[Tensor, Tensor]:
        """Per-layer products [B, K, N, C] of a map [B, N, C] and, from one more column, the descriptor."""
        values = torch.cat([cam, cam.new_ones(*cam.shape[:2], 1)], -1)  # [B, N, C+1]
        skip = values.new_zeros(len(cam), self.first, values.shape[-1])
        if self.pooled_from == 0:
            skip[..., -1] = 1
        values = torch.cat([skip, values], 1)  # [B, P+N, C+1]
        pooled = values.shape[1] - self.pooled_from
        products, descriptor = [], []
        for layer in range(len(self)):
            out = self.attention.times(layer, values, probabilities=self.probabilities)  # [B, P+N, C+1]
            products.append(out[:, self.first :, :-1])
            if self.pooling == "max":  # a maximum needs the map: one layer exists at a time
                mean = self.attention.mean_map(layer, probabilities=self.probabilities)
                descriptor.append(self._pool(mean))
            else:
                descriptor.append(out[:, self.pooled_from :, -1].mean(1) / pooled)
        return torch.stack(products, 1), torch.stack(descriptor, 1)

    def _stack(self, images: slice = slice(None)) -> Tensor:
        """Head-mean maps of all layers for some images of the batch, [b, K, P+N, P+N]."""
        stack, part = None, self.attention[images]
        heads = {self.attention.heads_in(layer) for layer in range(len(self))}
        if self.strategy == "stack_heads" and len(heads) > 1:
            raise UserError(
                f"the layers of this backbone have {sorted(heads)} heads, which cannot be stacked; set "
                "affinity.strategy to matrix_free or stack_layers."
            )
        for layer in range(len(self)):
            take = part.layer_map if self.strategy == "stack_heads" else part.mean_map
            maps = take(layer, probabilities=self.probabilities)
            if stack is None:  # filled in place: the stack exists once
                stack = maps.new_empty(len(maps), len(self), *maps.shape[1:])
            stack[:, layer] = maps
        return stack.mean(2) if self.strategy == "stack_heads" else stack

    def _resolve(self, descriptor: Tensor) -> Tensor:
        """Layer weights [B, K], computed once."""
        if self._weights is None:
            self._weights = self._weights_from(descriptor)
        return self._weights

    def _weights_from(self, descriptor: Tensor) -> Tensor:
        """Layer weights [B, K] of a descriptor [B, K]."""
        return torch.ones_like(descriptor) if self.weigh is None else self.weigh(descriptor)

    def descriptor(self) -> Tensor:
        """Pooled affinity per layer, [B, K]: what HAAF's MLP sees."""
        if self.strategy == "matrix_free":
            queries = self.attention.queries[0]
            nothing = queries.new_zeros(len(queries), self.attention.patches, 0, dtype=torch.float32)
            return self.propagate(nothing)[1]
        return self._pool(self._stack())

    @property
    def weights(self) -> Tensor:
        """Layer weights v', [B, K]."""
        return self._weights if self._weights is not None else self._resolve(self.descriptor())

    def per_layer(self, cam: Tensor) -> Tensor:
        """Head-mean affinity of each layer applied to a map, [B, N, C] → [B, K, N, C], without weights."""
        return self.propagate(cam)[0]

    def __matmul__(self, cam: Tensor) -> Tensor:
        """Propagated map, [B, N, C] → [B, N, C], multiplied up to `iterations` times."""
        if self.strategy == "matrix_free" and not self.balance:
            return self._deflated(self._repeated(self._multiply, cam))
        with torch.autocast(cam.device.type, enabled=False):
            return self._deflated(self._repeated(self._matrix().matmul, cam.float()))

    def _multiply(self, cam: Tensor) -> Tensor:
        """One multiplication, [B, N, C] → [B, N, C], without the matrix."""
        products, descriptor = self.propagate(cam)
        return (self._resolve(descriptor)[:, :, None, None] * products).mean(1)

    def _repeated(self, multiply: Callable[[Tensor], Tensor], cam: Tensor) -> Tensor:
        cam = multiply(cam)
        for _ in range(self.iterations - 1):
            further = multiply(cam)
            if self.coverage:
                further = torch.where(covered(cam, self.valid) < self.coverage, further, cam)
            cam = further
        return cam

    def _deflated(self, cam: Tensor) -> Tensor:
        """A map [B, N, C] without the part that all patches share."""
        if not self.deflate:
            return cam
        if self.valid is None:
            return (cam - cam.mean(1, keepdim=True)).relu()
        valid = self.valid[:, :, None].to(cam.dtype)
        mean = (cam * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        return (cam - mean).relu() * valid

    def _matrix(self) -> Tensor:
        """What a map is multiplied by in one iteration, [B, N, N]."""
        matrix = self._weighted_mean()
        return self._balanced(matrix) if self.balance else matrix

    def _balanced(self, matrix: Tensor) -> Tensor:
        """Columns, then rows divided by their sums, then symmetrised; padding neither gives nor receives."""
        if self.valid is not None:
            matrix = matrix * self.valid[:, :, None] * self.valid[:, None, :]
        matrix = matrix / matrix.sum(1, keepdim=True).clamp_min(1e-9)
        matrix = matrix / matrix.sum(2, keepdim=True).clamp_min(1e-9)
        return (matrix + matrix.mT) / 2

    def _weighted_mean(self) -> Tensor:
        """The weighted mean of the layers [B, N, N], and with it the weights; see `strategy`."""
        images = size = len(self.attention.queries[0])
        if self.strategy == "matrix_free":
            size = max(1, PIECE // (len(self) * self.attention.patches**2))
        parts = (slice(i, i + size) for i in range(0, images, size))
        means, weights = zip(*map(self._of_images, parts), strict=True)
        self._weights = torch.cat(weights)
        return torch.cat(means)

    def _of_images(self, images: slice) -> tuple[Tensor, Tensor]:
        """The weighted mean [b, N, N] and the weights [b, K] of some images; their maps exist together."""
        maps, known, p = self._stack(images), self._weights, self.first
        weights = self._weights_from(self._pool(maps)) if known is None else known[images]
        return torch.einsum("bk,bkij->bij", weights / len(self), maps[:, :, p:, p:]), weights

    def dense(self) -> Tensor:
        """The affinity of one iteration, [B, N, N], without gradient; row i says from where i receives."""
        return self._matrix().detach()

    def row(self, patch: int, layer: int | None = None, head: int | None = None) -> Tensor:
        """From where a patch receives: a row of `dense()`, [B, N] without gradient; in O(N) unless balanced.

        Args:
            patch: index of the receiving patch, 0..N-1, row by row.
            layer: one layer's attention, 0..K-1, unweighted; None: the weighted mean over the layers.
            head: one head of that layer, 0..H-1; None: the mean over the heads.

        Raises:
            UserError: an index out of range, or a head without a layer.
        """
        require_index("patch", patch, self.attention.patches)
        if layer is not None:
            require_index("layer", layer, len(self))
        if head is not None:
            if layer is None:
                raise UserError(f"head {head} belongs to a layer; name the layer as well.")
            require_index("head", head, self.attention.heads_in(layer))
        at = slice(self.first + patch, self.first + patch + 1)
        if layer is not None:
            heads = self.layer_map(layer, at)[:, :, 0, self.first :]  # [B, H, N]
            return (heads.mean(1) if head is None else heads[:, head]).detach()
        if self.balance:  # every entry depends on the whole matrix
            return self.dense()[:, patch]
        weights = self.weights
        rows = [
            weights[:, k, None] * self.layer_map(k, at).mean(1)[:, 0, self.first :] for k in range(len(self))
        ]
        return (sum(rows) / len(self)).detach()
