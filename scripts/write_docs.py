#!/usr/bin/env python
"""Writes what the docs can know from the code: docs/config.md, the plan's tables in docs/memory-and-speed.md, the
cost of the paper's tables in docs/reproduce.md, and the hours of every published run in docs/recipes.md and at the heads
of configs/*.py.

    scripts/write_docs.py            write
    scripts/write_docs.py --check    exit 1 when something is out of date
"""

import json
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jsft import config as schema

BEGIN, END = "<!-- plan: scripts/write_docs.py -->", "<!-- end of plan -->"
MODELS = (
    "qwen3_1_7b",
    "qwen3_4b",
    "qwen3_8b",
    "qwen3_14b",
    "qwen2_5_1_5b",
    "qwen2_5_3b",
    "qwen2_5_7b",
    "qwen2_5_14b",
    "internlm2_5_20b",
)


def config_page() -> str:
    """Every field of jsft/config_fields.py as Markdown, a table for each group."""
    lines = [
        "# Config fields",
        "",
        "Written by `scripts/write_docs.py` from `jsft/config_fields.py`; change it there. Each field is set in a "
        "config file "
        "(`config.data.max_length = 8192`) or on the command line (`--config.data.max_length=8192`). "
        "Defaults of the form "
        "*best / reference* come from the preset `fidelity`; whatever is set explicitly wins over it. "
        "`--config.FIELD=None` unsets a field: its preset or the tokenizer decides, or for "
        f"{', '.join(f'`{name}`' for name in schema.CHOSEN)} the rules of [a run of your own](own-run.md).",
    ]
    group = None
    for field in schema.FIELDS:
        head = field.name.partition(".")[0] if "." in field.name else "run"
        if head != group:
            lines += ["", f"## {head}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
            group = head
        meaning = field.help.replace("|", "\\|")
        if field.choices:
            meaning += " One of: " + ", ".join(f"`{c}`" for c in field.choices) + "."
        limits = [
            f"{word} {value:g}"
            for word, value in (
                ("at least", field.minimum),
                ("above", field.above),
                ("at most", field.maximum),
                ("below", field.below),
            )
            if value is not None
        ]
        if limits:
            meaning += f" ({', '.join(limits)})"
        kind = "string, list or mapping" if field.kind is object else field.kind.__name__
        lines.append(f"| `{field.name}` | {kind} | {_default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(field) -> str:
    presets = [schema.FIDELITY[name].get(field.name) for name in ("best", "reference")]
    if any(value is not None for value in presets):
        return " / ".join(f"`{value}`" for value in presets)
    return "" if field.default is None else f"`{field.default}`"


@cache
def plan(model: str, recipe: str, fidelity: str = "reference") -> dict:
    """The plan of a recipe on 8 x H200."""
    from jsft import cli
    from jsft.hardware.cards import find_device
    from jsft.planning.report import make_plan

    argv = ["--config", f"{ROOT}/configs/{model}.py:{recipe}", f"--config.fidelity={fidelity}"]
    config, name, _ = cli.parse(argv, lambda values: None, "")
    return make_plan(schema.resolve(config), name, 8, find_device("h200"))


def hours(model: str, recipe: str) -> str:
    """Planned hours of a recipe, to two digits."""
    value = plan(model, recipe)["time"]["hours"]
    return f"{value:.2f}" if value < 0.1 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def recipes_page(text: str) -> str:
    """docs/recipes.md with the hours of each run's row."""
    row = r"^(\| `(\w+)\.py:(\w+)` \|[^|]*\|[^|]*\| )[\d.]+ \|$"
    return re.sub(row, lambda match: f"{match[1]}{hours(match[2], match[3])} |", text, flags=re.MULTILINE)


def config_file(model: str, text: str) -> str:
    """configs/<model>.py with the hours of each recipe at its head."""
    row = r"^(    (\w+) +\S+_lr\S+ )( *[\d.]+) h$"

    def write(match: re.Match) -> str:
        return f"{match[1]}{hours(model, match[2]).rjust(len(match[3]))} h"

    return re.sub(row, write, text, flags=re.MULTILINE)


@cache
def recorded() -> dict[tuple[str, str, str], int]:
    """Bytes of the compiled program in bfloat16 by model, fidelity and remat."""
    return {(r["model"], r["fidelity"], r["remat"]): r["total"] for r in recorded_programs() if "matmul" not in r}


@cache
def recorded_programs() -> list[dict]:
    """The programs of gradients with unrolled layers that scripts/record_memory.py compiled."""
    programs = json.loads((ROOT / "tests" / "recorded_memory.json").read_text(encoding="utf-8"))["programs"]
    return [r for r in programs if r["program"] == "add_gradients" and r["unrolled"]]


def plan_table() -> str:
    """The plan of every base model's default recipe on 8 x H200, with both presets."""
    rows = [
        "| model, `math_cot_ep8` | fidelity | GiB of 125 | compiled | state and gradients | saved | workspace | layers "
        "save | s a step | hours | checkpoint GB | disk GB |",
        "|" + "---|" * 12,
    ]
    for model in MODELS:
        for fidelity in ("reference", "best"):
            found = plan(model, "math_cot_ep8", fidelity)
            memory, step, disk = found["memory"], found["step"], found["disk"]
            state = sum(memory[f"{part}_bytes"] for part in ("parameters", "moments", "gradients", "beside"))
            workspace = max(memory["layer_bytes"], memory["loss_bytes"])
            gib = [memory["total_bytes"], state, memory["kept_bytes"], workspace]
            compiled = recorded().get((model, fidelity, memory["remat"]))
            rows.append(
                f"| {model} | {fidelity} | {gib[0] / 2**30:.1f} | {f'{compiled / 2**30:.1f}' if compiled else ''} | "
                + " | ".join(f"{value / 2**30:.1f}" for value in gib[1:])
                + f" | {memory['remat'].replace(',', ', ')} | {step['seconds']:.1f} | "
                f"{found['time']['hours']:.1f} | "
                f"{disk['checkpoint_bytes'] / 1e9:.0f} | {disk['total_bytes'] / 1e9:.0f} |"
            )
    return "\n".join(rows)


FLOAT8_BEGIN, FLOAT8_END = "<!-- float8: scripts/write_docs.py -->", "<!-- end of float8 -->"


def float8_table() -> str:
    """Plan and compiled program of every recorded run in float8."""
    from jsft import cli
    from jsft.planning.inputs import find_model
    from jsft.planning.memory import estimate, planned_mesh
    from scripts.record_memory import arguments

    rows = [
        "| model | tokens a GPU | `mesh.gather` | layers save | planned GiB | compiled GiB | plan / compiled |",
        "|" + "---|" * 7,
    ]
    programs = [r for r in recorded_programs() if r.get("matmul") == "float8"]
    for r in sorted(programs, key=lambda r: (MODELS.index(r["model"]), r["tokens"], r["gather"], -r["total"])):
        config = schema.resolve(cli.parse(arguments(r), lambda values: None, "")[0])
        model, mesh = find_model(config.model.path)[0], planned_mesh(config, 8)
        planned = estimate(model, config, mesh, r["remat"]).total
        rows.append(
            f"| {r['model']} | {r['tokens']:,} | {r['gather']} | {r['remat'].replace(',', ', ')} | "
            f"{planned / 2**30:.1f} | {r['total'] / 2**30:.1f} | {planned / r['total']:.3f} |"
        )
    return "\n".join(rows)


LONG_BEGIN, LONG_END = "<!-- long rows: scripts/write_docs.py -->", "<!-- end of long rows -->"
_ROW = 8192  # rows are looked for in multiples of it


@cache
def _long(model: str, devices: int, fidelity: str, row: int) -> dict:
    """The plan of documents of exactly `row` tokens, one a row, 256 of them an update, on so many H200."""
    from jsft import cli
    from jsft.hardware.cards import find_device
    from jsft.planning.report import make_plan

    lengths = [f"--config.data.{name}={row}" for name in ("max_length", "pack_length")]
    argv = ["--config", f"{ROOT}/configs/{model}.py:math_cot_ep8", f"--config.fidelity={fidelity}", *lengths]
    argv += ["--config.train.expect_steps=-1", "--config.data.train=documents.parquet"]
    config, name, _ = cli.parse(argv, lambda values: None, "")
    return make_plan(
        schema.resolve(config), name, devices, find_device("h200"), mean_length=row, weighted_length=row, documents=256
    )


def long_rows_table() -> str:
    """Rows of 65,536 and 131,072 tokens at 8B."""
    rows = [
        "| Qwen3-8B, tokens a row | H200 | fidelity | GiB of 130.7 | layers save | seconds a row and GPU | tokens/s | MFU |",
        "|" + "---|" * 8,
    ]
    for row in (65536, 131072):
        for devices in (1, 2):
            for fidelity in ("reference", "best"):
                found = _long("qwen3_8b", devices, fidelity, row)
                head = f"| {row:,} | {devices} | {fidelity} | {found['memory']['total_bytes'] / 2**30:.1f}"
                if not found["fits"]:
                    rows.append(f"{head} | does not fit | | | |")
                    continue
                step = found["step"]
                rows.append(
                    f"{head} | {found['memory']['remat'].replace(',', ', ')} | {step['seconds'] * devices / 256:.1f} | "
                    f"{step['tokens_per_second']:,.0f} | {100 * step['mfu']:.0f} % |"
                )
    return "\n".join(rows)


def longest_row_table() -> str:
    """The longest row that fits, by model and GPUs."""
    from jsft import cli
    from jsft.hardware.cards import find_device
    from jsft.planning.fitting import best_rung
    from jsft.planning.inputs import find_model

    limit = find_device("h200").usable

    def longest(model: str, devices: int) -> str:
        argv = ["--config", f"{ROOT}/configs/{model}.py:math_cot_ep8", "--config.fidelity=reference"]
        argv += ["--config.remat=full"]  # the leanest
        config = schema.resolve(cli.parse(argv, lambda values: None, "")[0])
        table, _ = find_model(config.model.path, config.model.revision)
        low, high = 0, 2**20 // _ROW  # in multiples of _ROW
        while low < high:
            config.data.pack_length = config.data.max_length = (low + high + 1) // 2 * _ROW
            if best_rung(table, config, devices, limit)[2]:
                low = (low + high + 1) // 2
            else:
                high = (low + high - 1) // 2
        return f"{low * _ROW:,}" if low else "none"

    counts = (1, 2, 4, 8)
    rows = ["| `fidelity=reference` | " + " | ".join(f"{n} x H200" for n in counts) + " |", "|" + "---|" * 5]
    rows += [f"| {model} | " + " | ".join(longest(model, n) for n in counts) + " |" for model in MODELS]
    return "\n".join(rows)


PRICE = 4.0  # dollars per GPU hour
COST_BEGIN, COST_END = "<!-- cost: scripts/write_docs.py -->", "<!-- end of cost -->"
_SMALL = ("qwen3_1_7b", "qwen3_4b")
_PAPER = {  # table -> its runs
    "Table 1": [("qwen3_14b", r) for r in ("math_cot_2_5k_ep8_bs32", "math_cot_ep1_bs32", "math_cot_ep8")],
    "Table 2": [
        (base, recipe)
        for base in ("qwen3_14b", "qwen3_8b", "internlm2_5_20b")
        for recipe in ("math_cot_ep8", "math_nocot_ep8", "numina_ep8", "countdown_ep8")
    ],
    "Table 4": [("qwen3_14b", r) for r in ("math_cot_ep1", "math_cot_lr1e5_ep1", "math_cot_lr1e5_ep2")],
    "Tables 6 and 9": [(base, "math_cot_ep8") for base in _SMALL],
    "appendix, 1.7B and 4B": [(base, recipe) for base in _SMALL for recipe in ("math_nocot_ep8", "countdown_ep8")],
    "Section 3.4 (16 epochs)": [
        ("qwen3_14b", r) for r in ("math_cot_ep16", "math_cot_ep16_const", "math_cot_lr1e4_ep16_const")
    ],
    "Qwen2.5": [(f"qwen2_5_{size}", "math_cot_ep8") for size in ("1_5b", "3b", "7b", "14b")],
    "DeepSeek-R1 data": [(base, "deepseek_r1_ep8") for base in ("qwen3_14b", "qwen3_8b", "internlm2_5_20b")],
}


def cost_table() -> str:
    """What training each of the paper's tables takes: hours and dollars on 8 x H200, disk."""
    rows = [
        "| table | runs | hours | dollars | disk while training, GB | exported models, GB |",
        "|" + "---|" * 6,
    ]
    for table, runs in (_PAPER | {"all 33 runs": sorted({run for runs in _PAPER.values() for run in runs})}).items():
        plans = [plan(*run) for run in runs]
        time = sum(found["time"]["hours"] for found in plans)
        most = max((found["disk"]["total_bytes"] for found in plans), default=0)
        kept = sum(found["disk"]["milestones"] * 2 * found["model"]["parameters"] for found in plans)  # bfloat16
        hours = f"{time:.1f}" if time < 9.95 else f"{time:.0f}"
        rows.append(
            f"| {table} | {len(runs)} | {hours} | {8 * time * PRICE:,.0f} | {most / 1e9:,.0f} | {kept / 1e9:,.0f} |"
        )
    return "\n".join(rows)


def between(text: str, begin: str, end: str, table: str) -> str:
    """The page with a table between two marks."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def pages() -> dict[Path, str]:
    """Path -> what it should hold."""
    page = ROOT / "docs" / "memory-and-speed.md"
    reproduce = ROOT / "docs" / "reproduce.md"
    recipes = ROOT / "docs" / "recipes.md"
    configs = {model: ROOT / "configs" / f"{model}.py" for model in MODELS}
    planned = page.read_text(encoding="utf-8")
    for begin, end, table in (
        (BEGIN, END, plan_table()),
        (FLOAT8_BEGIN, FLOAT8_END, float8_table()),
        (LONG_BEGIN, LONG_END, f"{long_rows_table()}\n\n{longest_row_table()}"),
    ):
        planned = between(planned, begin, end, table)
    return {
        ROOT / "docs" / "config.md": config_page(),
        page: planned,
        reproduce: between(reproduce.read_text(encoding="utf-8"), COST_BEGIN, COST_END, cost_table()),
        recipes: recipes_page(recipes.read_text(encoding="utf-8")),
    } | {path: config_file(model, path.read_text(encoding="utf-8")) for model, path in configs.items()}


def main() -> int:
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run scripts/write_docs.py")
        return int(bool(stale))
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
