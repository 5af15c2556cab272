"""The README.md of an exported model: front matter that the hub reads, recipe, hyperparameters, scores, usage."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsft import config as schema

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT_LICENSE = re.compile(r"^license:\s*([\w.-]+)\s*$", re.MULTILINE)
# Fields whose value the card always gives; of all others those that differ from the default.
_ALWAYS = (
    "train.epochs",
    "train.global_batch",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_ratio",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "objective.name",
    "data.max_length",
    "precision.params",
    "precision.compute",
    "train.seed",
    "fidelity",
)
# Fields that say where a run was, not what it did. Paths of a machine are nobody's business.
_LEFT_OUT = re.compile(r"model\.|data\.(train|eval|cache_dir|workers)|checkpoint\.|log\.|eval\.|train\.\w+_seconds")


class Score(NamedTuple):
    """One benchmark of the exported step, in words."""

    task: str
    metric: str
    value: str
    base: str  # the base model's


class Facts(NamedTuple):
    """What a card says."""

    run: str
    step: int
    config: dict[str, Any]  # flat: dotted names and values
    family: str
    license: str | None
    eos: str
    dtype: str
    code: str  # what trained and what exported it
    scores: Sequence[Score] = ()
    repository: str | None = None  # the hub id that it goes to
    chats: bool = True  # whether its tokenizer has a chat template


def model_card(facts: Facts) -> str:
    """The card as Markdown."""
    config, base = facts.config, str(facts.config.get("model.path"))
    base_name = base if is_hub_id(base) else Path(base).name
    data = [name if is_hub_id(name) else Path(name).name for name in data_names(config.get("data.train"))]
    rows = [
        ("Base model", base_name),
        ("Recipe", f"`{facts.run}`, step {facts.step:,}"),
        ("Training data", ", ".join(data)),
        ("Exported as", facts.dtype),
        ("Responses end with token", facts.eos),
        ("Code", facts.code),
    ]
    parts = [
        _front_matter(facts),
        f"# {facts.run}, step {facts.step}\n",
        f"{base_name}, fine-tuned at full parameters with jsft: the weights after {facts.step:,} updates.\n",
        _table(("", ""), rows),
        "## Usage\n",
        _usage(facts),
    ]
    if facts.scores:
        parts += ["## Scores\n", _table(("benchmark", "metric", "this model", "base model"), facts.scores)]
        parts.append("Percent where the metric is a share; brackets: 95 % interval, bootstrap over problems.\n")
    parts += [
        "## Hyperparameters\n",
        _table(("field", "value"), [(f"`{name}`", str(value)) for name, value in _hyperparameters(config)]),
        "All other fields of jsft's config have their defaults."
        + (
            " Prompts must be rendered with the chat template of this\ndirectory: it is the one the run was trained with.\n"
            if facts.chats
            else " The model was trained on texts, without chat template.\n"
        ),
        "## Licence\n",
        f"These weights are derived from {base_name}; its licence applies, and so do the terms of the training data. See\n"
        "the licence file of the base model.\n",
    ]
    return "\n".join(parts)


def is_hub_id(name: str) -> bool:
    """Whether `name` is owner/name on the hub and no path here."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and not Path(name).exists()


def data_names(train: Any) -> list[str]:
    """The paths and hub ids of data.train: one, several with commas, a list, or a mapping."""
    if isinstance(train, dict):
        train = list(train.values())
    if isinstance(train, (list, tuple)):
        return [name for one in train for name in data_names(one)]
    return [part.strip() for part in str(train or "").split(",") if part.strip()]


def find_license(base: Path, source: Path | None) -> str | None:
    """The hub's name of the base model's licence, or None where nothing says it.

    base: the run's copy of the base model's files; source: the model directory it came from, whose README.md may say
    more.
    """
    for readme in (folder / "README.md" for folder in (base, source) if folder):
        if readme.is_file():
            front = readme.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
            if found := _FRONT_LICENSE.search(front):
                return found[1]
    for file in sorted(base.glob("LICENSE*")):
        text = file.read_text(encoding="utf-8", errors="replace")[:2000]
        if "Apache License" in text and "Version 2.0" in text:
            return "apache-2.0"
        return "mit" if "MIT License" in text else "other"
    return None


def _front_matter(facts: Facts) -> str:
    base = str(facts.config.get("model.path"))
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if facts.license:
        lines.append(f"license: {facts.license}")
        if facts.license == "other":
            lines += ["license_name: base-model", "license_link: LICENSE"]
    if is_hub_id(base):
        lines += [f"base_model: {base}", "base_model_relation: finetune"]
    if datasets := [name for name in data_names(facts.config.get("data.train")) if is_hub_id(name)]:
        lines += ["datasets:", *(f"- {name}" for name in datasets)]
    return "\n".join([*lines, "tags:", "- jsft", "- sft", "---", ""])


def _usage(facts: Facts) -> str:
    name = facts.repository or "PATH_OF_THIS_DIRECTORY"
    custom = facts.family == "internlm2"  # transformers has no such model; vLLM reads it with the code of its config
    trust = ", trust_remote_code=True" if custom else ""
    given = "messages" if facts.chats else "text"
    prompt = 'messages = [{"role": "user", "content": "What is 17 * 23?"}]' if facts.chats else 'text = "17 * 23 is"'
    vllm = f'''```python
from vllm import LLM, SamplingParams

llm = LLM("{name}"{trust})
{prompt}
answers = llm.{"chat" if facts.chats else "generate"}({given}, SamplingParams(temperature=0.6, max_tokens=2048))
print(answers[0].outputs[0].text)
```
'''
    if custom:
        return f"transformers has no InternLM2 model; with vLLM:\n\n{vllm}"
    return f'''```python
from transformers import pipeline

generate = pipeline("text-generation", "{name}", dtype="auto", device_map="auto")
{prompt}
print(generate({given}, max_new_tokens=2048)[0]["generated_text"]{'[-1]["content"]' if facts.chats else ""})
```

{vllm}'''


def _hyperparameters(config: dict[str, Any]) -> list[tuple[str, Any]]:
    defaults = {field.name: field.default for field in schema.FIELDS}
    preset = schema.FIDELITY.get(config.get("fidelity"), {})
    found = []
    for name, value in config.items():
        usual = preset.get(name, defaults.get(name))
        usual = list(usual) if isinstance(usual, tuple) else usual
        differs = value != usual and value is not None and not _LEFT_OUT.match(name)
        if name in _ALWAYS or differs:
            found.append((name, value))
    return found


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(header), "|---" * len(header) + "|", *map(line, rows), ""])
