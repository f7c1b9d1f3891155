"""From an image to tokens, scores and attention.

In comes a batch of images [B, 3, H, W] in 0..255; out comes a `NetworkOutput` with classification scores,
class activation maps at patch resolution, segmentation logits and, when asked for, the attention of every
layer, from which `PatchAffinity` makes the affinity between patches.
"""

from ssepa_lib.model.affinity import HAAF, Attention, LayerWeights, PatchAffinity
from ssepa_lib.model.learned_affinity import LearnedAffinity
from ssepa_lib.model.network import Network, NetworkOutput, build_network, evaluating

__all__ = [
    "HAAF",
    "Attention",
    "LayerWeights",
    "LearnedAffinity",
    "Network",
    "NetworkOutput",
    "PatchAffinity",
    "build_network",
    "evaluating",
]
