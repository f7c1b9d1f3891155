"""Three kills of a run; `make soak` does twenty."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssepa_lib.labels.crf import crf_available

SOAK = Path(__file__).parent / "soak.py"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux, for its list of processes")
@pytest.mark.skipif(not crf_available(), reason="pydensecrf2 is not installed")
def test_three_kills_change_nothing(tmp_path):
    """In a step, while a checkpoint is written, and with workers of the dense CRF at work."""
    done = subprocess.run([sys.executable, SOAK, tmp_path, "quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["survived"] == found["kills"] == 3
    assert [entry["stage"] for entry in found["entries"]] == ["step", "checkpoint", "crf"]
