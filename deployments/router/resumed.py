"""What a client sends back of a broken stream: to be gone on with, or complete already."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.towers.decoding.output_text import OutputText
from twotower.towers.decoding.services import Block
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import FinishReason, GenerationParams
from twotower.towers.text.tokenizer import Tokenizer


def resumed_text(
    tokenizer: Tokenizer | None, params: GenerationParams, generated: Sequence[int]
) -> tuple[OutputText, FinishReason | None]:
    """The text after the `generated` tokens, and why they are complete if they are.

    A stream may break between its last block and its end: its client cannot know that only the
    end is missing. Raises InvalidRequestError for tokens after a stop string.
    """
    text = OutputText(tokenizer, params)
    if not generated or params.eos_token_id in generated[:-1]:
        return text, None
    # What the client has seen of the text is dropped; what was held back stays in there.
    cut, _ = text.take(Block(0, tuple(generated), (), (), nfe=0))
    kept = len(cut.token_ids)
    if kept < len(generated):
        raise InvalidRequestError(
            f"generated_token_ids[{kept}]",
            generated[kept],
            f"no token after the stop string {text.matched_stop!r}",
        )
    if text.matched_stop is not None or params.eos_token_id in generated[-1:]:
        return text, "stop"
    return text, "length" if len(generated) == params.max_tokens else None
