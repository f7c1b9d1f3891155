"""Products in blocks, and sizes by formula."""

import pytest
import torch

from ssepa_lib.evaluation.memory import affinity_map_bytes
from ssepa_lib.model import Attention, PatchAffinity
from ssepa_lib.workbook.studies.memory_study import largest_side, row_blocks, step_bytes

SMALL = {"layers": 2, "heads": 3, "width": 8, "patch": 16}


@pytest.mark.parametrize("rows", [1, 5, 9, 100])
def test_blocks_of_rows_give_what_the_whole_matrix_gives(rows):
    q, k = ([2 * torch.randn(2, 3, 1 + 9, 4) for _ in range(2)] for _ in range(2))
    attention, cam = Attention(q, k, 1, (3, 3)), torch.rand(2, 9, 5)
    assert torch.allclose(row_blocks(attention, cam, rows), PatchAffinity(attention) @ cam, atol=1e-5)


def test_bytes_of_a_step_by_hand():
    found = step_bytes(32, "stack_heads", **SMALL)  # 2·2 patches, 5 tokens
    assert found["maps"] == 2 * 3 * 5**2 * 4
    block = 5 * (2 * 4 * 8 + 4 * 4 + 14 * 8 * 4 + 4 * 3)
    assert found["kept"] == 2 * block + 5 * (4 * 8 + 8) + 3 * 32 * 32 * 4
    assert step_bytes(448, "stack_heads", scale=1.5, flip=True)["maps"] == affinity_map_bytes(
        2, 1765, 12, 12, "stack_heads"
    )
    assert step_bytes(448, "matrix_free")["maps"] == 0


def test_the_largest_image_fits_and_the_next_does_not():
    for strategy in ("stack_heads", "matrix_free"):
        side = largest_side(strategy, 1e6, **SMALL)
        assert sum(step_bytes(side, strategy, **SMALL).values()) <= 1e6
        assert sum(step_bytes(side + 16, strategy, **SMALL).values()) > 1e6
    assert largest_side("stack_heads", 10, **SMALL) == 0
