"""The numbers that stand in a diagram in the place of the letters."""

from dataclasses import dataclass

from ssepa_lib.model import Network
from ssepa_lib.recipe import Recipe


@dataclass(frozen=True)
class Shapes:
    """What the letters of the equations are in one run, per image."""

    side: int  # S: side of the training crop, pixels
    patch: int  # p: side of a patch, pixels
    classes: int  # C
    width: int  # D
    layers: int  # K
    heads: int  # H
    prefix: int = 1  # P: class token and registers
    auxiliary: int = -3  # the block that feeds the auxiliary classifier, counted from the end
    affinity: str = "haaf"  # none, mean or haaf
    descriptor: str = "patch"  # what HAAF pools: patch or full
    objective: str = "ncut"  # what trains HAAF; none: nothing
    iterations: int = 1
    balance: bool = False
    crops: int = 8  # local views of class token contrast; 0: no such contrast
    crop_side: int = 96  # pixels
    reinforced: bool = False  # FSR's teacher and masked view
    block: int = 4  # side of a masked block, patches
    mask_ratio: float = 0.4
    high: float = 0.7
    low: float = 0.25

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
    def letters(self) -> str:
        """The letters with their values, in one line."""
        n = f"{self.grid}·{self.grid} = {self.patches}"
        return (
            f"S = {self.side}   C = {self.classes}   N = {n}   P = {self.prefix}   T = P+N = {self.tokens}   "
            f"D = {self.width}   K = {self.layers} layers   H = {self.heads} heads   d = {self.head_width}"
        )

    @classmethod
    def of(cls, network: Network, recipe: Recipe | None = None) -> "Shapes":
        """The shapes of a network; the image size and the method come from its recipe.

        Args:
            recipe: None: images of the size that the backbone was trained with, and SS-EPA's losses.
        """
        backbone = network.backbone
        sizes = {
            "side": backbone.vit.patch_embed.img_size[0],
            "patch": backbone.patch_size[0],
            "classes": len(network.classes),
            "width": backbone.width,
            "layers": backbone.depth,
            "heads": backbone.heads,
            "prefix": backbone.num_prefix_tokens,
            "auxiliary": backbone.aux_block - backbone.depth,
            "affinity": "mean" if network.haaf is None else "haaf",
        }
        return cls(**sizes | ({} if recipe is None else _method(recipe)))


def _method(recipe: Recipe) -> dict:
    """What a recipe adds to the shapes of its network."""
    affinity, contrast, reinforce = recipe.affinity, recipe.contrast, recipe.reinforce
    return {
        "side": recipe.data.crop,
        "affinity": affinity.kind,
        "descriptor": affinity.descriptor,
        "objective": affinity.haaf_objective,
        "iterations": affinity.iterations,
        "balance": affinity.balance,
        "crops": contrast.local_crops if recipe.losses.ctc > 0 else 0,
        "crop_side": contrast.local_size,
        "reinforced": recipe.self_reinforced,
        "block": reinforce.mask_block,
        "mask_ratio": reinforce.mask_ratio,
        "high": recipe.cam.high,
        "low": recipe.cam.low,
    }


def shapes_of(source: Shapes | Network) -> Shapes:
    """Shapes as they are, or those of a network."""
    return source if isinstance(source, Shapes) else Shapes.of(source)
