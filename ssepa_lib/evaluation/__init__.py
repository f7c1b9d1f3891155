"""From weights to numbers and files.

In come a trained network, its recipe and a dataset. `infer` walks over the images once and says what the
network makes of each; out come results (`evaluate`, `evaluate_run`: mIoU, precision, recall and boundary
IoU of every output with the setting they belong to) and files (`predict_folder`, `export_pseudo_labels`,
`export_submission`). `attention` and `memory` measure what happens inside the network, `blind` judges maps
without masks, and `bootstrap` says how far an mIoU from a few masks can be trusted.
"""

from ssepa_lib.evaluation.evaluate import evaluate, evaluate_run, refined_mious
from ssepa_lib.evaluation.export import export_pseudo_labels, predict_folder
from ssepa_lib.evaluation.inference import Prediction, infer
from ssepa_lib.evaluation.results import (
    OUTPUTS,
    TEST_TIME,
    column_names,
    describe_setting,
    describe_settings,
    heading,
    read_results,
)
from ssepa_lib.evaluation.submission import export_submission, validate_submission

__all__ = [
    "OUTPUTS",
    "TEST_TIME",
    "Prediction",
    "column_names",
    "describe_setting",
    "describe_settings",
    "evaluate",
    "evaluate_run",
    "export_pseudo_labels",
    "export_submission",
    "heading",
    "infer",
    "predict_folder",
    "read_results",
    "refined_mious",
    "validate_submission",
]
