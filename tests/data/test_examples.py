"""Bad rows: each with file, row, field and what to do."""

import math

import pytest

from jsft.data.examples import check_advantage, parse_row
from jsft.data.shapes import Shape
from jsft.errors import DataError

GOOD = {"message": [{"role": "user", "content": "2+2?"}], "response": "4", "advantage": 1.0}
OURS = Shape("ours", prompt="message", response="response", advantage="advantage")
CHAT = Shape("chat", messages="messages")


def parse(**changes):
    return parse_row(GOOD | changes, OURS, "x.parquet row 7")


def parse_chat(messages, **more):
    return parse_row({"messages": messages} | more, CHAT, "x row 0")


def turns(*roles):
    return [{"role": role, "content": f"turn {i}"} for i, role in enumerate(roles)]


def test_good_rows():
    assert parse().messages == [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert parse(message="2+2?") == parse()
    assert parse(advantage=2).advantage == parse(advantage=" 2e0 ").advantage == 2.0  # CSV has nothing but text
    assert [t["role"] for t in parse(message=turns("system", "user", "assistant", "user")).messages][-1] == "assistant"
    parse(message=[{"role": "system", "content": ""}, *turns("user")])  # an empty system turn means what it says
    parse(message=turns("user", "assistant", "tool", "tool"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"response": None}, "field 'response': is null"),
        ({"response": ""}, "field 'response': is empty"),
        ({"response": " \n\t"}, "field 'response': is blank"),
        ({"response": 4}, "field 'response': is a number where text is expected"),
        ({"response": "a\ud800b"}, r"field 'response': holds the lone surrogate '\\ud800' at character 1"),
        ({"message": None}, "field 'message': is null"),
        ({"message": []}, "field 'message': is empty"),
        ({"message": "  "}, "field 'message': is blank"),
        ({"message": 3}, "field 'message': is a number"),
        ({"message": ["hi"]}, r"field 'message\[0\]': expected \{role, content\}"),
        ({"message": [{"role": "user", "content": None}]}, r"field 'message\[0\]': is null"),
        ({"message": [{"role": "user", "content": ["part"]}]}, r"field 'message\[0\]': is a list"),
        (
            {"message": '[{"role": "user", "content": "hi"}]'},
            "field 'message': is a conversation written as JSON",
        ),
        (
            {"message": turns("human")},
            r"field 'message\[0\]': unknown role 'human'; use one of system, developer, user",
        ),
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
        ("one", ", field 'advantage': is a string"),
        (True, ", field 'advantage': is a boolean"),
        (..., ": no field 'advantage'"),
    ],
)
def test_bad_advantage_is_an_error_only_where_advantages_are_used(value, message):
    row = {name: one for name, one in (GOOD | {"advantage": value}).items() if one is not ...}
    assert math.isnan(parse_row(row, OURS, "x.parquet row 7").advantage)
    with pytest.raises(DataError, match="^x.parquet row 7" + message):
        check_advantage(row, "advantage", "x.parquet row 7")


def test_conversations():
    parse_it = parse_chat
    assert parse_it(turns("user", "assistant", "user", "assistant")).advantage == 1.0
    with pytest.raises(DataError, match="ends with a user turn; nothing to train on"):
        parse_it(turns("user", "assistant", "user"))
    with pytest.raises(DataError, match="roles out of order"):
        parse_it(turns("user", "assistant", "assistant"))
    with pytest.raises(DataError, match=r"field 'messages\[1\]': is blank"):
        parse_it([*turns("user"), {"role": "assistant", "content": " "}])


@pytest.mark.parametrize(
    "key, value", [("trainable", False), ("id", "x"), ("function_call", {"name": "f"}), ("score", 1.0), ("label", True)]
)
def test_a_turn_that_says_more_than_is_known_is_refused_by_name(key, value):
    marked = {"role": "assistant", "content": "5", key: value}
    for field, parse_it in (("messages[1]", parse_chat), ("message[1]", lambda m: parse(message=[*m, *turns("user")]))):
        with pytest.raises(DataError) as error:
            parse_it([*turns("user"), marked])
        assert f", field '{field}': its '{key}' would be lost; a turn may hold" in str(error.value)
    with pytest.raises(DataError, match=f"its '{key}' would be lost"):
        parse(response=marked)


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_a_turn_that_is_marked_with_0_is_not_trained(key, value):
    marked = [*turns("user"), {"role": "assistant", "content": "5", key: value}, *turns("user", "assistant")]
    example = parse_chat(marked)
    assert example.untrained == {1} and example.trainable == [3] and all(key not in m for m in example.messages)
    assert parse_chat([m | ({key: 1} if m["role"] == "assistant" else {key: 0}) for m in marked]).trainable == [1, 3]
    with pytest.raises(DataError, match="field 'messages': every assistant turn is marked as not to be learnt"):
        parse_chat(marked[:2])
    with pytest.raises(DataError, match=rf"field 'messages\[1\]': its '{key}' is 0.5; a turn's {key} is 0 or 1"):
        parse_chat([marked[0], marked[1] | {key: 0.5}])
    with pytest.raises(DataError, match=rf"field 'messages\[0\]': its '{key}' is 1, but only assistant turns"):
        parse_chat([marked[0] | {key: 1}, *turns("user", "assistant")[1:]])


def test_keys_that_say_nothing_pass():
    nothing = {
        "weight": None,
        "reasoning_content": "",
        "tool_calls": [],
        "function_call": {"name": None},
        "name": "Ada",
    }
    assert parse(message=[turn | nothing for turn in turns("user")]) == parse(message=turns("user"))


def test_parts_of_type_text_are_joined_and_others_refused_by_name():
    text = [{"type": "text", "text": "2+", "image_url": None}, {"type": "text", "text": "2?"}]
    assert parse(message=[{"role": "user", "content": text}]) == parse(message="2+2?")
    assert parse(response=[{"type": "text", "text": "4"}]) == parse()
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "image"}):
        with pytest.raises(DataError, match=f"holds a part of type '{part['type']}' .*jsft trains on text alone"):
            parse(message=[{"role": "user", "content": [*text, part]}])


def test_thinking_has_one_name_and_only_assistant_turns_have_it():
    for key in ("reasoning_content", "reasoning", "thinking"):
        (_, turn) = parse_chat([*turns("user"), {"role": "assistant", "content": "5", key: "hm"}]).messages
        assert turn == {"role": "assistant", "content": "5", "reasoning_content": "hm"}
    with pytest.raises(DataError, match="reasoning_content and thinking differ"):
        parse_chat([*turns("user"), turn | {"thinking": "oh"}])
    with pytest.raises(DataError, match=r"field 'messages\[0\]': its 'thinking' would be lost; only an assistant turn"):
        parse_chat([{"role": "user", "content": "a", "thinking": "hm"}, turn])


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "description": None}}}


def test_tools_and_their_calls_are_read_from_objects_and_from_json_text():
    import json

    talk = [
        *turns("user"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "It is 3."},
    ]
    example = parse_chat(talk, tools=json.dumps([TOOL]))
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}
    assert example.messages[1]["content"] == "" and example.messages[2]["tool_call_id"] == "c1"
    assert example.tools == [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    assert parse_chat(talk, tools=[TOOL]) == example and parse_chat(talk, tools="[]").tools is None
    for tools, message in (("[", "is not valid JSON"), ([{"x": 1}], "expected a list of {type, function")):
        with pytest.raises(DataError, match=f"x row 0, field 'tools': {message}"):
            parse_chat(talk, tools=tools)
    for calls, message in (([{"id": 1}], "expected a list of"), ([{"name": "f", "arguments": "{"}], "not valid JSON")):
        with pytest.raises(DataError, match=f"x row 0, field 'messages.1..tool_calls.*{message}"):
            parse_chat([talk[0], talk[1] | {"tool_calls": calls}])


def test_nulls_that_a_parquet_file_adds_to_tools_and_calls_are_left_out(tmp_path):
    from jsft.data.sources import open_source
    from tests.data.helpers import write_rows

    calls = [[{"function": {"name": "f", "arguments": {key: 1}}}] for key in ("a", "b")]
    rows = [{"messages": [*turns("user"), {"role": "assistant", "content": "", "tool_calls": one}]} for one in calls]
    found = [parse_row(row, CHAT, "x") for _, row in open_source(write_rows(tmp_path / "x.parquet", rows)).rows()]
    assert [example.messages[1]["tool_calls"] for example in found] == calls


def test_a_system_column_comes_first_and_only_once():
    example = parse_chat(turns("user", "assistant"), system="Be brief.")
    assert example.messages[0] == {"role": "system", "content": "Be brief."}
    assert parse_chat(turns("user", "assistant"), system=None) == parse_chat(turns("user", "assistant"))
    with pytest.raises(DataError, match="has a system turn and a column 'system'"):
        parse_chat(turns("system", "user", "assistant"), system="Be brief.")


def test_sharegpt_turns_are_read_as_roles():
    talk = [
        ("human", "a"),
        ("function_call", '{"name": "add", "arguments": {"a": 1}}'),
        ("observation", "1"),
        ("gpt", "b"),
    ]
    example = parse_chat([{"from": who, "value": text, "weight": None} for who, text in talk])
    assert [turn["role"] for turn in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}]
    with pytest.raises(DataError, match=r"field 'messages\[0\]': unknown speaker 'me' in 'from'; use one of human"):
        parse_chat([{"from": "me", "value": "a"}])


def test_a_row_without_a_column():
    with pytest.raises(DataError, match=r"x row 0: no field 'response' \(has message\)"):
        parse_row({"message": "hi"}, OURS, "x row 0")
