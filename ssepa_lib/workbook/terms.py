"""The words and equations of the workbook, and where each of them is built.

A place is a notebook and, after §, its sections: `02 §3`. `contents.links` turns it into links.
"""

from typing import NamedTuple


class Term(NamedTuple):
    """One word of the glossary."""

    meaning: str  # one sentence
    place: str  # the notebook and section that builds it


class Equation(NamedTuple):
    """One equation of a paper."""

    where: str
    says: str
    functions: tuple[str, ...]  # names below `ssepa_lib.`
    place: str  # the notebook and section that builds it


GLOSSARY = {
    "affinity": Term(
        "The affinity of two patches says how much of its new value one takes from the other.", "02 §3"
    ),
    "attention map": Term(
        "An attention map holds one head's weights of all tokens for all tokens; each of its rows sums to 1.",
        "02 §2",
    ),
    "auxiliary CAM": Term(
        "The auxiliary CAM comes from an earlier block, and says which patches are in doubt.", "03 §1"
    ),
    "background threshold": Term(
        "A pixel whose map lies below the background threshold counts as background.", "02 §7, 04 §7"
    ),
    "balanced affinity": Term(
        "In a balanced affinity every patch gives about as much as it receives.", "02 §6"
    ),
    "block": Term(
        "A block of the transformer is one layer of attention with the small network that follows it.",
        "03 §1",
    ),
    "bootstrap": Term(
        "A bootstrap draws images again and again, with replacement, to see how far a number moves.", "08 §5"
    ),
    "CAM": Term("A class activation map is the classifier's score of every single patch.", "00 §4, 02 §1"),
    "class token": Term(
        "The class token is an extra token in which the backbone collects the whole image.", "02 §2, 05 §7"
    ),
    "class token contrast": Term(
        "This loss makes class tokens of views of one object alike and pushes views of background away.",
        "03 §2",
    ),
    "co-occurrence": Term(
        "Two classes, or a class and its background, co-occur if they often appear together.", "01 §2, §3"
    ),
    "confusion matrix": Term("A confusion matrix counts pixels by true class and predicted class.", "01 §4"),
    "coverage": Term(
        "The coverage of a map is its mean over the patches after min-max scaling; where it is small, "
        "`ssepa_plus` multiplies again.",
        "02 §6",
    ),
    "CRF": Term(
        "A conditional random field moves a label map to the edges of the image, at test time only.", "04 §8"
    ),
    "decoder": Term("The decoder (LargeFOV) turns the tokens into a segmentation.", "03 §1"),
    "dense energy": Term(
        "The dense energy is low where neighbours of similar colour get the same label.", "03 §2"
    ),
    "descriptor": Term(
        "The descriptor has one pooled number per layer, which is all that HAAF sees of an image.", "02 §5"
    ),
    "EMA teacher": Term(
        "An EMA teacher is a slow moving average of the network, which the network learns from.", "03 §4"
    ),
    "entropy": Term("The entropy of a row of attention says how widely it is spread, in nats.", "05 §1"),
    "flip": Term(
        "A flip exchanges left and right of an image; maps of the image and of its flip are merged.", "02 §7"
    ),
    "flip consistency": Term(
        "The flip consistency of a map is its agreement with the map of the flipped image.", "08 §4"
    ),
    "floor": Term(
        "The floor of a map is its median on the background, divided by its maximum.", "02 §6, 04 §9"
    ),
    "foreground": Term(
        "The foreground consists of all pixels that belong to an object of some class.", "01 §1"
    ),
    "global max pooling": Term(
        "Global max pooling takes the maximum over the patches, separately for each dimension of the tokens.",
        "02 §1",
    ),
    "HAAF": Term(
        "Head-average attention fusion learns one weight for each layer of the averaged heads.", "02 §4"
    ),
    "head": Term("A head is one of several attentions that a layer computes side by side.", "02 §3, 05 §2"),
    "image-level label": Term(
        "An image-level label names the classes that an image shows, and not where they are.", "00 §2"
    ),
    "ignore": Term("A pixel with the label 255 teaches nothing and is not measured.", "02 §7"),
    "landmarks": Term(
        "Head, Body and Ground are three patches of one image that the notebooks follow.", "00 §4"
    ),
    "layer": Term(
        "A layer is the attention of one block; the affinity averages or weighs the layers.", "02 §3"
    ),
    "local and global view": Term(
        "A local view is a small crop of an image, and a global view a large one.", "01 §5"
    ),
    "MCA": Term("FSR's aggregator collects a class token from the patches by cross-attention.", "05 §7"),
    "mIoU": Term(
        "The mIoU is the mean over the classes of intersection over union, counted over the whole split.",
        "01 §4",
    ),
    "multi-scale": Term("A multi-scale map is the sum of the maps of several image sizes.", "02 §7"),
    "normalised cut": Term(
        "The normalised cut is low where a map separates the tokens at their weak connections.", "03 §1"
    ),
    "oracle": Term(
        "An oracle uses the masks, and so shows what can be reached at most; it is not a method.", "04 §4"
    ),
    "over-smoothing": Term(
        "In over-smoothing the tokens of an image become alike, so that its maps become flat.", "04 §9"
    ),
    "PAR": Term(
        "In pixel-adaptive refinement, pixels take over values from neighbours of similar colour.", "02 §7"
    ),
    "paired difference": Term("A paired difference compares two methods on the same seed.", "06 §2"),
    "part activation": Term(
        "A map shows part activation if it lies on the part that identifies the class and on nothing else.",
        "00 §4, 04 §9",
    ),
    "patch": Term("A patch is a small square of the image, the unit in which the transformer sees.", "00 §4"),
    "patch token contrast": Term(
        "This loss makes tokens of one label alike and tokens of different labels orthogonal.", "03 §2"
    ),
    "prefix token": Term("A prefix token stands for no patch; the class token is one.", "02 §3"),
    "propagation step": Term(
        "A propagation step is one multiplication of a map by the affinity.", "02 §6, 04 §6"
    ),
    "pseudo-label": Term(
        "A pseudo-label is a label map that the network makes from its own map and then learns from.", "02 §7"
    ),
    "refined map": Term("The refined map is the product of the affinity and the CAM.", "02 §3"),
    "seed": Term("The seed is the number that decides everything random in a run.", "06 §2"),
    "self-distillation": Term(
        "In self-distillation a student that sees a masked view predicts what its teacher sees in the whole.",
        "03 §4",
    ),
    "single-stage": Term(
        "In a single-stage method, classifier, pseudo-labels and segmentation are trained together.", "03 §1"
    ),
    "supervision of HAAF": Term(
        "The supervision of HAAF is the loss from which it learns its weights, without any mask.",
        "03 §1, 06 §4",
    ),
    "token": Term(
        "A token is the vector, of width D, that stands for a patch inside the transformer.", "02 §1"
    ),
    "valid CAM": Term("A valid CAM is 0 for every class that the image-level label excludes.", "02 §7"),
    "weak supervision": Term(
        "Weak supervision means labels that say less than the result has to say: names instead of masks.",
        "00 §2",
    ),
}  # word → what it means

EQUATIONS = {
    "1": Equation(
        "SS-EPA Eq. 1",
        "CAM from tokens",
        ("model.network.Network.forward", "labels.cam.normalise_cam"),
        "00 §4, 02 §1",
    ),
    "2": Equation(
        "SS-EPA Eq. 2, 3", "multi-label soft margin", ("methods.losses.classification_loss",), "03 §1"
    ),
    "4": Equation(
        "SS-EPA Eq. 4", "scaled dot-product attention", ("model.affinity.Attention.layer_map",), "02 §2"
    ),
    "5": Equation(
        "SS-EPA Eq. 5",
        "PA × CAM",
        ("model.affinity.PatchAffinity.__matmul__", "labels.refine.Refiner.__call__"),
        "02 §3",
    ),
    "6": Equation(
        "SS-EPA Eq. 6, 7",
        "v′ ⊙ A′, PA_enh × CAM",
        ("model.affinity.HAAF.forward", "model.affinity.PatchAffinity.weights"),
        "02 §4",
    ),
    "8": Equation("SS-EPA Eq. 8", "weighted sum of the losses", ("methods.objective.total_loss",), "03 §1"),
    "figure 1": Equation("SS-EPA Figure 1", "overview of the method", ("workbook.diagrams.pipeline",), "03"),
    "figure 2": Equation(
        "SS-EPA Figures 2, 3, 4",
        "extraction of the affinity; HAAF",
        ("workbook.diagrams.affinity_extraction", "workbook.diagrams.haaf"),
        "02",
    ),
    "balance": Equation(
        "this workbook", "balanced affinity, S = (B + Bᵀ)/2", ("model.affinity.PatchAffinity.dense",), "02 §6"
    ),
    "variance": Equation(
        "this workbook",
        "what HAAF of ssepa_plus learns from: variance that the map leaves unexplained",
        ("methods.losses.unexplained_variance",),
        "04",
    ),
    "ToCo": Equation(
        "ToCo",
        "patch and class token contrast; labels with two thresholds",
        (
            "methods.losses.patch_token_contrast",
            "methods.losses.class_token_contrast",
            "labels.pseudo_labels.PseudoLabeler.training_labels",
        ),
        "03 §1, 02 §7",
    ),
    "AFA": Equation("AFA", "PAR", ("labels.par.PixelAdaptiveRefinement.forward",), "02 §7"),
    "learned affinity": Equation(
        "AFA",
        "an affinity learned from attention, and its loss on pairs of patches",
        ("model.learned_affinity.AffinityHead.forward", "methods.losses.affinity_pairs"),
        "06 §6",
    ),
    "Tang": Equation(
        "Tang et al. 2018",
        "dense energy, normalised cut",
        ("methods.losses.dense_energy", "methods.losses.normalised_cut"),
        "03 §1",
    ),
    "FSR": Equation(
        "FSR",
        "aggregator; masks; self-distillation (unc, cer); entropy",
        (
            "model.heads.ClassAggregator.forward",
            "methods.fsr.mask_blocks",
            "methods.fsr.self_distillation",
            "evaluation.attention.attention_entropy",
        ),
        "03 §4, 05 §5, §7",
    ),
    "MCC": Equation(
        "MCC",
        "class token contrast on views of which most blocks are hidden",
        ("methods.mcc.masked_views", "methods.mcc.MaskedContrast.forward"),
        "06 §6",
    ),
    "mIoU": Equation(
        "this workbook",
        "mIoU from one confusion matrix",
        ("evaluation.scores.Confusion.update", "evaluation.scores.Confusion.miou"),
        "01 §4",
    ),
    "memory": Equation(
        "this workbook",
        "bytes of attention maps and of saved activations",
        ("evaluation.memory.affinity_map_bytes", "evaluation.memory.analytic_activation_bytes"),
        "07 §1, §3",
    ),
}  # number, figure, paper or word → where it is found in the library
EQUATIONS |= {"3": EQUATIONS["2"], "7": EQUATIONS["6"]}
