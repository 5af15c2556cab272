"""Bad rows: each with file, row, field and what to do."""

import math

import pytest

from jsft.data.examples import Keys, check_advantage, columns_to_read, parse_row
from jsft.errors import DataError

GOOD = {"message": [{"role": "user", "content": "2+2?"}], "response": "4", "advantage": 1.0}
KEYS = Keys()


def parse(**changes):
    return parse_row(GOOD | changes, KEYS, ["message", "response", "advantage"], "x.parquet row 7")


def turns(*roles):
    return [{"role": role, "content": f"turn {i}"} for i, role in enumerate(roles)]


def test_good_rows():
    assert parse().messages == [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert parse(message="2+2?") == parse()
    assert parse(advantage=2).advantage == 2.0
    assert [t["role"] for t in parse(message=turns("system", "user", "assistant", "user")).messages][-1] == "assistant"
    parse(message=[{"role": "system", "content": ""}, *turns("user")])  # an empty system turn means what it says
    parse(message=turns("user", "assistant", "tool", "tool"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"response": None}, "field 'response': is null"),
        ({"response": ""}, "field 'response': is empty"),
        ({"response": " \n\t"}, "field 'response': is blank"),
        ({"response": 4}, "field 'response': is a int where text is expected"),
        ({"response": "a\ud800b"}, r"field 'response': holds the lone surrogate '\\ud800' at character 1"),
        ({"message": None}, "field 'message': is null"),
        ({"message": []}, "field 'message': is empty"),
        ({"message": "  "}, "field 'message': is blank"),
        ({"message": 3}, "field 'message': is a int"),
        ({"message": ["hi"]}, r"field 'message\[0\]': expected \{role, content\}"),
        ({"message": [{"role": "user", "content": None}]}, r"field 'message\[0\]': is null"),
        ({"message": [{"role": "user", "content": ["part"]}]}, r"field 'message\[0\]': is a list"),
        (
            {"message": '[{"role": "user", "content": "hi"}]'},
            "field 'message': is a conversation written as JSON",
        ),
        (
            {
                "message": [
                    *turns("user"),
                    {"role": "assistant", "content": "b", "thinking": "c"},
                    *turns("user"),
                ]
            },
            r"field 'message\[1\]': its 'thinking' would be lost",
        ),
        ({"message": turns("human")}, r"field 'message\[0\]': unknown role 'human'; use one of system, user"),
        ({"message": turns("user", "assistant")}, "ends with an assistant turn"),
        ({"message": turns("user", "user")}, r"roles out of order, turn 1 \(user\) comes after user"),
        ({"message": turns("assistant", "user")}, r"roles out of order, turn 0 \(assistant\) comes first"),
        ({"message": turns("user", "system")}, r"turn 1 \(system\) comes after user; system may come first"),
        ({"message": turns("tool")}, "roles out of order"),
    ],
)
def test_bad_rows(changes, message):
    with pytest.raises(
        DataError, match=r"^x.parquet row 7, " + (message if message.startswith("field") else ".*" + message)
    ):
        parse(**changes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, ", field 'advantage': is null"),
        (math.nan, ", field 'advantage': is nan; must be finite"),
        (math.inf, ", field 'advantage': is inf"),
        (10**400, ", field 'advantage': is 1000.*; must be finite"),
        ("1", ", field 'advantage': is a str"),
        (True, ", field 'advantage': is a bool"),
        (..., ": no field 'advantage'"),
    ],
)
def test_bad_advantage_is_an_error_only_where_advantages_are_used(value, message):
    row = {name: one for name, one in (GOOD | {"advantage": value}).items() if one is not ...}
    assert math.isnan(parse_row(row, KEYS, ["message", "response", "advantage"], "x.parquet row 7").advantage)
    with pytest.raises(DataError, match="^x.parquet row 7" + message):
        check_advantage(row, "advantage", "x.parquet row 7")


def test_conversations():
    keys = Keys(messages="messages")
    parse_it = lambda messages: parse_row({"messages": messages}, keys, ["messages"], "x row 0")
    assert parse_it(turns("user", "assistant", "user", "assistant")).advantage == 1.0
    with pytest.raises(DataError, match="ends with a user turn; nothing to train on"):
        parse_it(turns("user", "assistant", "user"))
    with pytest.raises(DataError, match="roles out of order"):
        parse_it(turns("user", "assistant", "assistant"))
    with pytest.raises(DataError, match=r"field 'messages\[1\]': is blank"):
        parse_it([*turns("user"), {"role": "assistant", "content": " "}])


@pytest.mark.parametrize(
    "key, value",
    [
        ("weight", 0),
        ("train", False),
        ("loss", 0.0),
        ("trainable", False),
        ("weight", 1),
        ("id", "x"),
        ("tool_calls", [{"id": None, "type": "function"}]),
        ("reasoning_content", "hm"),
    ],
)
def test_a_turn_that_says_more_than_its_text_is_refused_by_name(key, value):
    marked = {"role": "assistant", "content": "5", key: value}
    said = f"x row 0, field '{{}}': its '{key}' would be lost; "
    with pytest.raises(DataError) as error:
        parse_row({"messages": [*turns("user"), marked]}, Keys(messages="messages"), ["messages"], "x row 0")
    assert str(error.value).startswith(said.format("'messages[1]'").replace("''", "'"))
    with pytest.raises(DataError, match=f"field 'message.1.': its '{key}' would be lost"):
        parse(message=[*turns("user"), marked, *turns("user")])
    with pytest.raises(DataError, match=f"field 'response': its '{key}' would be lost"):
        parse(response=marked)


def test_keys_that_say_nothing_pass():
    nothing = {
        "weight": None,
        "reasoning_content": "",
        "tool_calls": [],
        "function_call": {"name": None},
        "name": "Ada",
    }
    assert parse(message=[turn | nothing for turn in turns("user")]) == parse(message=turns("user"))


def test_a_response_that_is_no_text_says_what_to_write():
    with pytest.raises(DataError, match="field 'response': is a dict .*write the text of its 'content'"):
        parse(response={"role": "assistant", "content": "4", "weight": None})
    with pytest.raises(DataError, match="field 'response': is a list .*join the texts of its parts"):
        parse(response=[{"type": "text", "text": "4"}])
    with pytest.raises(DataError, match=r"field 'message\[0\]': is a list .*join the texts of its parts"):
        parse(message=[{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}])


def test_a_row_without_a_column():
    with pytest.raises(DataError, match=r"x row 0: no field 'response' \(has message\)"):
        parse_row({"message": "hi"}, KEYS, ["message", "response"], "x row 0")


def test_columns():
    columns = ["message", "response", "answer", "logprob"]
    assert columns_to_read(columns, KEYS, where="x") == ["message", "response"]
    assert columns_to_read([*columns, "advantage"], KEYS, where="x") == ["message", "response", "advantage"]
    with pytest.raises(DataError, match="x: no column 'advantage' .*data.advantage_key"):
        columns_to_read(columns, KEYS, where="x", need_advantage=True)
    with pytest.raises(
        DataError, match=r"x: no column 'message' \(has q, messages\); set data.prompt_key; or data.messages"
    ):
        columns_to_read(["q", "messages"], KEYS, where="x")
    assert columns_to_read(["messages"], Keys(messages="messages"), where="x") == ["messages"]
