"""The numbers that stand in a diagram instead of the letters."""

import math
from dataclasses import dataclass, field, replace

from ssepa_lib.model import Network
from ssepa_lib.recipe import AffinityConfig, Recipe


@dataclass(frozen=True)
class Shapes:
    """What the letters of the equations are in one run, per image, and the run's recipe."""

    side: int  # S: side of the training crop, pixels
    patch: int  # p: side of a patch, pixels
    classes: int  # C
    width: int  # D
    layers: int  # K
    heads: int  # H
    prefix: int = 1  # P: class token and registers
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def grid(self) -> int:
        """Patches per side."""
        return round(self.side / self.patch)

    @property
    def patches(self) -> int:
        """N."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """T = P + N."""
        return self.prefix + self.patches

    @property
    def head_width(self) -> int:
        """d = D / H."""
        return self.width // self.heads

    @property
    def masked(self) -> int:
        """Patches that FSR hides, where the blocks divide the grid."""
        config = self.recipe.reinforce
        blocks = math.ceil(self.grid / config.mask_block) ** 2
        return min(math.ceil(config.mask_ratio * blocks) * config.mask_block**2, self.patches)

    @property
    def letters(self) -> str:
        """The letters with their values, in one line."""
        n = f"{self.grid}·{self.grid} = {self.patches}"
        return (
            f"S = {self.side}   C = {self.classes}   N = {n}   P = {self.prefix}   T = P+N = {self.tokens}   "
            f"D = {self.width}   K = {self.layers} layers   H = {self.heads} heads   d = {self.head_width}"
        )

    @classmethod
    def of(cls, network: Network, recipe: Recipe | None = None) -> "Shapes":
        """The shapes of a network; the size of the image and the method come from its recipe.

        Args:
            recipe: None: images of the size that the backbone was trained with, and the default recipe.
        """
        backbone = network.backbone
        side = backbone.vit.patch_embed.img_size[0] if recipe is None else recipe.data.crop
        if recipe is None:
            recipe = replace(
                Recipe(), affinity=AffinityConfig(kind="mean" if network.haaf is None else "haaf")
            )
        return cls(
            side=side,
            patch=backbone.patch_size[0],
            classes=len(network.classes),
            width=backbone.width,
            layers=backbone.depth,
            heads=backbone.heads,
            prefix=backbone.num_prefix_tokens,
            recipe=recipe,
        )


def shapes_of(source: Shapes | Network) -> Shapes:
    """Shapes as they are, or those of a network."""
    return source if isinstance(source, Shapes) else Shapes.of(source)
