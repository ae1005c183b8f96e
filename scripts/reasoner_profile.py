"""Write the profile that is shipped for the reasoner from benchmarks/results/verify.json.

    python -m scripts.reasoner_profile

What ``python -m rksc_sglang.calibrate`` does, on the problems that ``benchmarks.verify`` recorded
for calibration.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.verify import DELTA, Setting, groups_of
from rksc_sglang.asks.profile import fingerprint
from rksc_sglang.calibrate import calibrate
from rksc_sglang.cgee.profile import Part, update_profile
from rksc_sglang.models import ensure_model

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "verify.json"
PROFILE = ROOT / "rksc_sglang" / "asks" / "profiles" / "reasoner.json"


def parts() -> list[Part]:
    rows = json.loads(RESULT.read_text())["rows"]
    risk, probe, num_layers, labels = Setting.of(rows)
    model, groups = fingerprint(ensure_model("reasoner")), groups_of(rows, "calibration")
    found, reasons = calibrate(groups, probe, labels, num_layers, model, risk, DELTA)
    assert not reasons, reasons
    return found


if __name__ == "__main__":
    for part in parts():
        update_profile(PROFILE, part)
