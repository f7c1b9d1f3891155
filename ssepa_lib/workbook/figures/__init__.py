"""Every figure of the notebooks.

Images, maps, tables and results come in; axes go out. Functions that begin with `plot_` draw on the axes they
are given, or on new ones, and return them; none of them calls `show`. The style is set once by `use_style`.
"""

from ssepa_lib.workbook.figures.curves import (
    plot_learning_curves,
    plot_scaling_curves,
    plot_score_curves,
)
from ssepa_lib.workbook.figures.data import plot_card, plot_parts, plot_samples
from ssepa_lib.workbook.figures.forest import plot_forest
from ssepa_lib.workbook.figures.heads import (
    head_colours,
    plot_claim,
    plot_head_atlas,
    plot_head_average,
    plot_number_against_miou,
)
from ssepa_lib.workbook.figures.images import (
    plot_affinity_row,
    plot_cam,
    plot_cam_grid,
    plot_crop_views,
    plot_image,
    plot_mask,
    plot_mask_grid,
)
from ssepa_lib.workbook.figures.judged import (
    plot_arrows,
    plot_better_or_worse,
    plot_case,
    plot_film,
    plot_gradients,
    plot_judged_grid,
    plot_mass,
    plot_threshold_curves,
)
from ssepa_lib.workbook.figures.layers import (
    mark_references,
    plot_attention_strip,
    plot_haaf_objectives,
    plot_layer_weights,
)
from ssepa_lib.workbook.figures.own import (
    plot_blind_threshold,
    plot_class_maps,
    plot_interval,
    plot_ladder,
    plot_views,
)
from ssepa_lib.workbook.figures.parts import (
    plot_landmark_rows,
    plot_landmarks,
    plot_maps_with_shares,
    plot_part_shares,
    plot_ranked,
)
from ssepa_lib.workbook.figures.scores import plot_class_scores, plot_memory_bars, plot_runs
from ssepa_lib.workbook.figures.style import LANDMARKS, method_name, save_figure, use_style

__all__ = [
    "LANDMARKS",
    "mark_references",
    "method_name",
    "plot_affinity_row",
    "plot_threshold_curves",
    "plot_mass",
    "plot_judged_grid",
    "plot_film",
    "plot_gradients",
    "plot_better_or_worse",
    "plot_arrows",
    "plot_attention_strip",
    "plot_cam",
    "plot_card",
    "plot_case",
    "plot_cam_grid",
    "plot_class_scores",
    "plot_crop_views",
    "plot_forest",
    "plot_haaf_objectives",
    "head_colours",
    "plot_claim",
    "plot_head_atlas",
    "plot_image",
    "plot_layer_weights",
    "plot_landmark_rows",
    "plot_landmarks",
    "plot_learning_curves",
    "plot_maps_with_shares",
    "plot_mask",
    "plot_mask_grid",
    "plot_memory_bars",
    "plot_part_shares",
    "plot_head_average",
    "plot_number_against_miou",
    "plot_parts",
    "plot_ranked",
    "plot_blind_threshold",
    "plot_class_maps",
    "plot_interval",
    "plot_ladder",
    "plot_views",
    "plot_runs",
    "plot_samples",
    "plot_scaling_curves",
    "plot_score_curves",
    "save_figure",
    "use_style",
]
