"""The words and equations of the workbook, and where each of them is built."""

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
    "affinity": Term("How much of its value patch i takes from patch j.", "02 §3"),
    "attention map": Term("One head's weights of every token for every token; each row sums to 1.", "02 §2"),
    "auxiliary CAM": Term("A CAM from an earlier block, used where doubt matters.", "03"),
    "background threshold": Term("The value below which a pixel of a map counts as background.", "02 §7"),
    "balanced affinity": Term("An affinity in which every patch gives as much as it receives.", "02 §6"),
    "CAM": Term("Class activation map: the classifier's score of every single patch.", "02 §1"),
    "class token": Term("An extra token that the backbone uses to collect the image.", "02 §2"),
    "co-occurrence": Term("Two classes, or a class and its background, that appear together.", "01 §2, §3"),
    "confusion matrix": Term("A count of pixels by true class and predicted class.", "01 §4"),
    "decoder": Term("The part (LargeFOV) that turns tokens into a segmentation.", "03"),
    "dense energy": Term("A loss that asks neighbours of like colour to get like labels.", "03"),
    "descriptor": Term("One pooled number per layer; all that HAAF sees of an image.", "02 §5"),
    "EMA teacher": Term("A slow moving average of the network that teaches it.", "03"),
    "entropy": Term("How widely a row of attention is spread, in nats.", "05 §1"),
    "floor": Term("The median of a map on the background, divided by its maximum.", "02 §6"),
    "foreground": Term("Every pixel that belongs to an object of a class.", "01 §1"),
    "global max pooling": Term("The maximum over the patches, for each dimension of the tokens.", "02 §1"),
    "HAAF": Term("Head-average attention fusion: a learned weight for each layer.", "02 §4"),
    "head": Term("One of several attentions that a layer computes side by side.", "02 §3"),
    "image-level label": Term("The classes that an image shows, without their places.", "00 §2"),
    "ignore": Term("The label 255: a pixel that teaches nothing and is not measured.", "02 §7"),
    "layer": Term("One block of the transformer, with its own attention.", "02 §3"),
    "local and global view": Term("A small and a large crop of the same image.", "01 §5"),
    "MCA": Term("FSR's aggregator: cross-attention that collects a class token from patches.", "05 §6"),
    "mIoU": Term("Intersection over union per class, from one matrix over the split, averaged.", "01 §4"),
    "multi-scale": Term("Maps of several image sizes and of the flip, put together.", "02 §7"),
    "oracle": Term("A result that uses the masks: a ceiling, not a method.", "04"),
    "over-smoothing": Term("The tokens of an image become alike, so that maps become flat.", "02"),
    "PAR": Term("Pixel-adaptive refinement: pixels take values from neighbours of like colour.", "02 §7"),
    "paired difference": Term("The difference of two methods on the same seed.", "06"),
    "part activation": Term("A map that shows the part which tells the class and nothing else.", "00 §4"),
    "patch": Term("A small square of the image; the unit in which the transformer sees.", "00 §4"),
    "patch token contrast": Term("A loss that makes tokens of one label alike, others not.", "03"),
    "class token contrast": Term("A loss that makes views of the same object alike.", "03"),
    "prefix token": Term("A token that stands for no patch, such as the class token.", "02 §3"),
    "propagation step": Term("One multiplication of a map by the affinity.", "02 §6"),
    "pseudo-label": Term("A label map that the network makes for itself.", "02 §7"),
    "refined map": Term("Affinity × CAM, the paper's word.", "02 §3"),
    "seed": Term("The number from which everything random is drawn.", "06"),
    "single-stage": Term("Classifier, labels and segmentation are trained together.", "03"),
    "supervision of HAAF": Term("The loss that HAAF learns its weights from.", "06"),
    "token": Term("The vector, of width D, that stands for a patch inside the transformer.", "02 §1"),
    "valid CAM": Term("A CAM whose absent classes are set to 0 by the label.", "02 §7"),
    "weak supervision": Term("Training for masks with labels that say less than masks do.", "00 §2"),
}

EQUATIONS = {
    "1": Equation(
        "SS-EPA Eq. 1",
        "CAM from tokens",
        ("model.network.Network.forward", "labels.cam.normalise_cam"),
        "00 §4, 02 §1",
    ),
    "2": Equation(
        "SS-EPA Eq. 2, 3", "multi-label soft margin", ("methods.losses.classification_loss",), "03"
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
    "8": Equation("SS-EPA Eq. 8", "weighted sum of the losses", ("methods.objective.total_loss",), "03"),
    "balance": Equation(
        "this workbook", "balanced affinity, S = (B + Bᵀ)/2", ("model.affinity.PatchAffinity.dense",), "02 §6"
    ),
    "ToCo": Equation(
        "ToCo",
        "patch and class token contrast; labels with two thresholds",
        (
            "methods.losses.patch_token_contrast",
            "methods.losses.class_token_contrast",
            "labels.pseudo_labels.PseudoLabeler.training_labels",
        ),
        "03, 02 §7",
    ),
    "AFA": Equation("AFA", "PAR", ("labels.par.PixelAdaptiveRefinement.forward",), "02 §7"),
    "Tang": Equation(
        "Tang et al. 2018",
        "dense energy, normalised cut",
        ("methods.losses.dense_energy", "methods.losses.normalised_cut"),
        "03, 06",
    ),
    "FSR": Equation(
        "FSR",
        "aggregator; masks; unc, cer; entropy",
        (
            "model.heads.ClassAggregator.forward",
            "methods.fsr.mask_blocks",
            "methods.fsr.self_distillation",
            "evaluation.attention.attention_entropy",
        ),
        "03, 05",
    ),
}  # number or paper → where it is found in the library
