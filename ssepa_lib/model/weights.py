"""Pre-trained weights: found on disk or downloaded by timm, and resampled to the model's own grid."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import (
    EfficientFormer,
    SwinTransformer,
    efficientformer,
    swin_transformer,
    vision_transformer,
)
from torch import Tensor, nn

from ssepa_lib.errors import UserError
from ssepa_lib.paths import PACKAGE, weights_root
from ssepa_lib.recipe import ModelConfig

MICRO_WEIGHTS = PACKAGE / "weights" / "vit_micro_shapes.safetensors"
COUNTS = ("num_batches_tracked", "relative_position_index", "attention_bias_idxs")  # whole numbers in a file
MICRO = {"swin": "swin_micro_shapes", "efficientformer": "efficientformer_micro_shapes"}  # beside the ViT's


def weights_path(config: ModelConfig) -> Path | None:
    """Weight file a recipe asks for; None for random weights or timm's own download."""
    if config.weights == "micro":
        own = MICRO.get(config.backbone.split("_")[0])
        return MICRO_WEIGHTS.with_stem(own) if own else MICRO_WEIGHTS
    if config.weights and config.weights != "none":
        return Path(config.weights)
    local = weights_root() / f"{config.backbone}.safetensors"
    return local if not config.weights and local.is_file() else None


def create_vit(config: ModelConfig) -> nn.Module:
    """The timm model of a recipe with its pre-trained weights.

    Raises:
        UserError: an unknown backbone, a missing or unfitting weight file, or no network to download from.
    """
    path = weights_path(config)
    if path is not None and not path.is_file():
        raise UserError(f"weight file {path} does not exist; correct model.weights or leave it empty.")
    download = path is None and config.weights != "none"
    try:
        vit = _create(config, download)
    except OSError as error:  # what a hub download raises without a network
        raise UserError(
            f"the weights of '{config.backbone}' cannot be downloaded; put {config.backbone}.safetensors "
            f"into {weights_root()} or set model.weights."
        ) from error
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "its arguments do not fit each other")
        raise UserError(
            f"model.backbone '{config.backbone}': {reason}; correct it or model.backbone_args."
        ) from error
    if path is not None:
        _load_weights(vit, path, config.backbone)
    return vit


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a PyTorch checkpoint; the old vit_small in today's form."""
    if path.suffix not in (".pth", ".pt", ".bin"):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"weight file {path} is not a readable safetensors file ({error}); fetch it again."
            ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(
            f"weight file {path} is not a readable PyTorch checkpoint; fetch it again."
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weight file {path} holds no tensors by name; name a checkpoint of weights alone.")
    return convert_old_vit_small(state) if is_old_vit_small(state) else state


def is_old_vit_small(state: Mapping[str, Tensor]) -> bool:
    """Whether weights have the shape of timm's vit_small of 2020: 8 blocks of width 768, MLP ratio 3, and no
    bias on queries, keys and values."""
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    first = {key: tuple(value.shape) for key, value in state.items() if key.startswith("blocks.0.")}
    wanted = {"blocks.0.attn.qkv.weight": (2304, 768), "blocks.0.mlp.fc1.weight": (2304, 768)}
    known = all(first.get(key) == shape for key, shape in wanted.items())
    return len(blocks) == 8 and known and "blocks.0.attn.qkv.bias" not in first


def convert_old_vit_small(state: Mapping[str, Tensor], heads: int = 8) -> dict[str, Tensor]:
    """Weights that were trained with attention QKᵀ/√D, for a network that computes QKᵀ/√d, d = D / heads.

    The rows of the queries are multiplied by √(d/D), which gives the same attention. timm's vit_small of
    2020, the "vit-small-patch16-224, depth 8" of SS-EPA's Table 5, is such a network.

    Args:
        state: name → tensor, as in timm; `qkv.weight` has the rows of queries, keys and values.
    """
    found = dict(state)
    for key in [key for key in state if key.endswith("attn.qkv.weight")]:
        weight = state[key].clone()
        weight[: len(weight) // 3] *= heads**-0.5
        found[key] = weight
    return found


def _create(config: ModelConfig, download: bool) -> nn.Module:
    """The timm model, for images of any size where it can be had so."""
    options = config.backbone_args | {"num_classes": 0, "drop_path_rate": config.drop_path}
    if config.backbone.startswith("swin_"):
        options["strict_img_size"] = False
    elif not config.backbone.startswith("efficientformer_"):  # which takes any size as it is
        options["dynamic_img_size"] = True
    try:
        return timm.create_model(config.backbone, pretrained=download, **options)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        del options["dynamic_img_size"]  # no plain ViT: only to say why it is refused
        return timm.create_model(config.backbone, pretrained=False, **options)


def _filter_of(vit: nn.Module) -> Callable:
    """timm's function that adapts a checkpoint to a model."""
    if isinstance(vit, SwinTransformer):
        return swin_transformer.checkpoint_filter_fn
    if isinstance(vit, EfficientFormer):
        return efficientformer.checkpoint_filter_fn
    return vision_transformer.checkpoint_filter_fn


def _load_weights(vit: nn.Module, path: Path, name: str) -> None:
    """Load a timm checkpoint, resampling its position embedding to the model's native grid."""
    state = _read(path)
    for key, tensor in state.items():
        if key.endswith(COUNTS):
            continue
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(
                f"weight file {path}: {key} holds {tensor.dtype} or values that are not finite; fetch a file "
                "of floating-point weights."
            )
    try:
        state = _filter_of(vit)({k: v.float() for k, v in state.items()}, vit)
        missing, unexpected = vit.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.endswith("attention_bias_idxs")]  # a constant
    except (AttributeError, IndexError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"weight file {path} does not fit the backbone '{name}': "
            f"{str(error).splitlines()[-1].strip()}; correct model.backbone, model.backbone_args or "
            "model.weights."
        ) from error
    wrong = missing + [key for key in unexpected if not key.startswith(("head", "pre_logits", "fc_norm"))]
    if wrong:
        raise UserError(
            f"weight file {path} does not fit the backbone '{name}' ({len(wrong)} tensors differ, first "
            f"{wrong[0]}); correct model.backbone, model.backbone_args or model.weights."
        )
