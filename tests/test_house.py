"""The house itself: short files, and no two modules that need each other to be imported."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("strategies", "fedlora_app")
MOST_LINES = 400

# Still to be mended. Take out what is done; nothing is to be added.
TOO_LONG: set[str] = set()
IN_A_CIRCLE: set[frozenset[str]] = set()


def files():
    """Return the Python files of the repository that are no tests, by their path in it."""
    folders = [path.parent for path in ROOT.glob("*/**/*.py")]
    tops = {folder.relative_to(ROOT).parts[0] for folder in folders} - {"tests", "shared", "build"}
    found = [*ROOT.glob("*.py")]
    for top in tops:
        if not top.startswith("."):
            found += (ROOT / top).rglob("*.py")
    return {str(path.relative_to(ROOT)): path for path in found}


def test_a_file_can_be_read_at_a_glance():
    lines = {name: len(path.read_bytes().splitlines()) for name, path in files().items()}
    assert {name for name, count in lines.items() if count > MOST_LINES} <= TOO_LONG
    assert all(lines.get(name, 0) > MOST_LINES for name in TOO_LONG), "take out what is mended"


def imported(body):
    """Return the import statements that run when a module does."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from imported(node.body)
            yield from imported(node.orelse)
        elif isinstance(node, ast.Try):
            handlers = [each for handler in node.handlers for each in handler.body]
            yield from imported([*node.body, *handlers, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.ClassDef | ast.With):
            yield from imported(node.body)


def targets(node, known):
    """Return which known modules a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & known
    assert not node.level, "imports are absolute here"
    parts = {f"{node.module}.{alias.name}" for alias in node.names} & known
    # Of a package, what is in the package's own file; of a submodule, that file alone.
    whole = len(parts) < len(node.names) and node.module in known
    return parts | {node.module} if whole else parts


def graph(root, packages):
    """Return, by module, which of the same packages it imports at its top level."""
    paths = {}
    for package in packages:
        for path in (root / package).rglob("*.py"):
            dotted = ".".join(path.relative_to(root).with_suffix("").parts)
            paths[dotted.removesuffix(".__init__")] = path
    known = set(paths)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    return {
        name: set().union(*(targets(node, known) for node in imported(tree.body))) - {name}
        for name, tree in trees.items()
    }


def circles(edges):
    """Return the sets of modules that reach each other (transitive closure: they are few)."""
    reach = {}
    for start in edges:
        seen, todo = set(), [start]
        while todo:
            for name in edges[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        reach[start] = seen
    return {frozenset(b for b in reach[a] if a in reach[b]) for a in edges if a in reach[a]}


def test_no_module_needs_one_that_needs_it():
    found = circles(graph(ROOT, PACKAGES))
    assert found <= IN_A_CIRCLE, [sorted(circle) for circle in found - IN_A_CIRCLE]
    assert found >= IN_A_CIRCLE, "take out what is mended"


def test_a_circle_is_seen(tmp_path):
    room = tmp_path / "p"
    room.mkdir()
    (room / "__init__.py").write_text("from p.a import A\n")
    (room / "a.py").write_text("try:\n    from p import b\nexcept ImportError:\n    b = 0\n")
    (room / "b.py").write_text("if True:\n    import p.c\n")
    (room / "c.py").write_text("from p.a import A\n")
    (room / "d.py").write_text(
        "if TYPE_CHECKING:\n    from p.e import E\ndef f():\n    from p.e import E\n"
    )
    (room / "e.py").write_text("import p.d\n")
    assert circles(graph(tmp_path, ["p"])) == {frozenset({"p.a", "p.b", "p.c"})}


# What one kind of data and model has. Shared by tasks, and theirs: readers of files, and models.
OF_A_TASK = {"accuracy", "macro_f1", "macro-f1", "f1", "perplexity", "labels", "label_names",
             "tokens", "pixels", "pixel_values", "input_ids", "attention_mask",
             "token_type_ids"}  # fmt: skip
ROOMS_OF_TASKS = {"tasks", "data", "models"}


def words_in(tree):
    """Return the names and the strings of one word in code, as a docstring or comment is not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def test_what_a_task_alone_knows_is_named_nowhere_else():
    found = {}
    for path in (ROOT / "fedlora_app").rglob("*.py"):
        inside = path.relative_to(ROOT / "fedlora_app")
        starter = "starter" in inside.parts  # a project of its own, which has one task
        if inside.parts[0] not in ROOMS_OF_TASKS and not starter:
            words = set(words_in(ast.parse(path.read_text(encoding="utf-8"))))
            if named := words & OF_A_TASK:
                found[str(inside)] = named
    assert found == {}


def test_a_named_metric_is_seen():
    code = 'def f(x):\n    """Say accuracy."""\n    return x.labels + x["f1"]  # tokens\n'
    assert set(words_in(ast.parse(code))) & OF_A_TASK == {"labels", "f1"}
    assert set(words_in(ast.parse("from a import f1 as g\nf(accuracy=1)"))) & OF_A_TASK
