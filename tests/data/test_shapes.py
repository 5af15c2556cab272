"""Which columns hold what: the shapes that are recognised, and what is refused because it is not clear."""

import pytest

from jsft.data.examples import parse_row
from jsft.data.shapes import Keys, read_columns, recognise
from jsft.errors import ConfigError, DataError


def shape_of(*columns, need_advantage=False, **keys):
    return recognise(columns, Keys(**keys), where="x", need_advantage=need_advantage)


def messages(row, **keys):
    return parse_row(row, shape_of(*row, **keys), "x row 0").messages


PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"message": "q", "response": "a"}, "message + response"),
        ({"message": "q", "response": "a", "messages": PAIR, "text": "t"}, "message + response"),
        ({"messages": PAIR, "prompt": "q", "prompt_id": "7"}, "messages"),
        ({"prompt": "q", "completion": "a"}, "prompt + completion"),
        ({"prompt": PAIR[:1], "completion": PAIR[1:]}, "prompt + completion"),
        ({"prompt": "q", "response": "a"}, "prompt + response"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "conversations"),
        ({"conversations": PAIR, "source": "s"}, "conversations"),
        ({"instruction": "q", "output": "a"}, "instruction + output"),
        ({"instruction": "q", "input": "", "output": "a", "history": []}, "instruction + output"),
        ({"question": "q", "answer": "a"}, "question + answer"),
    ],
)
def test_known_shapes_are_the_same_conversation(row, name):
    assert messages(row) == PAIR and shape_of(*row).name == name


def test_text_is_a_document_without_turns():
    example = parse_row({"text": "t"}, shape_of("text", "id"), "x row 0")
    assert example.text == example.response == "t" and example.messages == []


def test_an_alpaca_input_follows_the_instruction_and_a_history_is_refused():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    assert [turn["content"] for turn in messages(row)] == ["Be brief.", "Add.\n\n2, 2", "4"]
    with pytest.raises(DataError, match="x row 0: its 'history' would be lost"):
        messages(row | {"history": [["a", "b"]]})


def test_only_the_completion_of_a_chat_is_trained():
    row = {"prompt": [*PAIR, PAIR[0]], "completion": PAIR[1:]}
    assert parse_row(row, shape_of(*row), "x").trainable == [3]
    row = {"message": row["prompt"], "response": "a"}
    assert parse_row(row, shape_of(*row), "x").trainable == [1, 3]


def test_columns_that_fit_several_shapes_are_refused_with_the_choices():
    with pytest.raises(DataError) as error:
        shape_of("instruction", "input", "output", "text")
    assert (
        "read in 2 ways (has instruction, input, output, text); set data.columns=instruction,output,input or "
        in str(error.value)
    )
    chosen = shape_of("instruction", "input", "output", "text", columns=read_columns("instruction,output,input"))
    assert chosen.name == "instruction + output"
    assert shape_of("instruction", "output", "text", columns=read_columns(["text"])).name == "text"


@pytest.mark.parametrize(
    "given", ["prompt=q,response=a", {"prompt": "q", "response": "a"}, '{"prompt": "q", "response": "a"}']
)
def test_data_columns_says_what_columns_hold(given):
    assert messages({"q": "q", "a": "a", "text": "t"}, columns=read_columns(given)) == PAIR


@pytest.mark.parametrize("given", ["prompt=q", "text=a,messages=b", "text=a,prompt=b,response=c"])
def test_data_columns_names_a_whole_shape(given):
    with pytest.raises(ConfigError, match="name prompt and response, or messages, or text alone"):
        shape_of("a", "b", "c", "q", columns=read_columns(given))


def test_wrong_data_columns_are_one_line():
    for given in ({"answers": "a"}, "promt=a,response=b", {"prompt": 5}):
        with pytest.raises(ConfigError, match="data.columns=.*write WHAT=COLUMN with one of prompt, response"):
            read_columns(given)
    with pytest.raises(DataError, match=r"x: no column 'b' \(has a\); set data.columns"):
        shape_of("a", columns=read_columns("prompt=a,response=b"))


def test_unknown_columns_say_how_to_name_them():
    for columns, named in {
        ("problem", "solution"): "prompt=problem,response=solution, or messages=COLUMN",
        ("Question", "Answer"): "prompt=Question,response=Answer",
        ("instruction", "context", "response"): "prompt=instruction,response=response,input=context",
        ("message", "reply"): "prompt=message,response=COLUMN",
        ("id", "dialogue"): "prompt=COLUMN,response=COLUMN, or messages=dialogue",
    }.items():
        with pytest.raises(DataError, match=rf"x: no known columns \(has {', '.join(columns)}\); .*columns={named}"):
            shape_of(*columns)


def test_a_short_answer_beside_a_full_response_is_not_taken_silently():
    for columns, other in {
        ("question", "answer", "response"): "prompt=question,response=response",
        ("question", "solution", "answer"): "prompt=question,response=solution",
        ("instruction", "input", "output", "response"): "prompt=instruction,response=response,input=input",
    }.items():
        with pytest.raises(DataError, match=f"x: its columns can be read in 2 ways .* or data.columns={other}$"):
            shape_of(*columns)
        assert shape_of(*columns, columns=read_columns(other)).response == other.split("=")[2].split(",")[0]
    assert shape_of("question", "answer", "response", columns=("question", "answer")).response == "answer"
    assert shape_of("prompt", "response", "answer").response == "response"


def test_fields_come_before_recognition():
    assert shape_of("chat", "text", messages="chat").messages == "chat"
    assert shape_of("q", "response", "text", prompt="q").required == ("q", "response")
    with pytest.raises(DataError, match=r"x: no column 'q' \(has message, response\); set data.prompt_key"):
        shape_of("message", "response", prompt="q")


def test_advantages_are_read_where_there_are_some():
    assert shape_of("message", "response", "advantage").reads(["advantage"]) == ["message", "response", "advantage"]
    assert shape_of("message", "response").advantage is None
    with pytest.raises(DataError, match="x: no column 'advantage' .*data.advantage_key"):
        shape_of("message", "response", need_advantage=True)


def test_columns_of_images_are_refused_by_name():
    with pytest.raises(DataError, match="x: holds the column 'images', .*set data.columns=messages,tools"):
        shape_of("messages", "images", "tools")
    assert shape_of("messages", "images", columns=("messages",)).name == "messages"


def test_token_caches_of_earlier_versions_keep_their_key():
    columns = ["message", "response", "advantage", "logprob"]
    assert shape_of(*columns).key(columns) == ("message", "response", "advantage")
    assert shape_of("messages").key(["messages"]) == ("messages",)
    assert (
        len({shape_of(*c).key(c) for c in (("text",), ("messages",), ("messages", "tools"), ("messages", "system"))})
        == 4
    )
