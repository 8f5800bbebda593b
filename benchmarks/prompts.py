"""Prompts from held-out library code, and a test whether completions are valid Python."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twotower.towers.training.corpus import SourceFile

MIN_LINES, MAX_LINES = 4, 10
MIN_CHARACTERS, MAX_CHARACTERS = 120, 420
# Tests of the library hold tables and recorded output; a prompt should be ordinary code.
TEST_FOLDERS = frozenset(("test", "tests", "idle_test"))


@dataclass(frozen=True)
class Prompt:
    """The first lines of a function or class, without the last line's break, and their file.

    `rest` is what follows in the file.
    """

    path: str
    text: str
    rest: str


def held_out_prompts(files: Sequence[SourceFile], count: int) -> list[Prompt]:
    """`count` prompts from the held-out files, spread over the files in a fixed order.

    Each starts where a top-level definition starts and is valid Python to the tokenizer. The line
    break is left to the model, since a break and the indentation after it are one token.
    """
    chosen = sorted(
        (file for file in files if file.held_out and _is_library(file.path)),
        key=lambda file: hashlib.sha256(file.path.encode("utf-8")).hexdigest(),
    )
    per_file = [list(_definitions(file)) for file in chosen]
    rounds = max((len(prompts) for prompts in per_file), default=0)
    spread = [prompts[i] for i in range(rounds) for prompts in per_file if i < len(prompts)]
    return spread[:count]


def tokenizes(text: str) -> bool:
    """True if Python's tokenizer reads `text` to its end without an error."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)


def completes(prompt: str, completion: str) -> bool:
    """True if `completion`, cut at its last full line, continues `prompt` as Python.

    A completion without a full line of code does not.
    """
    cut = completion[: completion.rfind("\n") + 1]
    return bool(cut.strip()) and tokenizes(prompt + cut)


def _is_library(path: str) -> bool:
    folders = path.split("/")[:-1]
    return TEST_FOLDERS.isdisjoint(folders)


def _definitions(file: SourceFile) -> Iterator[Prompt]:
    try:
        tree = ast.parse(file.text)
    except SyntaxError:
        return
    lines = file.text.splitlines()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno is not None:
            prompt = _opening(lines[node.lineno - 1 : node.end_lineno - 1])
            if prompt is not None:
                rest = "\n".join(lines[node.lineno - 1 :])[len(prompt) :]
                yield Prompt(file.path, prompt, rest)


def _opening(body: list[str]) -> str | None:
    """The shortest opening of a definition that is long enough and complete for the tokenizer."""
    for count in range(MIN_LINES, min(MAX_LINES, len(body)) + 1):
        text = "\n".join(body[:count])
        ends_in_code = bool(body[count - 1].strip())
        if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and ends_in_code and tokenizes(text):
            return text
    return None
