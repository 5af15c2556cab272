"""The tokenizer checked against the model's embedding.

JAX clamps an index that is out of range, so a token beyond the embedding would silently train another token's row.
Padding needs no check: a packed row is padded with id 0, not with the tokenizer's pad token.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jsft.data.chat import Chat
from jsft.data.examples import Example
from jsft.errors import DataError, ModelError

# Conversations that make a template write all it writes for the roles it knows.
_PROBES = (("user",), ("system", "user"), ("user", "assistant", "user"), ("user", "assistant", "tool"))


class Embedding(NamedTuple):
    """The table that token ids index: ids of `rows` and above have no row."""

    model_dir: Path
    rows: int  # vocab_size of config.json

    @classmethod
    def of(cls, model_dir: str | Path) -> "Embedding | None":
        """The embedding of a model directory; None where the directory holds a tokenizer alone. Raises ModelError."""
        file = Path(model_dir) / "config.json"
        if not file.is_file():
            return None
        try:
            rows = int(json.loads(file.read_bytes())["vocab_size"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ModelError(
                f"{file}: no vocab_size to be read ({type(error).__name__}: {error}); copy the base model's file again"
            ) from error
        return cls(Path(model_dir), rows)

    def tokens_beyond(self, chat: Chat) -> dict[str, int]:
        """Tokens of the vocabulary without a row, and their ids. Usually there are none; then no text can hold one."""
        vocabulary = chat.tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
        return {token: i for token, i in vocabulary.items() if i >= self.rows}

    def check_tokenizer(self, chat: Chat) -> None:
        """Raises ModelError when the EOS token or a token that the chat template writes has no row."""
        beyond = self.tokens_beyond(chat)
        if not beyond:
            return
        if chat.eos_id >= self.rows:
            raise self._beyond(chat, chat.eos_id, "it ends every response (the tokenizer's EOS, or data.eos_token)")
        written = [*_template_ids(chat), *(i for token, i in beyond.items() if _writes(chat, token))]
        for token_id in written:
            if token_id >= self.rows:
                raise self._beyond(chat, token_id, "the chat template writes it")

    def check_tokens(self, tokens: np.ndarray, chat: Chat, where: str) -> None:
        """Raises ModelError, naming the document `where`, when one of its tokens (int32 [L]) has no row."""
        largest = int(tokens.max(initial=-1))
        if largest >= self.rows:
            raise self._beyond(chat, largest, f"{where} holds it")

    def _beyond(self, chat: Chat, token_id: int, source: str) -> ModelError:
        token = chat.tokenizer.backend_tokenizer.id_to_token(token_id)
        return ModelError(
            f"{self.model_dir}: token {token!r} has id {token_id}, but the model's embedding has {self.rows} rows "
            f"(vocab_size), and {source}; take the tokenizer files and the weights from the same model"
        )


def _template_ids(chat: Chat) -> Iterable[int]:
    """Ids of what the template writes around the turns; none without a template, which only texts do without."""
    if not chat.tokenizer.chat_template:
        return
    for roles in _PROBES:
        turns = [{"role": role, "content": "x"} for role in (*roles, "assistant")]
        try:
            rendered = chat.pieces(Example(turns, 1.0), "a probe")
        except DataError:  # a template that refuses this order of roles writes nothing for it
            continue
        written = [piece for piece in rendered.pieces if not piece.trained]
        yield from chat.tokenise(rendered._replace(pieces=written)).tokens.tolist()


def _writes(chat: Chat, token: str) -> bool:
    """Whether an added token is in the template's source, even in a branch that no probe reaches."""
    added = chat.tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return token in str(chat.tokenizer.chat_template) and any(one.content == token for one in added)
