"""From texts to token ids: their bytes, or what a Hugging Face tokenizer makes of them.

An encoder is (encode: texts -> the ids of each, ids that end a document, size of the vocabulary, dtype, a name of what it does).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os

import numpy as np

from lowrank_sys.cli import CommandError


def bytes_encoder():
    """One token a byte; byte 0, which no text holds, ends a document."""
    return (lambda texts: [np.frombuffer(text, np.uint8) for text in texts]), [0], 256, "uint8", "bytes"


def where(name: str) -> tuple[str, dict[str, str]]:
    """What from_pretrained of transformers takes for a name, a folder, or a GGUF file, and with which options."""
    folder, file = os.path.split(name)
    return (folder or ".", {"gguf_file": file}) if name.endswith(".gguf") else (name, {})


@functools.cache
def load_tokenizer(name: str):
    """The Hugging Face tokenizer `name`, or of a folder; loaded once, so that no run ends by failing to find it again.

    Raises CommandError.
    """
    from transformers import AutoTokenizer

    place, options = where(name)
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # as with data sets: no such name, no network, a broken file
        raise CommandError(f"--tokenizer {name}: cannot load it: {error}") from error


def tokenizer_encoder(name: str):
    """Raises CommandError, and so does encode."""
    tokenizer = load_tokenizer(name)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(texts: list[bytes]) -> list[np.ndarray]:
        try:
            found = tokenizer(
                [text.decode("utf-8", "replace") for text in texts],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
        except Exception as error:  # tokenizers raises Exception itself, as for a word that is unknown where none may be
            raise CommandError(f"--tokenizer {name}: it cannot read the text: {error}") from error
        return [np.array(ids, np.int32) for ids in found]

    return encode, end, vocabulary(tokenizer), "int32", hashlib.sha256(f"{end} {_says(tokenizer)}".encode()).hexdigest()


def chat_encoder(name: str):
    """Raises CommandError, and so does encode. Tokens are marked (lowrank_sys.train.chats), ends are among them."""
    from lowrank_sys.train.chats import Encoder

    tokenizer = load_tokenizer(name)
    says = f"chats {tokenizer.eos_token_id} {tokenizer.chat_template} {_says(tokenizer)}"
    return Encoder(tokenizer, name), [], vocabulary(tokenizer), "int32", hashlib.sha256(says.encode()).hexdigest()


def _says(tokenizer) -> str:
    """All that decides what a tokenizer makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps([repr(tokenizer), tokenizer.get_vocab()])


def vocabulary(tokenizer) -> int:
    """How many tokens a model needs for it: ids may have gaps, and the largest counts."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
