"""Conversations whose turns say more than text: what is trained is the template's own text, whole or refused."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsft.data.chat import Chat, load_tokenizer
from jsft.data.examples import parse_row
from jsft.data.shapes import Shape
from jsft.errors import DataError
from tests.data.helpers import CHATML, write_tokenizer

CHAT = Shape("chat", messages="messages")
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def example(*messages, **columns):
    return parse_row({"messages": list(messages)} | columns, CHAT, "x row 0")


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


def call(**arguments):
    return [{"function": {"name": "add", "arguments": arguments}}]


def trained(chat, document):
    return [chat.decode(document.tokens[start:end]) for start, end in document.spans]


@pytest.fixture(scope="module")
def qwen3(qwen3_tokenizer):
    return Chat(qwen3_tokenizer)


@pytest.fixture(scope="module")
def split(qwen3):
    chat = copy.copy(qwen3)  # of a second tokenizer, made in seconds, nothing would be different
    chat.train_turns = "split"
    return chat


@pytest.fixture(scope="module")
def plain(tiny_model):
    return Chat(load_tokenizer(tiny_model))


AGENT = (
    user("2+2?"),
    assistant("", reasoning_content="I should add.", tool_calls=call(a=2, b=2)),
    {"role": "tool", "content": "4"},
    assistant("It is 4.", reasoning_content="The tool says 4."),
)


def test_tools_calls_and_thinking_are_rendered_and_trained(qwen3):
    document = qwen3.encode(example(*AGENT, tools=[TOOL]), "x")
    first, last = trained(qwen3, document)
    assert first == (
        "<think>\nI should add.\n</think>\n\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    )
    assert last == "<think>\nThe tool says 4.\n</think>\n\nIt is 4.<|im_end|>"
    assert '"description": "Adds."' in qwen3.decode(document.tokens)


def whole_text(chat, one):
    """The template's own text of a conversation, through the token that ends it."""
    text = chat.tokenizer.apply_chat_template(one.messages, tools=one.tools, tokenize=False)
    return text[: text.rindex("<|im_end|>")] + "<|im_end|>"


words = st.text(st.sampled_from("ab \n<>é🙂{}\"'\\"), max_size=12)
spelt = words.filter(lambda text: text.strip())
thinking_turn = st.builds(lambda text, thought: assistant(text, reasoning_content=thought), spelt, spelt)
calling_turn = st.builds(
    lambda text, thought, value: assistant(text, reasoning_content=thought, tool_calls=call(a=value)),
    words,
    spelt,
    words,
)


@settings(max_examples=60, deadline=None)
@given(
    question=spelt, steps=st.lists(st.tuples(calling_turn, words), max_size=3), last=thinking_turn, tools=st.booleans()
)
def test_prompts_and_spans_are_together_the_template_s_own_text(qwen3, question, steps, last, tools):
    turns = [turn for calling, result in steps for turn in (calling, {"role": "tool", "content": result})]
    one = example(user(question), *turns, last, **({"tools": [TOOL]} if tools else {}))
    document = qwen3.encode(one, "x")
    assert qwen3.decode(document.tokens) == whole_text(qwen3, one)
    assert len(document.spans) == len(one.trainable)
    for span, turn in zip(trained(qwen3, document), one.trainable):
        assert span.startswith("<think>\n") and span.endswith("<|im_end|>")
        assert one.messages[turn]["content"].strip() in span


@settings(max_examples=30, deadline=None)
@given(turns=st.lists(st.tuples(spelt, thinking_turn), min_size=1, max_size=3))
def test_split_turns_are_each_the_template_s_own_text(split, turns):
    one = example(*(turn for question, answer in turns for turn in (user(question), answer)))
    documents = split.documents(one)
    assert len(documents) == len(turns)
    for part in documents:
        document = split.encode(part, "x")
        (span,) = trained(split, document)
        assert split.decode(document.tokens) == whole_text(split, part) and span.startswith("<think>\n")


def test_thinking_that_the_template_drops_is_refused_with_the_fix(qwen3, split):
    talk = [user("a"), assistant("b", reasoning_content="hm"), user("c"), assistant("d", reasoning_content="oh")]
    with pytest.raises(
        DataError, match=r"x: the chat template drops the thinking of assistant turn 1 .*split_turns=true"
    ):
        qwen3.encode(example(*talk), "x")
    written = [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("d")]
    with pytest.raises(DataError, match="x: the chat template rewrites assistant turn 1 .*data.split_turns=true"):
        qwen3.encode(example(*written), "x")
    assert [len(split.encode(one, "x").spans) for one in split.documents(example(*written))] == [1, 1]


def test_parts_that_a_template_does_not_know_are_refused_by_name(plain):
    for talk, columns, what in (
        ([user("a"), assistant("b")], {"tools": [TOOL]}, "the tools; take a model whose template has tools"),
        ([user("a"), assistant("b", thinking="hm")], {}, r"the thinking .reasoning_content. of turn 1; write '<think>"),
        (
            [user("a"), assistant("b", tool_calls=call(a=1))],
            {},
            "the tool calls of turn 1; write them into the content",
        ),
    ):
        with pytest.raises(DataError, match=f"x: the model's chat template leaves out {what}"):
            plain.encode(example(*talk, **columns), "x")


def test_a_prompt_that_the_template_contradicts_is_refused(tmp_path):
    template = CHATML.replace("m.content", "(m.thinking ~ '|' if m.thinking else '') + m.content").replace(
        "assistant\n' }}", "assistant\n<think>' }}"
    )
    chat = Chat(load_tokenizer(write_tokenizer(tmp_path / "m", template)))
    with pytest.raises(DataError, match="x: the chat template writes assistant turn 1 otherwise than it asks for it"):
        chat.encode(example(user("a"), assistant("b", thinking="hm")), "x")


def test_a_turn_with_another_end_is_refused(tmp_path):
    """Llama 3.1 ends calls of its built-in tools with another token than turns."""
    ends = "m.content + ('add<|endoftext|>' if m.tool_calls else '<|im_end|>') + '\n'"
    template = CHATML.replace("m.content + '<|im_end|>\n'", ends.replace("\n", "\\n"))
    template = CHATML.replace("m.content + '<|im_end|>\n'", ends) if template == CHATML else template
    chat = Chat(
        load_tokenizer(write_tokenizer(tmp_path / "m", template.replace("raise_exception('no tools here')", "''")))
    )
    talk = [user("a"), assistant("", tool_calls=call(a=1)), {"role": "tool", "content": "1"}, assistant("b")]
    with pytest.raises(DataError, match="x: the chat template ends assistant turn 1 otherwise than with '<|im_end|>'"):
        chat.encode(example(*talk), "x")


def test_a_system_turn_that_holds_the_tools_is_not_stripped_as_the_default(tmp_path):
    tools = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", tools + CHATML))
    document = Chat(tokenizer, strip_default_system=True).encode(example(user("a"), assistant("b"), tools=[TOOL]), "x")
    assert '"description": "Adds."' in tokenizer.decode(document.tokens)


def test_a_turn_that_is_marked_is_read_and_not_trained(plain):
    talk = [user("a"), assistant("b"), user("c"), assistant("d", weight=0), user("e"), assistant("f")]
    document = plain.encode(example(*talk), "x")
    assert trained(plain, document) == ["b<|im_end|>", "f<|im_end|>"] and "d<|im_end|>" in plain.decode(document.tokens)
    document = plain.encode(example(*talk[:4]), "x")
    assert trained(plain, document) == ["b<|im_end|>"]
    assert plain.decode(document.tokens).endswith("assistant\nb<|im_end|><|im_end|>")


def test_a_developer_turn_is_a_system_turn_where_the_template_knows_no_other(plain, tmp_path):
    talk = [{"role": "developer", "content": "Be brief."}, user("a"), assistant("b")]
    assert plain.decode(plain.encode(example(*talk), "x").tokens).startswith("<|im_start|>system\nBe brief.")
    knows = Chat(load_tokenizer(write_tokenizer(tmp_path / "m", "{# developer #}" + CHATML)))
    assert knows.decode(knows.encode(example(*talk), "x").tokens).startswith("<|im_start|>developer\nBe brief.")


def test_control_tokens_in_thinking_and_calls_are_text(qwen3):
    talk = [
        user("a <|im_end|>"),
        assistant("b", reasoning_content="hm <|im_end|> <|im_start|>", tool_calls=call(x="<|im_end|>")),
    ]
    document = qwen3.encode(example(*talk), "x")
    assert document.control_text == 4
    assert document.tokens.tolist().count(151645) == 2  # of the user's turn, and EOS
    assert trained(qwen3, document)[0].count("<|im_end|>") == 3


def test_text_is_trained_whole_and_its_control_tokens_are_tokens(plain):
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo"
    document = plain.encode(parse_row({"text": text}, Shape("text", text="text"), "x"), "x")
    assert document.tokens.tolist().count(257) == 2 and document.spans.tolist() == [[0, len(document.tokens)]]
    again = plain.encode(parse_row({"text": text + "<|im_end|>"}, Shape("text", text="text"), "x"), "x")
    assert again.tokens.tolist() == document.tokens.tolist()  # one EOS
