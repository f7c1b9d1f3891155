"""What stands on top of the backbone: decoder, projection head, and where a class token comes from."""

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn


class LargeFOV(nn.Module):
    """Segmentation decoder of DeepLab-LargeFOV: two 3×3 convolutions with dilation 5 and a 1×1 classifier, no
    biases.

    Shape: [B, D, h, w] → [B, C+1, h, w].
    """

    def __init__(self, width: int, classes: int, hidden: int = 512):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 3, padding=5, dilation=5, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=5, dilation=5, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, classes + 1, 1, bias=False),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ProjectionHead(nn.Module):
    """DINO head: three-layer perceptron, L2 normalisation, linear layer whose rows have length one.

    Shape: [..., D] → [..., outputs].
    """

    def __init__(self, width: int, hidden: int = 2048, bottleneck: int = 256, outputs: int = 1024):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Parameter(
            torch.empty(outputs, bottleneck).uniform_(-(bottleneck**-0.5), bottleneck**-0.5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.last, dim=-1))


class CrossAttentionBlock(nn.Module):
    """One query attends to the patches: pre-norm cross-attention and MLP, both residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm_query = nn.LayerNorm(width, eps=1e-6)
        self.norm_patches = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, query: Tensor, patches: Tensor, *, maps: bool = False) -> tuple[Tensor, Tensor | None]:
        """Query [B, 1, D], patches [B, N, D] → query [B, 1, D], maps [B, H, 1, N] if asked for, else None."""
        # contiguous, batch second: without gradient torch otherwise copies the weights once for every token
        seen = self.norm_patches(patches).transpose(0, 1).contiguous()  # [N, B, D]
        asked = self.norm_query(query).transpose(0, 1)  # [1, B, D]
        mixed, weights = self.attention(asked, seen, seen, need_weights=maps, average_attn_weights=False)
        query = query + mixed.transpose(0, 1)
        return query + self.mlp(self.norm_mlp(query)), weights


class ClassAggregator(nn.Module):
    """FSR's attention aggregator MCA: a learned class token gathers the patches in cross-attention blocks.

    Keys and values are the patch tokens alone, so the class token never sees itself. FSR ends with one
    LayerNorm over [class, patches]. It works token by token and the backbone has already applied its
    pre-trained one to the patches, so only the class token is normalised here, by a LayerNorm of its own.

    Shape:
        patches [B, N, D] after the backbone's final norm → class token [B, D].
    """

    def __init__(self, width: int, heads: int, *, depth: int = 2):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(CrossAttentionBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def _gather(self, patches: Tensor, maps: bool) -> tuple[Tensor, Tensor | None]:
        query, weights = self.cls_token.expand(len(patches), -1, -1), None
        for block in self.blocks:
            query, weights = block(query, patches, maps=maps)
        return query, weights

    def forward(self, patches: Tensor) -> Tensor:
        return self.norm(self._gather(patches, maps=False)[0])[:, 0]

    def attention(self, patches: Tensor) -> Tensor:
        """Class-to-patch attention of the last block, [B, N, D] → [B, H, N]; every row sums to one."""
        return self._gather(patches, maps=True)[1][:, :, 0]


def pool_class(patches: Tensor, kind: str) -> Tensor:
    """Class token without attention, [B, N, D] → [B, D]: "gap" averages, "gmp" takes the maximum."""
    return patches.mean(1) if kind == "gap" else patches.amax(1)
