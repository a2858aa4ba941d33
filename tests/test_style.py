"""The habits that keep one file beautiful, each checked on the real files.

A checker takes source text and returns its faults, one sentence each. The last tests feed every
checker a snippet with one known fault, so a checker that has gone blind fails as well.
"""

import ast
import builtins
import dataclasses
import functools
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
import types
from itertools import takewhile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
PROGRAM, CONVERTER, USER_SCRIPT = (
    "standalone_transformer_lm.py",
    "convert_to_llama.py",
    "test_llama_model.py",
)
EVERY_FILE = pytest.mark.parametrize("file", [PROGRAM, CONVERTER, USER_SCRIPT])

RULE = "# " + "=" * 98
TITLE = re.compile(r"# (?P<name>[A-Z][\w -]*): (?P<what>\S.*)")
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*|_?[A-Z][A-Za-z0-9]*|__all__")  # or a type alias
MODULE_NAMES = {"__name__", "__file__", "__doc__"}

DEFS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def read(file):
    return (ROOT / file).read_text(encoding="utf-8")


# ---- Scopes: which names does a piece of code take from the module? ----


class Unquote(ast.NodeTransformer):
    """Turns the quoted types of an annotation into code; other strings in it stay strings."""

    def visit_Subscript(self, node):
        name = ast.unparse(node.value).split(".")[-1]
        return node if name in ("Literal", "Annotated") else self.generic_visit(node)

    def visit_Constant(self, node):
        if not isinstance(node.value, str):
            return node
        quoted = ast.parse(node.value.strip(), mode="eval").body
        for part in ast.walk(quoted):
            ast.copy_location(part, node)
        return quoted


@functools.cache
def parse(source):
    """The tree of `source`, with every quoted annotation unquoted."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None):
                setattr(node, field, Unquote().visit(getattr(node, field)))
    return tree


def bound_names(nodes):
    """Yield the names that `nodes` bind in the scope they stand in."""
    for node in nodes:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
                continue  # what is bound inside stays inside
            case ast.Lambda():
                continue
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                walrus = (n.target for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
                yield from (target.id for target in walrus)
                continue
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.arg():
                yield node.arg
            case ast.alias():
                yield (node.asname or node.name).split(".")[0]
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar() if node.name:
                yield node.name
            case ast.MatchMapping() if node.rest:
                yield node.rest
        yield from bound_names(ast.iter_child_nodes(node))


def scope_parts(node):
    """What of a scope is evaluated outside it, what inside, and its parameters' nodes."""
    if isinstance(node, ast.ClassDef):
        return [*node.decorator_list, *node.bases, *node.keywords], node.body, []
    if isinstance(node, COMPREHENSIONS):
        first = node.generators[0]
        inside = [child for child in ast.iter_child_nodes(node) if child is not first]
        return [first.iter], [*inside, first.target, *first.ifs], []
    inside = [node.body] if isinstance(node, ast.Lambda) else node.body
    outside = [node.args, *getattr(node, "decorator_list", []), getattr(node, "returns", None)]
    return [part for part in outside if part], inside, [node.args]


def free_names(node, hidden=frozenset(), of_class=frozenset()):
    """Yield each Name that `node` loads and that no scope inside `node` binds.

    `of_class` holds the names of a class body, which its methods do not see.
    """
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in hidden | of_class:
            yield node
    elif isinstance(node, (*DEFS, ast.Lambda, ast.ClassDef, *COMPREHENSIONS)):
        outside, inside, params = scope_parts(node)
        for part in outside:
            yield from free_names(part, hidden, of_class)
        bound = frozenset(bound_names([*params, *inside]))
        is_class = isinstance(node, ast.ClassDef)
        for part in inside:
            yield from free_names(part, *((hidden, bound) if is_class else (hidden | bound,)))
    else:
        for child in ast.iter_child_nodes(node):
            yield from free_names(child, hidden, of_class)


# ---- The checkers ----


def downward_references(source):
    """Habit 1: a definition mentions only names defined above it, or itself."""
    body, defined, faults = parse(source).body, {}, []
    for place, statement in enumerate(body):
        for name in bound_names([statement]):
            defined.setdefault(name, place)
    for place, statement in enumerate(body):
        first_below = place + isinstance(statement, (*DEFS, ast.ClassDef))
        for name in free_names(statement):
            if (below := defined.get(name.id, -1)) >= first_below:
                line = body[below].lineno
                faults.append(f"line {name.lineno}: {name.id} is defined below, on line {line}")
    return faults


def rooms_and_contents(source):
    """Habit 2: well-formed banners, the same in the table of contents."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    rules = [line for line, text in comments.items() if text.startswith("# =====")]
    rooms, faults = [], []
    for top, bottom in zip(rules[::2], rules[1::2] + [0] * (len(rules) % 2), strict=True):
        title = TITLE.fullmatch(comments.get(top + 1, ""))
        if bottom == top + 2 and title and comments[top] == comments[bottom] == RULE:
            rooms.append((top, title["name"], title["what"]))
        else:
            faults.append(f"line {top}: no banner of the form RULE / '# Name: one line' / RULE")
    return faults + contents_faults(source, rooms)


def contents_faults(source, rooms):
    """The lines under `Rooms` in the module docstring against the banners."""
    front_page = (ast.get_docstring(ast.parse(source)) or "").splitlines()
    if "Rooms" not in front_page or not rooms:
        return ["the module docstring has no line 'Rooms', or the file no banners"]
    listed = [*takewhile(str.strip, front_page[front_page.index("Rooms") + 1 :])]
    width = 1 + max(len(name) for _, name, _ in rooms)
    if listed and listed[0].endswith(rooms[0][2]):
        width = max(width, len(listed[0]) - len(rooms[0][2]) - 2)  # any one column will do
    wanted = [f"  {name:<{width}}{what}" for _, name, what in rooms]
    faults = [f"contents lack the banner: {line!r}" for line in wanted if line not in listed]
    faults += [f"contents list no banner: {line!r}" for line in listed if line not in wanted]
    return faults or ([] if listed == wanted else ["contents and banners differ in order"])


def top_level(source):
    """Habit 4: a docstring, imports, definitions, constants and the main block, nothing else."""
    faults = []
    for place, statement in enumerate(ast.parse(source).body):
        match statement:
            case ast.Expr(value=ast.Constant(value=str())) if place == 0:
                continue
            case ast.Import() | ast.ImportFrom() | ast.ClassDef():
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                continue
            case ast.Assign() | ast.AnnAssign():
                if all(CONSTANT.fullmatch(name) for name in stored(statement)):
                    continue
            case ast.If(orelse=[]) if is_main_block(statement):
                continue
        faults.append(f"line {statement.lineno}: not allowed at the top level")
    return faults


def is_main_block(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def stored(assignment):
    """The targets of an assignment as text: `a`, `a.b`, `a[0]`, each of a tuple."""
    targets = getattr(assignment, "targets", None) or [assignment.target]
    parts = [p for t in targets for p in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [ast.unparse(part) for part in parts]


def hidden_inputs(source):
    """Habit 5: no `global`; only parameters, locals, imports, constants, functions, classes."""
    tree = parse(source)
    faults = [f"line {n.lineno}: global" for n in ast.walk(tree) if isinstance(n, ast.Global)]
    definitions = (*DEFS, ast.ClassDef, ast.Import, ast.ImportFrom)
    allowed = {*dir(builtins), *MODULE_NAMES}
    allowed |= {*bound_names(n for n in tree.body if isinstance(n, definitions))}
    for name in (name for statement in tree.body for name in free_names(statement)):
        if name.id not in allowed and not CONSTANT.fullmatch(name.id):
            faults.append(f"line {name.lineno}: reads {name.id} of the module")
    return faults


def settings_faults(source, module):
    """Habit 6: every field of every settings dataclass has help, and something acts on it."""
    reads, faults = settings_reads(ast.parse(source).body), []
    for name, kind in inspect.getmembers(module, dataclasses.is_dataclass):
        if name.endswith("Settings") and kind.__module__ == module.__name__:
            for field in dataclasses.fields(kind):
                if not field.metadata.get("help"):
                    faults.append(f"{name}.{field.name} has no help")
                if field.name not in reads:
                    faults.append(f"{name}.{field.name} is read nowhere")
    return faults


def settings_reads(body):
    """Attributes read outside the settings classes, or in those of their methods that serve there.

    `check` does not count: a field that is only validated does nothing.
    """
    settings = [n for n in body if isinstance(n, ast.ClassDef) and n.name.endswith("Settings")]
    reads = attribute_reads(n for n in body if n not in settings)
    methods = [n for kind in settings for n in kind.body if isinstance(n, DEFS)]
    waiting = [method for method in methods if method.name != "check"]
    while serving := [method for method in waiting if method.name in reads]:
        reads |= attribute_reads(serving)
        waiting = [method for method in waiting if method not in serving]
    return reads


def attribute_reads(nodes):
    found = (n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Attribute))
    return {n.attr for n in found if isinstance(n.ctx, ast.Load)}


def broad_handling(source):
    """Habit 7: no broad `except`, no assert without a message, exit only at the front door."""
    tree, faults = ast.parse(source), []
    doors = [n for n in tree.body if is_main_block(n) or getattr(n, "name", "") == "main"]
    at_door = {node for door in doors for node in ast.walk(door)}
    for node in ast.walk(tree):
        match node:
            case ast.ExceptHandler() if node.type is None or is_broad([node.type]):
                faults.append(f"line {node.lineno}: broad except")
            case ast.Call() if called(node).endswith("suppress") and is_broad(node.args):
                faults.append(f"line {node.lineno}: broad suppress")
            case ast.Assert(msg=None):
                faults.append(f"line {node.lineno}: assert without a message")
            case ast.Call() if called(node) in ("sys.exit", "exit", "quit", "SystemExit"):
                faults += [f"line {node.lineno}: exit"] * (node not in at_door)
            case ast.Raise(exc=ast.Name(id="SystemExit")):
                faults += [f"line {node.lineno}: exit"] * (node not in at_door)
    return faults


def called(call):
    return ast.unparse(call.func)


def is_broad(types):
    names = {n.id for node in types for n in ast.walk(node) if isinstance(n, ast.Name)}
    return bool(names & {"Exception", "BaseException"})


def untidiness(source):
    """Habit 3: laid out by `ruff format`, clean under `ruff check`, with the project's settings."""
    faults = []
    for words in (["format", "--diff"], ["check", "--output-format=concise"]):
        command = [sys.executable, "-m", "ruff", *words, "--no-cache", "-"]
        done = subprocess.run(
            command, input=source, cwd=ROOT, capture_output=True, encoding="utf-8"
        )
        faults += [done.stdout + done.stderr] if done.returncode else []
    return faults


# ---- The files ----


def demand(faults):
    """Fail with one fault a line."""
    assert not faults, "\n" + "\n".join(faults)


def test_habit_1_names_refer_upward():
    demand(downward_references(read(PROGRAM)))


def test_habit_2_contents_equal_banners():
    demand(rooms_and_contents(read(PROGRAM)))


@EVERY_FILE
def test_habit_3_files_are_formatted_and_clean(file):
    demand(untidiness(read(file)))


def test_habit_4_top_level_only_defines():
    demand(top_level(read(PROGRAM)))


def test_habit_4_importing_has_no_effect(tmp_path):
    code = f"""
import os, sys, torch
sys.path.insert(0, {str(ROOT)!r})
before = dict(os.environ), torch.get_rng_state().tolist(), torch.get_num_threads()
import {PROGRAM.removesuffix(".py")}
after = dict(os.environ), torch.get_rng_state().tolist(), torch.get_num_threads()
assert before == after, "environment, random state or threads changed"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert not torch.distributed.is_initialized(), "a process group was made"
"""
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir()), "importing made a file"


@EVERY_FILE
def test_habit_5_functions_have_no_hidden_inputs(file):
    demand(hidden_inputs(read(file)))


@pytest.mark.parametrize("file", [PROGRAM, CONVERTER])
def test_habit_6_settings_have_help_and_are_read(file):
    demand(settings_faults(read(file), importlib.import_module(file.removesuffix(".py"))))


@EVERY_FILE
def test_habit_7_no_broad_except_bare_assert_or_stray_exit(file):
    demand(broad_handling(read(file)))


# ---- The README against the program ----


def readme_code():
    """README.md's fenced blocks and inline code, with continued lines joined."""
    fence = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    text = read("README.md")
    inline = re.findall(r"`([^`\n]+)`", fence.sub("", text))
    return "\n".join(fence.findall(text) + inline).replace("\\\n", " ")


def shown_flags(code):
    """Yield (command, its flags) for each use of the program in `code`."""
    for use in re.split(rf"{re.escape(PROGRAM)} +(?=[a-z])", code)[1:]:
        command, *words = re.split(r"[\n;|#]|&&", use)[0].split()
        yield command, {flag for word in words for flag in re.findall(r"^--[\w-]+", word)}


def test_readme_names_every_command():
    import standalone_transformer_lm as lm

    missing = set(lm.COMMANDS) - set(re.findall(r"\w+", readme_code()))
    assert not missing, f"README.md does not show {sorted(missing)}"


def test_readme_shows_only_commands_and_flags_that_exist(run):
    helps, uses = {}, list(shown_flags(readme_code()))
    assert uses, "README.md shows no use of the program"
    for command, flags in uses:
        if command not in helps:
            code, out, err = run([command, "--help_all"])
            assert code == 0, f"README.md shows the command {command!r}: {err}"
            helps[command] = set(re.findall(r"--[\w-]+", out))
        assert flags <= helps[command], f"{command} has no {sorted(flags - helps[command])}"


# ---- The checkers themselves ----

BANNER = f"{RULE}\n# {{}}\n{RULE}\n"
GOOD = f'''"""Front page.

Rooms
  Ground      what all stand on
  Front door  where it starts
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

{BANNER.format("Ground: what all stand on")}
LIMIT: int = 3
Judge = Callable[[str], float]


@dataclass
class TinySettings:
    depth: int = field(default=1, metadata={{"help": "layers"}})
    width: int = field(default=2, metadata={{"help": "columns"}})

    @property
    def area(self) -> int:
        return self.depth * self.width

    def twin(self) -> "TinySettings":
        return TinySettings(self.depth)


def count(main: int, rows: list[str]) -> int:
    """A parameter may share the name of a function below, and so may a local."""
    shown = [run for run in rows if (size := len(run)) < LIMIT]
    run = lambda rest: rest + size  # noqa: E731
    return count(main - 1, shown) if main else run(1)


{BANNER.format("Front door: where it starts")}

def run(settings: TinySettings) -> float:
    def twice(value):
        return value + settings.area

    try:
        return twice(LIMIT)
    except (OSError, ValueError) as main:
        assert main.args, "an error without words"
        raise


def main() -> int:
    return int(run(TinySettings())) + count(0, [])


if __name__ == "__main__":
    sys.exit(main())
'''


def snippet_settings_faults(source):
    module = types.ModuleType("snippet")
    exec(source, module.__dict__)
    return settings_faults(source, module)


def settings_source(extra, use=""):
    """A settings class whose one field, `x`, has `extra` arguments and is read by `check` only."""
    return (
        "from dataclasses import dataclass, field\n@dataclass\nclass TinySettings:\n"
        f"    x: int = field(default=1, {extra})\n"
        f"    def check(self):\n        return self.x\n{use}"
    )


HELP = "metadata={'help': 'how many'}"
ROOM = BANNER.format("Ground: what all stand on")
CONTENTS = '"""Page.\n\nRooms\n  Ground  what all stand on\n"""\n'
BAD = [
    (downward_references, "def f():\n    return g()\ndef g():\n    pass\n"),
    (downward_references, "def f(x=G):\n    pass\nG = 1\n"),
    (downward_references, "def f(x: Late):\n    pass\nclass Late:\n    pass\n"),
    (downward_references, "def f(x: 'list[Late]'):\n    pass\nclass Late:\n    pass\n"),
    (downward_references, "@late\ndef f():\n    pass\ndef late(f):\n    return f\n"),
    (downward_references, "class A(Late):\n    pass\nclass Late:\n    pass\n"),
    (downward_references, "class A:\n    def g(self):\n        g()\ndef g():\n    pass\n"),
    (downward_references, "def f(a):\n    return [a for _ in a if g]\ndef g():\n    pass\n"),
    (downward_references, "def f():\n    def h():\n        return g\ndef g():\n    pass\n"),
    (downward_references, "T = {'f': lambda: g()}\ndef g():\n    pass\n"),
    (rooms_and_contents, ROOM),
    (rooms_and_contents, CONTENTS),
    (rooms_and_contents, CONTENTS + ROOM.replace("stand", "lie")),
    (rooms_and_contents, CONTENTS + ROOM.replace("=\n", "\n")),
    (rooms_and_contents, CONTENTS + ROOM + BANNER.format("Attic: not in the contents")),
    (rooms_and_contents, CONTENTS.replace('\n"""', '\n  Attic   not there\n"""') + ROOM),
    (top_level, "x = 1\n"),
    (top_level, "print('hello')\n"),
    (top_level, "import os\nos.environ['A'] = 'b'\n"),
    (top_level, "for N in range(3):\n    pass\n"),
    (top_level, "try:\n    import torch\nexcept ImportError:\n    pass\n"),
    (top_level, "if 1 < 2:\n    X = 1\n"),
    (hidden_inputs, "def f():\n    global N\n    N = 1\n"),
    (hidden_inputs, "cache = {}\ndef f(key):\n    return cache[key]\n"),
    (hidden_inputs, "cache = {}\nclass A:\n    def f(self):\n        return cache\n"),
    (snippet_settings_faults, settings_source("metadata={}", "print(TinySettings().x)\n")),
    (snippet_settings_faults, settings_source(HELP)),
    (snippet_settings_faults, settings_source(HELP, "TinySettings().x = 2\n")),
    (snippet_settings_faults, settings_source(HELP, "TinySettings().check()\n")),
    (broad_handling, "try:\n    f()\nexcept:\n    pass\n"),
    (broad_handling, "try:\n    f()\nexcept (OSError, Exception):\n    pass\n"),
    (broad_handling, "with contextlib.suppress(BaseException):\n    f()\n"),
    (broad_handling, "def f(x):\n    assert x > 0\n"),
    (broad_handling, "def f():\n    sys.exit(1)\n"),
    (broad_handling, "def f():\n    raise SystemExit\n"),
    (broad_handling, "def f():\n    raise SystemExit('no')\n"),
    (untidiness, "X = 1  # " + "x" * 92 + "\n"),
    (untidiness, "X = {1:2}\n"),
    (untidiness, "import os\n"),
]


@pytest.mark.parametrize("checker, source", BAD)
def test_checkers_see_faults(checker, source):
    assert checker(source)


@pytest.mark.parametrize("checker", dict.fromkeys(checker for checker, _ in BAD))
def test_checkers_accept_good_code(checker):
    demand(checker(GOOD))


def test_readme_flags_are_found():
    code = f'python {PROGRAM} prep --a b --cd=1 && torchrun --n=8 {PROGRAM} train  --e "--f"\n--g'
    assert list(shown_flags(code)) == [("prep", {"--a", "--cd"}), ("train", {"--e"})]


def test_the_lone_file_names_its_requirements():
    """Inline script metadata (PEP 723), by which `uv run` installs them, says what
    requirements.txt does."""
    (block,) = re.findall(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", read(PROGRAM))
    told = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    assert told["dependencies"] == read("requirements.txt").split()
    assert told["requires-python"] == ">=3.10"
