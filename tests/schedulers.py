"""The schedulers of diffusion models as parameters of tests: a few of unlike kinds by default, the others are slow."""

from __future__ import annotations

import pytest

from sdcli.request.schedulers import schedulers_for

FEW = {"ddim", "euler-a", "dpmpp-2m", "lcm"}
DIFFUSION_SCHEDULERS = [
    pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in schedulers_for("diffusion")
]
