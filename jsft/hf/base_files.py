"""What a model directory holds besides weights: config, tokenizer, chat template, generation config, custom code.

An export copies them byte for byte, except for what the training changed: dtype, stop token, chat template.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from jsft.errors import ModelError
from jsft.hf.tokenizer import add_fast_tokenizer

_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")
_NAMES = ("LICENSE", "NOTICE", "COPYING")  # with or without a suffix
_REWRITTEN = ("config.json", "generation_config.json", "tokenizer_config.json")
_DTYPE = re.compile(r'("(?:torch_)?dtype"\s*:\s*)"[^"]*"')


def base_files(model_dir: str | Path) -> list[Path]:
    """The files that go with an export: all of the directory's own except weights, model card and hidden files.

    A link is followed only to a file of the same directory or to a blob of a hub cache: the content of any other file
    would leave with the export, and a broken link would be left out of it. Raises ModelError for such a link, and for a
    file that an export must rewrite but cannot read.
    """
    found = []
    try:
        files = sorted(Path(model_dir).iterdir())
    except OSError as error:
        raise ModelError(f"{model_dir} cannot be read: {error.strerror}; give a directory as model.path") from error
    for file in files:
        named = file.stem.upper().startswith(_NAMES)
        if file.name.startswith(".") or file.name.endswith(".index.json") or not (file.suffix in _SUFFIXES or named):
            continue
        if file.is_symlink():
            _check_link(file)
        if not file.is_file():
            continue
        if file.name in _REWRITTEN:
            _read_json(file)
        found.append(file)
    return found


def _check_link(link: Path) -> None:
    """Raises ModelError unless the link leads to a file of the same directory or to a blob of a hub cache."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ModelError(
            f"{link} is a link to {link.readlink()}, which is not there; download the file again"
        ) from error
    blob = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    sibling = target.parent == link.parent.resolve() and not target.name.startswith(".")
    if not target.is_file() or not (blob or sibling):
        raise ModelError(
            f"{link} is a link to {target}, which is no file of this model; its content would go into every export: "
            f"put a copy of the file in its place, or remove the link"
        )


def exported_names(model_dir: str | Path) -> set[str]:
    """Names of the files that an export with this base model may hold, without weights and model card."""
    made = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    return {file.name for file in base_files(model_dir)} | made


def copy_base_files(base_dir: str | Path, out_dir: str | Path) -> None:
    """Copies everything except weights and model card from `base_dir` to the existing `out_dir`.

    A directory with only a sentencepiece tokenizer.model gets a tokenizer.json made from it. Raises ModelError when
    config.json or the tokenizer is missing or a link leads elsewhere, OSError when the disk refuses.
    """
    base_dir, out_dir = Path(base_dir), Path(out_dir)
    if not (base_dir / "config.json").is_file():
        raise ModelError(f"{base_dir} has no config.json to export with the weights")
    for file in base_files(base_dir):
        shutil.copyfile(file, out_dir / file.name)
    add_fast_tokenizer(out_dir)


def set_dtype(config_file: Path, dtype: str) -> None:
    """States the weights' dtype in config.json, changing nothing else of its text."""
    text = config_file.read_text(encoding="utf-8")
    changed, count = _DTYPE.subn(rf'\g<1>"{dtype}"', text)
    if not count:  # the base model states no dtype
        _write_json(config_file, _read_json(config_file) | {"torch_dtype": dtype})
    elif changed != text:
        config_file.write_text(changed, encoding="utf-8")


def stop_tokens(model_dir: Path) -> list[int]:
    """Ids of generation_config.json's stop tokens; of config.json's where there is no such file, as engines do."""
    file = model_dir / "generation_config.json"
    ids = _read_json(file if file.is_file() else model_dir / "config.json").get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def ensure_stop_token(out_dir: Path, token_id: int) -> str | None:
    """Makes `token_id`, the token that ended the trained responses, a stop token of generation_config.json.

    Returns what was changed, in words, or None where it was a stop token already.
    """
    file = out_dir / "generation_config.json"
    existed = file.is_file()
    config, ids = _read_json(file) if existed else {}, stop_tokens(out_dir)
    if existed and token_id in ids:
        return None
    if token_id not in ids:
        ids = [*ids, token_id]
    config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    _write_json(file, config)
    if not existed:
        return f"the base model has no generation_config.json: one with eos_token_id {config['eos_token_id']} was made"
    return f"token {token_id}, which ends the trained responses, was added to generation_config.json's eos_token_id"


def trained_template(template: str, strip_default_system: bool = False, enable_thinking: bool | None = None) -> str:
    """The chat template that renders, without options, what the training rendered with these two choices.

    strip_default_system: cuts off the system turn that a ChatML template adds to a conversation without one.
    enable_thinking: becomes the default of the template's variable of that name.
    """
    if enable_thinking is not None:
        value = "true" if enable_thinking else "false"
        default = f"{{%- if enable_thinking is not defined %}}{{%- set enable_thinking = {value} %}}{{%- endif -%}}\n"
        template = default + template
    if strip_default_system:
        template = (
            "{%- set rendered -%}\n" + template + "\n{%- endset -%}\n"
            "{%- if messages[0]['role'] != 'system' and rendered.startswith('<|im_start|>system\\n') -%}\n"
            "{{- rendered.split('<|im_end|>\\n', 1)[1] -}}\n"
            "{%- else -%}\n{{- rendered -}}\n{%- endif -%}"
        )
    return template


def run_template(
    model_dir: Path, strip_default_system: bool = False, enable_thinking: bool | None = None
) -> str | None:
    """`trained_template` of the directory's template, or None where it has none."""
    template = read_template(model_dir)
    return None if template is None else trained_template(template, strip_default_system, enable_thinking)


def read_template(model_dir: Path) -> str | None:
    """The directory's chat template: chat_template.jinja, else tokenizer_config.json's; of several, the default."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = model_dir / "tokenizer_config.json"
    template = _read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def write_template(out_dir: Path, template: str) -> None:
    """Writes `template` wherever the directory has its chat template (in both places, where it has both)."""
    config = out_dir / "tokenizer_config.json"
    fields = _read_json(config) if config.is_file() else {}
    file = out_dir / "chat_template.jinja"
    if "chat_template" in fields:
        fields["chat_template"] = template
        _write_json(config, fields)
    if file.is_file() or "chat_template" not in fields:
        file.write_text(template, encoding="utf-8")


def _write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")  # a lone surrogate stays JSON's escape


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}, not an object")
    return value
