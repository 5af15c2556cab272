"""From a conversation to token ids and the spans that are trained.

The template's text and each trained turn are tokenised separately, so no token straddles the border between what is
read and what is learnt. A trained turn is its content and the token that ends it: the template's end-of-turn token
where the conversation continues, the configured EOS after the last turn. Of a turn with thinking or tool calls of its
own, the template writes the text (`conversation.py`).
"""

import hashlib
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jsft.data.conversation import Conversation
from jsft.data.examples import Example, one_for_each_turn
from jsft.data.thinking import MISMATCHES, mismatch, prompt_thinking
from jsft.data.turns import THINKING
from jsft.errors import ConfigError, DataError, ModelError

CHAT_EOS = "chat"  # as data.eos_token: what the template ends an assistant turn with
DATE = "26 Jul 2024"  # what Llama's chat templates write where they have no clock
_DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system\n.*?<\|im_end\|>\n", re.DOTALL)


class Document(NamedTuple):
    """One conversation as tokens. A target (the token to predict) is trained when a span holds its index."""

    tokens: np.ndarray  # int32 [L]
    spans: np.ndarray  # int32 [S, 2]: trained ranges [start, end) of token indices, ascending
    control_text: int  # control-token strings found in the data's text and tokenised as plain text
    weights: np.ndarray | None = None  # float32, one for each token in a span, in order; None: all 1


class _Piece(NamedTuple):
    text: str
    trained: bool  # True for an assistant turn, False for the template's text, other turns included
    guard: str  # the character that marks control-token text of the data; '' where there is none
    literal: bool = False  # the data's own text, in which nothing is a control token


class Rendered(NamedTuple):
    """A conversation cut into template text and assistant turns."""

    pieces: list[_Piece]
    control_text: int  # control-token strings in the data's text
    mismatch: str | None  # name in `thinking.MISMATCHES`, of the first trained turn that has one


def load_tokenizer(model_dir: str | Path):
    """The fast tokenizer of a Hugging Face model directory, from `tokenizer.json`, else from `tokenizer.model`.

    Raises ModelError when the directory holds none.
    """
    folder = Path(model_dir)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about a missing PyTorch, which is not needed here
    from transformers import PreTrainedTokenizerFast

    from jsft.hf.tokenizer import load_converted

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ModelError(f"{folder}: no tokenizer.json; a model directory needs its tokenizer files")
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        else:
            tokenizer = load_converted(folder)
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:160]})") from error
    return tokenizer


def eos_id(tokenizer, eos_token: str | None = None) -> int:
    """Id of the token appended to every response: `eos_token` where set, else the tokenizer's own EOS."""
    if eos_token:
        token = tokenizer.backend_tokenizer.token_to_id(eos_token)
        if token is None:
            raise ConfigError(f"data.eos_token={eos_token!r} is not a token of the model's tokenizer")
        return token
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token; set data.eos_token to the token that ends a response")
    return tokenizer.eos_token_id


class Chat:
    """Renders and tokenises conversations with one tokenizer and one set of choices.

    strip_default_system: remove the system turn a ChatML template adds by itself when the data has none.
    train_turns: 'all' assistant turns of a conversation, only the 'last', or 'split': each as the last of a document.
    enable_thinking: passed to the template when not None. Then a response whose thinking contradicts the template is
    taken as intended: `pieces` names the mismatch and does not refuse it.
    """

    def __init__(
        self,
        tokenizer,
        *,
        eos_token: str | None = None,
        strip_default_system: bool = False,
        enable_thinking: bool | None = None,
        train_turns: str = "all",
    ):
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        self.strip_default_system = strip_default_system
        self.train_turns = train_turns
        self._options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        if "date_string" in str(tokenizer.chat_template):  # otherwise Llama's template would write today's date
            self._options["date_string"] = DATE
        backend = tokenizer.backend_tokenizer
        self._plain, self._literal = (Tokenizer.from_str(backend.to_str()) for _ in range(2))
        for one in (self._plain, self._literal):
            one.no_truncation()
            one.no_padding()
        self._literal.encode_special_tokens = True  # control tokens' text becomes ordinary text
        control = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special and t.content}
        self._control_ids = control
        pattern = "|".join(re.escape(text) for text in sorted(control, key=len, reverse=True))
        self._control = re.compile(f"({pattern})") if pattern else None
        own = self.turn_end_id if eos_token == CHAT_EOS else None
        self.eos_id = eos_id(tokenizer, None if eos_token == CHAT_EOS else eos_token) if own is None else own

    def key(self) -> str:
        """Changes with anything that changes the tokens: tokenizer, template, EOS, choices."""
        key = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        template = self.tokenizer.chat_template
        key.update(repr((template, self.tokenizer.special_tokens_map, self._options)).encode())
        key.update(repr((self.eos_id, self.strip_default_system, self.train_turns)).encode())
        return key.hexdigest()

    def encode(self, example: Example, where: str) -> Document:
        """Tokens and trained spans of one conversation; DataError naming `where` when the template refuses it."""
        return self.tokenise(self.pieces(example, where))

    def documents(self, example: Example) -> list[Example]:
        """What a row becomes: itself, or the conversation up to each trained turn (train_turns='split')."""
        return one_for_each_turn(example) if self.train_turns == "split" else [example]

    def pieces(self, example: Example, where: str) -> Rendered:
        """The conversation cut into template text and assistant turns.

        Raises DataError naming `where` when the template refuses the turns, rewrites earlier ones or leaves out a part
        of the data, and when a trained turn opens thinking again or thinks after the template closed it.

        While the template renders, a private-use character guards control-token text of the data. It tells that text
        from the template's own control tokens afterwards.
        """
        if example.text is not None:
            return self._text(example.text)
        talk = Conversation(self, example, where)
        turns = example.trainable if self.train_turns == "all" else example.trainable[-1:]
        pieces, done, found = [], "", None
        for turn in turns:
            prompt = talk.prompt(turn)
            if not prompt.startswith(done):
                raise DataError(
                    f"{where}: the chat template rewrites assistant turn {turns[turns.index(turn) - 1]} once later turns "
                    "follow (templates of thinking models drop the thinking); train with data.train_turns=last, or each "
                    "turn as a row of its own with data.split_turns=true"
                )
            whole = talk.says_more(turn)
            text = talk.rendered_turn(turn, turns[-1], prompt) if whole else talk.messages[turn]["content"]
            plain = text.replace(talk.guard, "") if talk.guard else text
            found = found or self._mismatch(prompt, plain, turn == len(talk.messages) - 1, turn, where)
            pieces.append(_Piece(prompt[len(done) :], False, talk.guard))
            pieces.append(_Piece(text, True, talk.guard, literal=not whole))
            done = prompt + text
        if not any(piece.text for piece in pieces if not piece.trained):
            raise DataError(f"{where}: the chat template renders no prompt, so every token would be trained")
        if turns[-1] < len(talk.messages) - 1:  # the last turns are not to be learnt, but the end of this one is
            pieces.append(_Piece(self.end_of_turn, False, ""))
        return Rendered(pieces, talk.control_text, found)

    def _text(self, text: str) -> Rendered:
        """A text that is trained as it is: its control tokens are control tokens."""
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.convert_ids_to_tokens(self.eos_id)
        starts = bos and not text.startswith(bos) and self._adds_bos
        text = (bos if starts else "") + text.removesuffix(eos)
        return Rendered([_Piece(text, True, "")], 0, None)

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer itself begins each text with its BOS."""
        return self.tokenizer.backend_tokenizer.encode("x").ids[:1] == [self.tokenizer.bos_token_id]

    @cached_property
    def start_of_turn(self) -> str:
        """The control token with which the template begins an assistant turn; '' where there is none."""
        turns = [{"role": "user", "content": "x"}]
        if not self.tokenizer.chat_template:
            return ""
        try:
            before, whole = (self.render(turns, "", add_generation_prompt=asks) for asks in (False, True))
        except DataError:
            return ""
        found = self._control.search(whole.removeprefix(before)) if self._control else None
        return found[0] if found else ""

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes after an assistant turn, without white space at the end; '' where it refuses or is none."""
        mark = "\ue000"
        if not self.tokenizer.chat_template:
            return ""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
        try:
            return self.render(turns, "", add_generation_prompt=False).rpartition(mark)[2].rstrip()
        except DataError:
            return ""

    @property
    def turn_end_id(self) -> int | None:
        """Id of the control token with which the template ends an assistant turn; None where there is none."""
        found = self._control.match(self.end_of_turn) if self._control else None
        return self._control_ids[found[0]] if found else None

    def prompt_thinking(self, prompt: str | list[dict[str, str]], where: str) -> str:
        """How the thinking stands at the end of a rendered prompt (`thinking.prompt_thinking`); a prompt that is a
        string is one user turn. Raises DataError naming `where` when the template refuses it.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return prompt_thinking(self.render(messages, where))

    def tokenise(self, rendered: Rendered) -> Document:
        """Token ids and spans of `pieces`. The tokenizers library does most of the work and releases Python's lock."""
        ids, spans, length = [], [], 0
        for piece in rendered.pieces:
            tokens = self._ids(piece)
            if piece.trained:  # through the token that comes next: the template's end of turn, or EOS
                spans.append((length, length + len(tokens) + 1))
            ids.append(tokens)
            length += len(tokens)
        ids.append(np.array([self.eos_id], np.int32))
        return Document(np.concatenate(ids), np.array(spans, np.int32).reshape(-1, 2), rendered.control_text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, control tokens shown."""
        return self.tokenizer.decode(list(map(int, tokens)), skip_special_tokens=False)

    def _mismatch(self, prompt: str, text: str, last: bool, turn: int, where: str) -> str | None:
        """Name of the mismatch between a turn's thinking and its prompt's; DataError for one that is refused."""
        name = mismatch(prompt_thinking(prompt), text)
        if name and MISMATCHES[name].refused and "enable_thinking" not in self._options:
            which = "the response" if last else f"assistant turn {turn}"
            raise DataError(f"{where}: {which} {MISMATCHES[name].what}; {MISMATCHES[name].fix}")
        return name

    def _ids(self, piece: _Piece) -> np.ndarray:
        if piece.literal:
            return _encode(self._literal, piece.text.replace(piece.guard, "") if piece.guard else piece.text)
        if not piece.guard:
            return _encode(self._plain, piece.text)
        ids = []
        for segment in self._control.split(piece.text):
            if segment in self._control_ids:
                ids.append(np.array([self._control_ids[segment]], np.int32))
            elif segment:
                ids.append(_encode(self._literal, segment.replace(piece.guard, "")))
        return np.concatenate(ids)

    def render(
        self, messages: list[dict[str, Any]], where: str, *, tools: Any = None, add_generation_prompt: bool = True
    ) -> str:
        """The template's text. Raises DataError naming `where` when it refuses the turns, ModelError where there is no
        template.
        """
        import jinja2

        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no chat template, as base models often have none, and "
                "only a column 'text' is trained without; add the instruct model's chat_template.jinja, or the "
                "'chat_template' entry of tokenizer_config.json"
            )

        if not self._knows("developer"):
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        options = self._options | ({"tools": tools} if tools else {})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False, **options
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            roles = ", ".join(str(turn.get("role")) for turn in messages)  # a prompt may come here unchecked
            why = " ".join(str(error).split())[:160]
            raise DataError(f"{where}: the model's chat template refuses the turns ({roles}): {why}") from error
        if self.strip_default_system and not tools and messages[0]["role"] != "system":  # with tools, it holds them
            text = _DEFAULT_SYSTEM.sub("", text, count=1) if _DEFAULT_SYSTEM.match(text) else text
        return text

    def thinking_key(self) -> str | None:
        """The name under which the template reads the thinking of a turn; None where it reads none."""
        return next((key for key in THINKING if self._knows(key)), None)

    def _knows(self, word: str) -> bool:
        return word in str(self.tokenizer.chat_template)

    def guard(self, texts: Sequence[str]) -> tuple[str, int]:
        """A character that none of the texts holds, and how many control-token texts they hold; '' where none."""
        count = sum(len(self._control.findall(text)) for text in texts) if self._control is not None else 0
        if not count:
            return "", 0
        return next(c for c in map(chr, range(0xF0000, 0xFFFFD)) if all(c not in text for text in texts)), count

    def guarded(self, text: str, guard: str) -> str:
        """The text with every control-token text broken by `guard`."""
        return self._control.sub(lambda match: match[0][0] + guard + match[0][1:], text)


def _encode(tokenizer, text: str) -> np.ndarray:
    # The batch call, unlike the single one, lets other Python threads run meanwhile.
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return np.array(encoding.ids, np.int32)
