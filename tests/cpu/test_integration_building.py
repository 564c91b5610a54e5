"""Keywords as configurations write them, and heads as peft wraps them."""

import pytest
import torch

from lowrank_sys.integrations.building import parsed
from lowrank_sys.optim import param_groups


def test_keywords_of_a_text():
    found = parsed("rank=128,scale=4, betas=(0.9, 0.95), proj_type=short-moments, quant=False")
    assert found == {"rank": 128, "scale": 4, "betas": (0.9, 0.95), "proj_type": "short-moments", "quant": False}
    assert parsed(None) == parsed("") == {}


@pytest.mark.parametrize("text", ["rank", "rank=", "**rank", "rank=1)(", "rank=1) + (2", "8=1"])
def test_what_is_no_list_of_keywords(text):
    with pytest.raises(ValueError, match="optim_args must be NAME=VALUE"):
        parsed(text)


def test_a_head_inside_a_wrapper_stays_plain():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.modules_to_save = torch.nn.ModuleDict({"default": torch.nn.Linear(16, 32)})

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.lm_head = torch.nn.Linear(16, 16), Wrapped()

        def get_output_embeddings(self):
            return self.lm_head

    plain, low_rank = param_groups(Model(), rank=4)
    assert [name for name, _ in low_rank["params"]] == ["layer.weight"]
    assert any("lm_head" in name for name, _ in plain["params"])
