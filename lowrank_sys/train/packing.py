"""Windows of documents: several in one, each with positions of its own, so that none attends to another.

A window is {"input_ids", "labels", "position_ids"}, each (seq_len,) int64; labels are -100 where a token is given, and behind the
last document. Causal language models of transformers keep documents apart where positions begin anew, but for some (`mixes`).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from typing import Any

import numpy as np
import torch

from lowrank_sys.train.chats import unmarked

IGNORED = -100


class Packed:
    """The training windows of a whole run, in order: item i is the i-th window that the run reads.

    stream: marked tokens (lowrank_sys.train.chats), (n,) int32. A text longer than `seq_len` goes on in further windows that begin
    with the last token of the one before: all are learned but the text's first. Any other document is cut there, and one of which
    then nothing is learned is left out. pack: several documents in a window as they fit, else one. A pass over the windows is a
    fresh permutation that depends only on (seed, pass).

    ids: of the stream, without marks. cut, left_out: how many documents were. tokens: of documents, in a window in the mean.
    learned: how many of all are.
    """

    even = False  # whether every window has the same number of targets

    def __init__(self, stream: torch.Tensor, seq_len: int, seed: int, length: int, pack: bool = True):
        self.seq_len, self.seed, self.length = seq_len, seed, length
        self._stream = stream.numpy()
        ids, learned, first = unmarked(self._stream)
        self.ids = torch.from_numpy(ids)
        starts = np.flatnonzero(first)
        ends = np.append(starts[1:], len(first))
        sums = np.concatenate([[0], learned.cumsum()])
        long = ends - starts > seq_len
        is_text = sums[ends] - sums[starts] == ends - starts - 1
        self.cut = int((long & ~is_text).sum())
        spans = [
            span
            for start, end, goes_on in zip(starts.tolist(), ends.tolist(), (long & is_text).tolist())
            for span in (_pieces(start, end, seq_len) if goes_on else [(start, min(end, start + seq_len))])
        ]
        counts = [int(sums[end] - sums[start + 1]) for start, end in spans]  # of the first token nothing says what it is
        self.left_out, self.learned = counts.count(0), sum(counts)
        spans = [span for span, count in zip(spans, counts) if count]
        self.windows = _packed(spans, seq_len) if pack else [[span] for span in spans]
        self.tokens = sum(e - s for s, e in spans) / max(1, len(self.windows))
        self._pass, self._order = -1, None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, position = divmod(index, len(self.windows))
        if number != self._pass:
            seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{number}".encode()).digest()[:7], "big")
            self._order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(seed)).tolist()
            self._pass = number
        return self.window(self._order[position])

    def window(self, index: int) -> dict[str, torch.Tensor]:
        """Window `index` of those there are."""
        made = {"input_ids": np.zeros(self.seq_len, np.int64), "labels": np.full(self.seq_len, IGNORED, np.int64)}
        made["position_ids"], at = np.arange(self.seq_len), 0
        for start, end in self.windows[index]:
            ids, learned, _ = unmarked(self._stream[start:end])
            inside = slice(at, at + len(ids))
            made["input_ids"][inside] = ids
            made["labels"][inside] = np.where(learned, ids, IGNORED)
            made["labels"][at] = IGNORED
            made["position_ids"][inside] = np.arange(len(ids))
            at += len(ids)
        made["position_ids"][at:] = np.arange(self.seq_len - at)
        return {name: torch.from_numpy(values) for name, values in made.items()}

    def border(self) -> dict[str, torch.Tensor] | None:
        """The end of a document and the beginning of the next one in its window, up to 4 tokens of each: `input_ids` and
        `position_ids`, (1, n) int64. None where every window holds one document."""
        found = next((window for window in self.windows if len(window) > 1), None)
        if found is None:
            return None
        (begin, end), (start, stop) = found[:2]
        before, behind = min(4, end - begin), min(4, stop - start)
        positions = torch.cat([torch.arange(end - begin)[-before:], torch.arange(behind)])
        ids = torch.cat([self.ids[end - before : end], self.ids[start : start + behind]]).long()
        return {"input_ids": ids[None], "position_ids": positions[None]}

    def sample(self, tokens: int) -> dict[str, torch.Tensor]:
        """Evenly spaced windows, about `tokens` tokens in all, at least one, as tensors (count, seq_len)."""
        count = min(len(self.windows), max(1, tokens // self.seq_len))
        return stacked([self.window(i * len(self.windows) // count) for i in range(count)])


def stacked(windows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {name: torch.stack([window[name] for window in windows]) for name in windows[0]}


def mixes(model: torch.nn.Module, border: dict[str, torch.Tensor]) -> bool:
    """Whether the second document of `border` (Packed.border) sees the first one: its logits have a gradient there."""
    vectors = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, given, made: vectors.append(made))
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        logits = model(**{name: values.to(device) for name, values in border.items()}).logits
    finally:
        hook.remove()
        model.train(training)
    begin = int((border["position_ids"][0] == 0).nonzero()[-1])
    (grad,) = torch.autograd.grad(logits[:, begin:].float().square().sum(), vectors[0])
    return bool(grad[:, :begin].any())


def _pieces(start: int, end: int, size: int) -> list[tuple[int, int]]:
    """Spans of `size` tokens at most, each beginning with the last token of the one before."""
    return [(at, min(end, at + size)) for at in range(start, end - 1, size - 1)]


def _packed(spans: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Spans in windows of `size` tokens: the longest first, each into the window that it fills best."""
    windows, room = [], []  # room: (tokens left, number of the window), sorted
    for start, end in sorted(spans, key=lambda span: (span[0] - span[1], span)):
        at = bisect_left(room, (end - start, -1))
        if at == len(room):
            left, number = size, len(windows)
            windows.append([])
        else:
            left, number = room.pop(at)
        windows[number].append((start, end))
        if left > end - start:
            insort(room, (left - (end - start), number))
    return windows
