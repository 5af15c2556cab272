"""A document as the model sees it, trained span marked: what a run prints before it starts."""

from rich.text import Text

from jsft.data.chat import Chat
from jsft.data.documents import Documents

OPEN, CLOSE = "⟦", "⟧"  # marks of the trained span where there is no colour


def marked_text(chat: Chat, documents: Documents, index: int, *, width: int | None = None) -> Text:
    """The decoded document with trained spans coloured and in brackets; control tokens and EOS shown as text.

    width: of each run of trained or untrained text, only the first and last characters, this many in all.
    """
    tokens, text, place = documents.tokens(index), Text(), 0
    for start, end in [*documents.spans(index).tolist(), (len(tokens), len(tokens))]:
        text.append(_shortened(chat.decode(tokens[place:start]), width), style="dim")
        if end > start:
            text.append(OPEN + _shortened(chat.decode(tokens[start:end]), width) + CLOSE, style="bold green")
        place = end
    return text


def heading(documents: Documents, index: int) -> str:
    """File, row, and how many tokens are trained."""
    total, trained = int(documents.lengths[index]), int(documents.supervised[index])
    cut = ", cut" if documents.whole_lengths[index] > total else ""
    text = f"{documents.where(index)}: {total} tokens{cut}, {trained} trained ({trained / total:.0%})"
    return text + (f", mean weight {documents.weight_sum(index) / trained:.3g}" if documents.weighted else "")


def render_document(chat: Chat, documents: Documents, index: int, *, width: int | None = 600) -> Text:
    """Heading and marked text."""
    return Text(heading(documents, index) + "\n").append(marked_text(chat, documents, index, width=width))


def _shortened(text: str, width: int | None) -> str:
    if width is None or len(text) <= width:
        return text
    return f"{text[: width // 2]} …[{len(text) - width} characters]… {text[-(width // 2) :]}"
