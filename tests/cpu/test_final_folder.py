"""What `from_pretrained` reads from final/ is what was trained, whatever the configuration came from."""

import json

import pytest

from lowrank_sys import cli
from lowrank_sys.train import models

OLD = {
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}},
    "its older name": {"compression_config": {"format": "pack-quantized", "quantization_status": "frozen"}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
    "hqq": {"quantization_config": {"quant_method": "hqq", "quant_config": {}}},
    "of lowrank_sys": {"quantization_config": {"quant_method": "lowrank_int8", "group_size": 64}},
}
SMALL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 256,
}


@pytest.mark.parametrize("kind", OLD)
def test_an_old_quantization_is_forgotten(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **OLD[kind]}))
    read = models.config(str(tmp_path / "config.json")).to_dict()
    assert not set(OLD[kind]) & set(read) and read["hidden_size"] == 32


def test_of_parts_too():
    from transformers import LlavaConfig

    config = LlavaConfig(text_config={**SMALL, "quantization_config": {"quant_method": "fp8"}})
    assert "quantization_config" in config.text_config.to_dict()
    models._forget_quantization(config)
    assert "quantization_config" not in config.text_config.to_dict()


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_final_says_what_the_weights_are(tmp_path, weights):
    from transformers import AutoModelForCausalLM

    from lowrank_sys.nn import quantized_from_pretrained
    from lowrank_sys.nn.quantize import METHOD

    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **OLD["compressed-tensors"]}))
    (tmp_path / "a.txt").write_text("some words to train on " * 50)
    words = {
        "model": tmp_path / "config.json",
        "method": "galore",
        "rank": 4,
        "steps": 1,
        "batch-size": 1,
        "seq-len": 16,
        "eval-tokens": 32,
        "device": "cpu",
        "data": tmp_path / "a.txt",
        "out": tmp_path / "run",
        "weights": weights,
    }
    assert cli.main(["train", *(str(word) for name, value in words.items() for word in (f"--{name}", value))]) == 0
    final = tmp_path / "run" / "final"
    kept = json.loads((final / "config.json").read_text()).get("quantization_config")
    if weights == "float":
        assert kept is None
        AutoModelForCausalLM.from_pretrained(final)
    else:
        assert kept["quant_method"] == METHOD
        quantized_from_pretrained(final)
