"""Small faults that can be put into a source file: what `mutants.py` tries.

A mutation changes one operator, comparison, number or flag, or adds or drops a `not` or a minus. Type hints,
docstrings, decorators, texts and whatever belongs to a `raise`, an `assert` or a warning stay as they are,
since they do not change a result.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
SIMPLE = (ast.Return, ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Delete)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
OPERAND = 24  # characters of an operand that a description shows


@dataclass(frozen=True)
class Mutation:
    """One change of a source file.

    Attributes:
        path: The file's path below the package.
        line: The line where the changed expression starts.
        text: That line without its indentation; with `change` it names the mutation, also after later edits.
        change: What stands there, and what would, such as `a < b -> a <= b`.
        start, end: Where the expression lies in the source, in bytes of UTF-8.
        new: The expression that takes its place.
        lines: The first and the last line of the statement, or of the header of the block.
        once: Whether the statement runs at import, or in a function that keeps its results. Then most tests
            that depend on it do not reach it.
    """

    path: str
    line: int
    text: str
    change: str
    start: int
    end: int
    new: str
    lines: tuple[int, int]
    once: bool

    def apply(self, source: str) -> str:
        """The source with this change."""
        encoded = source.encode()
        return (encoded[: self.start] + self.new.encode() + encoded[self.end :]).decode()


def mutations(source: str, path: str) -> list[Mutation]:
    """Lists every mutation of a source file, in the order of its lines."""
    found = list(_Finder(source, path).block(ast.parse(source), None, True))
    return sorted(found, key=lambda m: (m.start, m.end, m.change))


class _Finder:
    """Walks over a module and yields the mutations of one file."""

    def __init__(self, source: str, path: str):
        self.path, self.source = path, source
        self.lines = source.splitlines()
        lengths = [len(line.encode()) for line in source.splitlines(keepends=True)]
        self.starts = [sum(lengths[:n]) for n in range(len(lengths) + 1)]

    def block(self, node: ast.AST, lines: tuple[int, int] | None, once: bool) -> Iterator[Mutation]:
        """The mutations below a node, which lies in a statement of these lines."""
        for child in self.children(node):
            within, inner = lines, once
            if isinstance(child, SIMPLE):
                within = child.lineno, child.end_lineno
            elif isinstance(child, ast.stmt):
                header = max(
                    [
                        child.lineno,
                        *(e.end_lineno for e in ast.iter_child_nodes(child) if isinstance(e, ast.expr)),
                    ]
                )
                within = child.lineno, header
            if isinstance(node, FUNCTIONS) and isinstance(child, ast.stmt):
                inner = any("cache" in ast.unparse(decorator) for decorator in node.decorator_list)
            elif isinstance(node, ast.Lambda) and child is node.body:
                inner = False
            for old, new in _variants(child):
                yield self.mutation(old, new, within, inner)
            yield from self.block(child, within, inner)

    def children(self, node: ast.AST) -> Iterator[ast.AST]:
        """The children that may be changed, the decorators and type hints of `node` not among them."""
        hints = {"annotation", "returns", "decorator_list", "type_params"}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            hints = {"args"}
        for name, value in ast.iter_fields(node):
            if name not in hints:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST) and not _is_text(child):
                        yield child

    def mutation(self, old: ast.expr | ast.stmt, new: ast.AST, lines: tuple[int, int], once: bool) -> Mutation:
        start = self.starts[old.lineno - 1] + old.col_offset
        end = self.starts[old.end_lineno - 1] + old.end_col_offset
        text = ast.unparse(new)
        return Mutation(
            self.path,
            old.lineno,
            self.lines[old.lineno - 1].strip(),
            f"{_short(old)} -> {_short(new)}",
            start,
            end,
            f"({text})" if isinstance(old, ast.expr) else text,
            lines,
            once,
        )


def _is_text(node: ast.AST) -> bool:
    """Whether a node is made for a reader: a text, an import, a failure or a warning."""
    if isinstance(node, ast.Expr):
        return _is_text(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr == "warn"
    kinds = ast.JoinedStr, ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.match_case
    return isinstance(node, kinds) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _variants(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Pairs of an expression and what it becomes, for the node itself."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield node, _changed(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            ops = [*node.ops[:place], SWAPS[type(op)](), *node.ops[place + 1 :]]
            yield node, _changed(node, ops=ops)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node, node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield node, ast.Constant(_other(node.value))
    for test in _tests(node):
        if not isinstance(test, ast.Compare | ast.UnaryOp | ast.Constant):
            yield test, ast.UnaryOp(ast.Not(), test)


def _tests(node: ast.AST) -> list[ast.expr]:
    """The conditions on which a node decides."""
    if isinstance(node, ast.comprehension):
        return node.ifs
    return [node.test] if isinstance(node, ast.If | ast.IfExp | ast.While) else []


def _other(value: bool | int | float) -> bool | int | float:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) or value == 0 else 2 * value


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _short(node: ast.AST) -> str:
    """The expression with its operands cut short, so that a description stays on one line."""
    cut = copy.deepcopy(node)
    for name, value in ast.iter_fields(cut):
        if name in ("left", "right", "operand", "value", "target", "comparators", "values"):
            operands = [_operand(each) for each in (value if isinstance(value, list) else [value])]
            setattr(cut, name, operands if isinstance(value, list) else operands[0])
    return _cut(ast.unparse(cut), 4 * OPERAND)


def _operand(node: object) -> object:
    if not isinstance(node, ast.expr):
        return node
    text = _cut(ast.unparse(node), OPERAND)
    return ast.Name(f"({text})" if isinstance(node, ast.BinOp | ast.BoolOp | ast.Compare | ast.IfExp) else text)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
