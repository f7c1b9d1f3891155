"""The suite over backbones: formulas against counted operations, and the table behind its figure."""

import pytest
import torch

from ssepa_lib.benchmarks.backbone_suites import growth_table, write_growth
from ssepa_lib.benchmarks.measure import count_flops, make_row, time_row
from ssepa_lib.model.backbone import build_backbone
from ssepa_lib.recipe import ModelConfig

SMALL = {
    "vit_tiny_patch16_224": {"embed_dim": 64, "depth": 3, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]},
    "efficientformer_l1": {"depths": [1, 1, 2], "embed_dims": [16, 32, 64], "num_vit": 1},
}


@pytest.mark.parametrize(("name", "arguments"), SMALL.items())
def test_the_formula_is_close_to_what_is_counted(name, arguments):
    backbone = build_backbone(ModelConfig(backbone=name, backbone_args=arguments, weights="none")).eval()
    with torch.no_grad():
        counted = count_flops(lambda: backbone(torch.zeros(1, 3, 224, 224)))
    assert 0.7 * counted < backbone.flops(224, 224) <= counted, "without patch embedding and merging"


def test_attention_grows_linearly_in_windows_and_quadratically_without():
    growth = {}
    for name, arguments in SMALL.items():
        backbone = build_backbone(ModelConfig(backbone=name, backbone_args=arguments, weights="none"))
        growth[name[:4]] = backbone.attention_flops(448, 448) / backbone.attention_flops(224, 224)
    assert growth["swin"] == 4 and growth["effi"] == 16 and 15.5 < growth["vit_"] < 16


def test_growth_is_written_as_table_and_figure(tmp_path):
    rows = []
    for side, flops in ((224, 2_000_000_000), (448, None)):
        at = {"side": side, "batch": 1, "depth": 3}
        rows.append(make_row("backbones", "ViT-S, forward pass", "", "GFLOP", side / 100, at=at, flops=flops))
        rows.append(make_row("backbones", "ViT-S, attention", "", "GFLOP", side / 200, at=at))
    rows.append(time_row("backbones", "ViT-S, forward time", "", [0.2], at={"side": 224}))
    rows.append(make_row("backbones", "parameters", "micro", "M", 1.0))
    table = growth_table(rows)
    assert table["side"].tolist() == [224, 448] and table["counted_gflop"][0] == 2 and table["ms"][0] == 200
    write_growth(rows, tmp_path)
    assert (tmp_path / "growth.png").stat().st_size > 5000
    assert (tmp_path / "growth.csv").read_text().splitlines()[2] == "ViT-S,448,4.48,2.24,,"
