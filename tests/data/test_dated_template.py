"""A chat template that writes today's date renders the same text on any day."""

import json

from jsft.data.chat import Chat, load_tokenizer
from jsft.data.examples import Example
from jsft.hf.random_model import byte_tokenizer

# As in Llama 3.1's template.
TEMPLATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{{- 'Today Date: ' + date_string + '\n' }}"
    "{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)


def test_the_date_is_the_templates_own_default(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    fields = {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    chat = Chat(load_tokenizer(tmp_path))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    document = chat.encode(Example(turns, 1.0), "row 0")
    assert chat.decode(document.tokens).startswith("Today Date: 26 Jul 2024\nuser: hi\nassistant: hello")
