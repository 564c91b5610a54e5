"""What the methods refuse, by name."""

import pytest
import torch
from torch import nn

from lowrank_sys.optim import (
    ASGO,
    SCALE,
    CapturedStep,
    COAPAdamW,
    FiraLion,
    Flora,
    GaLoreAdafactor,
    GaLoreAdamW,
    LDAdamW,
    MoFaSGD,
    Muon,
    SinkGD,
)

MATRIX = [8, 12]
REFUSED = {
    "covariance without an error": (GaLoreAdamW, {"rank": 4, "moments": "covariance"}, "moments='covariance' needs error"),
    "covariance of Lion": (FiraLion, {"rank": 4, "moments": "covariance"}, "moments='covariance' needs exp_avg_sq, error"),
    "power without an error": (GaLoreAdamW, {"rank": 4, "subspace": "power"}, "subspace='power' needs error"),
    "coap without a moment": (GaLoreAdafactor, {"rank": 4, "subspace": "coap"}, "subspace='coap' needs exp_avg in the state"),
    "coap from sketches": (COAPAdamW, {"rank": 4, "refresh": "next"}, "subspace must be randomized, random with refresh='next'"),
    "GaLore without a rank": (GaLoreAdamW, {"rank": None}, "rank must be an integer of at least 1, got None"),
    "SCALE with a rank": (SCALE, {"rank": 8}, "rank must be None without a subspace, got 8"),
    "SinkGD with a rank": (SinkGD, {"rank": 8}, "rank must be None without a subspace, got 8"),
    "over": (SCALE, {"rank": None, "over": "all"}, "over must be one of rows, columns, got 'all'"),
    "SCALE's momentum": (SCALE, {"rank": None, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    "no passes": (SinkGD, {"rank": None, "passes": 0}, "passes must be an integer of at least 1, got 0"),
    "half a pass": (SinkGD, {"rank": None, "passes": 2.5}, "passes must be an integer of at least 1, got 2.5"),
    "rho": (LDAdamW, {"rank": 4, "rho": 1.5}, r"rho must be a number in \[0, 1\], got 1.5"),
    "reproject_factor": (COAPAdamW, {"rank": 4, "reproject_factor": 0}, "reproject_factor must be an integer of at least 1, got 0"),
    "covariance of Muon": (Muon, {"rank": 4, "moments": "covariance"}, "moments='covariance' needs exp_avg_sq, error"),
    "ASGO's moments": (ASGO, {"rank": 4, "moments": "reset"}, "moments must be one of keep for OneSided, got 'reset'"),
    "Muon without a rank": (
        Muon, {"rank": None, "refresh": "next"}, "rank must be an integer of at least 1 with refresh='next', got None",
    ),
    "Muon's momentum": (Muon, {"rank": None, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    "MoFaSGD without a rank": (MoFaSGD, {"rank": None}, "rank must be an integer of at least 1, got None"),
    "MoFaSGD's rank": (MoFaSGD, {"rank": 9}, r"rank must be at most 8 for parameter 0 of shape \(8, 12\), got 9"),
}  # fmt: skip


@pytest.mark.parametrize("cls, keys, message", REFUSED.values(), ids=REFUSED)
def test_refused_when_it_is_built(cls, keys, message):
    options = {"relative_step": False, "scale_parameter": False, "lr": 1e-3} if cls is GaLoreAdafactor else {}
    with pytest.raises(ValueError, match=message):
        cls([{"params": [nn.Parameter(torch.randn(MATRIX))], **keys}], **options)


@pytest.mark.parametrize(
    "cls, message",
    [
        (LDAdamW, "must have no error feedback to be captured, got LDAdamW"),
        (MoFaSGD, "on the host's word to be captured, got MoFaSGD"),
        (Flora, "must make no basis on the host's word to be captured, got Flora"),
    ],
)
def test_a_captured_step_refuses(cls, message):
    with pytest.raises(ValueError, match=message):
        CapturedStep(cls([{"params": [nn.Parameter(torch.zeros(MATRIX))], "rank": 3}], lr=1e-3))


@pytest.mark.parametrize("cls", [FiraLion, COAPAdamW, LDAdamW, SCALE, SinkGD])
def test_an_unknown_argument_of_a_preset_is_refused(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__} takes .*, got momentumm"):
        cls([nn.Parameter(torch.randn(4))], momentumm=0.9)
    with pytest.raises(ValueError, match="bits must be 8 or 32, got 4"):
        cls([nn.Parameter(torch.randn(4))], bits=4)
