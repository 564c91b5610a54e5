"""From `--data` to two token streams, training and validation, that share no document.

A document is a text file, or one row of a table or a Hugging Face data set. Identical documents count once.
Documents are ordered by their SHA-256, which shuffles them the same way on every machine; about VALID_SHARE of the
bytes, whole documents from the front of that order, are the validation set. Where no whole documents make a side of
that size, as with a single file, the stream is cut by position instead, without overlap.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, NamedTuple

from lowrank_sys.cli import CommandError
from lowrank_sys.train.chats import Chats
from lowrank_sys.train.documents import STDLIB, fingerprint, read  # noqa: F401  STDLIB: a name of this module too
from lowrank_sys.train.encoders import bytes_encoder, chat_encoder, load_tokenizer, tokenizer_encoder, vocabulary  # noqa: F401  so are two of these
from lowrank_sys.train.rows import Text
from lowrank_sys.train.tokens import tokens

if TYPE_CHECKING:
    import torch

VALID_SHARE = 0.05


class Corpus(NamedTuple):
    """train, valid: token ids, (n,) uint8 for byte tokens, else int32; with chats marked ones (lowrank_sys.train.chats).
    vocab: tokens in the vocabulary."""

    train: torch.Tensor
    valid: torch.Tensor
    vocab: int
    split: str  # "document", "position" or "file"
    documents: int

    def digest(self) -> str:
        """SHA-256 of both streams: the same data, the same split, the same tokens."""
        digest = hashlib.sha256()
        for stream in (self.train, self.valid):
            digest.update(stream.numpy().data)
            digest.update(b"|")
        return digest.hexdigest()


def load(
    source: str, *, seq_len: int, tokenizer: str | None = None, field: str = "text", chats: bool = False, valid: str | None = None
) -> Corpus:
    """Read `source`, split it and turn it into tokens, which stay on the disk, mapped, where they are many.

    source: `python-stdlib`, a file, a folder, a glob, or `name:SPLIT` (`name:CONFIG:SPLIT`) of a Hugging Face data set.
    seq_len: tokens in a window; both sides get at least one. tokenizer: name or folder of a Hugging Face tokenizer,
    None for byte tokens 0..255. field: the column of rows that holds the text. chats: rows may be conversations
    (lowrank_sys.train.chats), and tokens are marked. valid: another source, all of which is for validation.
    Raises CommandError for data that is missing, empty, unreadable or too short.
    """
    import torch

    made = bytes_encoder() if tokenizer is None else chat_encoder(tokenizer) if chats else tokenizer_encoder(tokenizer)
    fields = Chats(field) if chats else Text(field)
    vocab, least = made[2], 1 if chats else seq_len
    split = _none if valid is not None else _one_at_least if chats else _held_out
    found = _tokens(source, fields, made, least, split)
    stream = torch.from_numpy(found.stream)
    if valid is not None:
        other = _tokens(valid, fields, made, least, _none)
        return Corpus(stream, torch.from_numpy(other.stream), vocab, "file", found.documents + other.documents)
    if found.valid:
        return Corpus(stream[found.valid :], stream[: found.valid], vocab, "document", found.documents)
    if chats:
        raise CommandError(f"--data {source}: it holds one document; one more is needed for validation, there or by --valid-data")
    cut = max(round(len(stream) * VALID_SHARE), seq_len)
    if len(stream) < 2 * seq_len:
        raise CommandError(
            f"--data {source}: it holds {len(stream)} tokens; --seq-len {seq_len} needs at least {2 * seq_len}, "
            "one window to train on and one for validation"
        )
    return Corpus(stream[:-cut], stream[-cut:], vocab, "position", found.documents)


def _tokens(source, fields, encoder, seq_len, held_out):
    encode, end, _, dtype, name = encoder
    kept_as = json.dumps([os.path.abspath(source), fields.field, name])
    try:
        found = tokens(kept_as, fingerprint(source), lambda: read(source, fields), encode, dtype, seq_len, held_out, end)
    except OSError as error:
        raise CommandError(f"--data {source}: cannot write its tokens: {error}", code=1) from error
    if not found.documents:
        raise CommandError(f"--data {source}: it holds no text")
    return found


def _held_out(sizes: list[int]) -> set[int]:
    """Which documents are the validation set: the first ones that fit into VALID_SHARE of the bytes; maybe none."""
    budget, taken, chosen = VALID_SHARE * sum(sizes), 0, set()
    for index, size in enumerate(sizes):
        if taken + size <= budget:
            chosen.add(index)
            taken += size
        elif taken > budget / 2:
            break
    return chosen


def _one_at_least(sizes: list[int]) -> set[int]:
    return _held_out(sizes) or ({0} if len(sizes) > 1 else set())


def _none(sizes: list[int]) -> set[int]:
    return set()


class Windows:
    """The training windows of a whole run, in order: item i is the i-th window that the run reads.

    stream: (n,), cut into windows of `seq_len` tokens; every pass over them is a fresh permutation that depends only on
    (seed, pass), so a resumed run continues at item i without replaying anything.
    """

    even = True  # whether every window has the same number of targets

    def __init__(self, stream: torch.Tensor, seq_len: int, seed: int, length: int):
        self.windows = windows(stream, seq_len)
        self.ids, self.seed, self.length = stream, seed, length
        self.tokens = seq_len  # of the text, in a window
        self._pass, self._order = -1, None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        """Token ids, (seq_len,) int64."""
        import torch

        number, position = divmod(index, len(self.windows))
        if number != self._pass:
            seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{number}".encode()).digest()[:7], "big")
            self._order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(seed))
            self._pass = number
        return self.windows[self._order[position]].long()

    def sample(self, tokens: int) -> dict[str, torch.Tensor]:
        """Evenly spaced windows, about `tokens` tokens in all, at least one: input_ids and labels, (count, seq_len) int64."""
        import torch

        count = min(len(self.windows), max(1, tokens // self.tokens))
        ids = self.windows[torch.arange(count) * len(self.windows) // count].long()
        return {"input_ids": ids, "labels": ids}


def windows(stream: torch.Tensor, seq_len: int) -> torch.Tensor:
    """The stream, (n,), cut into whole windows, (n // seq_len, seq_len); a view."""
    count = len(stream) // seq_len
    return stream[: count * seq_len].view(count, seq_len)


def unigram_entropy(stream: torch.Tensor, targets: torch.Tensor, vocab: int) -> float:
    """Nats a token that `targets` cost under the token frequencies of `stream` (every count one higher, so none is 0).

    This is what a model that ignores all context would reach: the yardstick for a validation loss.
    """
    import torch

    counts = sum(torch.bincount(part.long(), minlength=vocab) for part in stream.split(1 << 22)) + 1
    nats = -(counts.double() / counts.sum()).log()
    return nats[targets.flatten()].mean().item()
