"""Chat templates: a conversation becomes the prompt that its model was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower.towers.errors import CheckpointError, InvalidRequestError

_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """The template of a checkpoint's tokenizer, as transformers applies it: without running code of
    the checkpoint, in jinja's sandbox."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def text(self) -> str:
        """The template itself."""
        return str(self._tokenizer.chat_template)

    def token_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the next answer begins.

        Raises InvalidRequestError for one that the template refuses.
        """
        from jinja2.exceptions import TemplateError

        try:
            ids = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            text = str(error)[:200]
            limit = f"a conversation that the model's template takes ({text})"
            raise InvalidRequestError("messages", f"{len(messages)} messages", limit) from None
        return list(ids)


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint folder, None if it has none. Raises CheckpointError."""
    if not (folder / _TEMPLATE_FILE).exists() and not _config_has_template(folder / _CONFIG_FILE):
        return None
    # Costs seconds to import, and only checkpoints with a template need it.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = type(error).__name__
        raise CheckpointError(f"{_CONFIG_FILE}: no tokenizer for the template, {reason}") from None
    return ChatTemplate(tokenizer)


def _config_has_template(path: Path) -> bool:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not readable as JSON ({error})") from None
    return isinstance(config, dict) and bool(config.get("chat_template"))
