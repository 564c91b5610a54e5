"""Conversations, and prompts with their completions: from rows to tokens, of which the answers alone are trained on.

A document is MARK and JSON: {"messages": [{"role", "content"}, ...]} or {"prompt", "completion"}. Its tokens are int32: the first
one of a document has the bit FIRST, and those that are given rather than learned are inverted (~).
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np

from lowrank_sys.cli import CommandError
from lowrank_sys.train.rows import MARK, Text

FIRST = 1 << 30
# The speakers of ShareGPT's rows.
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}
# Columns of which one, or both, make a conversation.
CHATS = (("messages",), ("conversations",), ("prompt", "completion"))


class Chats(Text):
    """The document of a row: a conversation where the row has one (CHATS), else its text.

    `messages` as OpenAI has them ({"role", "content"}), `conversations` as ShareGPT has them ({"from", "value"}), or `prompt` and
    `completion`, both texts or both lists of messages.
    """

    def columns(self, names: list[str], where: str) -> list[str]:
        found = next((columns for columns in CHATS if set(columns) <= set(names)), None)
        return super().columns(names, where) if found is None else [*found, *(["tools"] if "tools" in names else [])]

    def document(self, row: dict, names: list[str], where: str) -> bytes:
        found = next((columns for columns in CHATS if all(row.get(column) is not None for column in columns)), None)
        if found is None:
            return super().document(row, names, where)
        values = [row[column] for column in found]
        if found == CHATS[2] and all(isinstance(value, str) for value in values):
            made = dict(zip(found, values))
        else:
            messages = [message for value in values for message in self._messages(value, where)]
            made = {"messages": messages}
            if row.get("tools"):
                made["tools"] = row["tools"]
        return MARK + json.dumps(made, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")

    def _messages(self, value: Any, where: str) -> list[dict[str, Any]]:
        found = value
        if isinstance(value, str):  # in a table of text
            with contextlib.suppress(ValueError):
                found = json.loads(value)
        if not isinstance(found, list) or not found or not all(isinstance(message, dict) for message in found):
            raise CommandError(f"--data {where}: a conversation must be a list of messages, got {str(value)[:60]!r}")
        return [self._message(message, f"{where}: message {i}") for i, message in enumerate(found, 1)]

    def _message(self, message: dict, where: str) -> dict[str, Any]:
        given = {key: value for key, value in message.items() if value is not None}
        role = given.pop("role", given.pop("from", None))
        content = given.pop("content", given.pop("value", None))
        if not isinstance(role, str) or (content is None and "tool_calls" not in given):
            raise CommandError(f"--data {where} must have a role and content, or from and value, got {', '.join(message)}")
        return {**given, "role": ROLES.get(role, role), "content": "" if content is None else content}


def is_chat(document: bytes) -> bool:
    return document[: len(MARK)] == MARK


class Encoder:
    """Tokens of texts and conversations by a Hugging Face tokenizer, marked as this module says.

    A text is learned whole, with the tokenizer's end behind it. Of a conversation in the tokenizer's chat template the messages of
    the assistant are learned, with what ends them; of a prompt and its completion the completion, with the end.
    """

    def __init__(self, tokenizer: Any, name: str):
        self._tokenizer, self._name = tokenizer, name
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def __call__(self, documents: list[bytes]) -> list[np.ndarray]:
        return [self._of(document) for document in documents]

    def _of(self, document: bytes) -> np.ndarray:
        if not is_chat(document):
            ids = self._ids(document.decode("utf-8", "replace")) + self._end
            return marked(ids, [True] * len(ids))
        made = json.loads(document[len(MARK) :])
        if "prompt" in made:
            prompt, answer = self._ids(made["prompt"]), self._ids(made["completion"]) + self._end
            return marked(prompt + answer, [False] * len(prompt) + [True] * len(answer))
        return marked(*self._conversation(made["messages"], made.get("tools")))

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _conversation(self, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[bool]]:
        text = self._rendered(messages, tools)
        answers = [self._answer(text, i, messages, tools) for i, message in enumerate(messages) if message["role"] == "assistant"]
        found = self._tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        learned = [any(begin <= at < end for begin, end in answers) for at, _ in found["offset_mapping"]]
        return found["input_ids"], learned

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, answer: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=answer)
        except Exception as error:  # jinja's own, and what templates raise: no template, roles that must alternate, ...
            raise CommandError(f"--tokenizer {self._name}: its chat template cannot take a conversation: {error}") from error

    def _answer(self, text: str, i: int, messages: list[dict[str, Any]], tools: Any) -> tuple[int, int]:
        """Where message i, an answer, is in `text`, from behind what opens it to behind what ends it."""
        before, with_it = self._rendered(messages[:i], tools, answer=True), self._rendered(messages[: i + 1], tools)
        if not text.startswith(before):
            before = self._rendered(messages[:i], tools)
        if text.startswith(before) and text.startswith(with_it):
            return len(before), len(with_it)
        # some templates show an answer otherwise when it is the last one: then it ends with the tokenizer's end
        content, end = messages[i]["content"], self._tokenizer.eos_token or ""
        at = text.find(content.strip(), len(before)) if isinstance(content, str) and text.startswith(before) else -1
        if at < 0:
            raise CommandError(
                f"--tokenizer {self._name}: its chat template does not show the answers of a conversation as they are, so nobody "
                "can tell which tokens are the assistant's"
            )
        stop = at + len(content.strip())
        return len(before), stop + (len(end) if text.startswith(end, stop) else 0)


def marked(ids: list[int], learned: list[bool]) -> np.ndarray:
    """The ids of a document, int32, with their marks. The first is never learned: nothing is before it."""
    made = np.array(ids, np.int32)
    made[:1] |= FIRST
    given = ~np.array(learned, bool)
    given[:1] = True
    return np.where(given, ~made, made)


def unmarked(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids int32, whether each is learned, whether each begins a document)."""
    learned = stream >= 0
    ids = np.where(learned, stream, ~stream)
    return ids & (FIRST - 1), learned, (ids & FIRST) != 0
