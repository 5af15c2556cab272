"""The import directions of docs/architecture.md, read from the source, imports inside functions included."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room is a folder or a file of jsft. It imports itself, and what is below it.
COMMANDS = {"train", "export", "plan", "prepare", "report", "api", "trainer", "__init__", "__main__"}
BASE = {"config", "config_fields", "configs", "environments", "errors", "files", "help", "hints", "objectives"}
MACHINE = BASE | {"kernels", "hardware"}
CONTENT = MACHINE | {"data", "models", "hf"}
BELOW_RUN = CONTENT | {"step", "planning"}
MAY_IMPORT = {
    **{name: BELOW_RUN | {"run", "cluster", "cli", "api", "reporting"} for name in COMMANDS},
    "run": BELOW_RUN | {"cluster"},
    "planning": CONTENT | {"step"},
    "step": CONTENT,
    "data": MACHINE,
    "hf": MACHINE | {"models"},  # it reads and writes the arrays that models declares
    "models": MACHINE,
    "kernels": BASE,
    "hardware": BASE,
    "cluster": {"errors"},
    "cli": BASE,
    "config": {"config_fields", "errors", "hints", "objectives"},
    "config_fields": {"errors", "hints", "objectives"},
    "configs": {"environments"},
    "environments": set(),
    "objectives": {"errors"},
    "errors": set(),
    "help": {"errors", "hints"},
    "files": {"errors"},  # the hub's errors in one line
    "hints": set(),
    # It runs in the serving environment, without JAX.
    "evaluate": {"environments", "errors", "files", "help", "evaluation"},
    "evaluation": {"environments", "errors", "files", "data.behaviours", "data.countdown_check", "data.thinking"},
    # the order, words and groups of the benchmarks; what responses of older evaluations do
    "reporting": {"errors", "files", "evaluation.tasks", "evaluation.behaviours"},
}

# (who, what): why. One that is no longer needed fails the test.
EXCEPTIONS = {
    ("data.chat", "hf.tokenizer"): "InternLM2's tokenizer is converted from its sentencepiece file when it is loaded",
    ("hardware.xla", "kernels.assembler"): "the assembler of all kernels is chosen before the first compilation",
    ("hardware.deviceless", "kernels.assembler"): "as in hardware.xla",
    ("cluster.watchdog", "files"): "a heartbeat is replaced in one rename: its reader never sees half a file",
    ("run.sampling", "evaluation.in_training"): "a run scores its own checkpoints",
    ("evaluation.tasks.countdown", "data.countdown"): "the benchmark's problems are generated, as training data is",
}


def module_name(file: Path) -> str:
    """The name of a module below jsft; that of a package is its folder's."""
    return ".".join(file.relative_to(ROOT / "jsft").with_suffix("").parts).removesuffix(".__init__")


def jsft_imports(file: Path) -> Iterator[str]:
    """Names, below jsft, of the modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: import by the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "jsft":
                path = ROOT / "jsft" / rest.replace(".", "/")
                is_module = path.with_suffix(".py").exists() or path.is_dir()
                yield rest if is_module else rest.rpartition(".")[0]


FILES = {module_name(file): file for file in (ROOT / "jsft").rglob("*.py")}
IMPORTS = sorted({(who, what) for who, file in FILES.items() for what in jsft_imports(file) if what})


def allowed(who: str, what: str) -> bool:
    room, other = who.partition(".")[0], what.partition(".")[0]
    return other == room or bool({other, what} & MAY_IMPORT[room])


def test_imports_point_one_way():
    wrong = [f"jsft.{a} imports jsft.{b}" for a, b in IMPORTS if not allowed(a, b) and (a, b) not in EXCEPTIONS]
    assert not wrong, "against docs/architecture.md: " + "; ".join(wrong)


@pytest.mark.parametrize("pair", EXCEPTIONS, ids=" imports ".join)
def test_an_exception_is_still_needed(pair):
    assert pair in IMPORTS and not allowed(*pair)


def test_every_room_has_a_rule():
    assert {name.partition(".")[0] for name in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("line", ["from jsft.run import loop", "def f():\n    import jsft.planning.memory"])
def test_a_forbidden_import_is_found(tmp_path, line):
    (tmp_path / "module.py").write_text(line)
    (what,) = jsft_imports(tmp_path / "module.py")
    assert not allowed("step.programs", what) and not allowed("planning.memory", "run.loop")


def test_durable_files_and_errors_need_only_the_standard_library():
    """The serving environment and a supervisor load them."""
    loaded = (
        ("environments", set()),
        ("errors", set()),
        ("files", {"jsft.errors"}),
        ("hints", set()),
        ("help", {"jsft.errors", "jsft.hints"}),
    )
    for name, others in loaded:
        tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert names and all(name.partition(".")[0] in sys.stdlib_module_names for name in names - others)
