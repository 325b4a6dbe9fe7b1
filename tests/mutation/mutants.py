"""Mutants: copies of a source file with one small fault each.

Docstrings, annotations, decorators, imports, strings, and whatever builds a message (f-strings, raised errors,
arguments of warnings) stay as they are.
"""

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
MESSAGES = {"warn", "warning", "print", "log", "say", "info", "UserError", "ValueError", "TypeError", "RuntimeError"}
TYPING = {"assert_never", "cast", "TypeVar", "isinstance", "issubclass", "get_args", "overload"}
SKIPPED = (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Assert)


@dataclass(frozen=True)
class Mutant:
    """A fault, named by what it changes, so that its name survives changes elsewhere in the file."""

    file: str
    function: str
    """Qualified name of the innermost function or class; empty at the module's level."""
    operator: str
    before: str
    after: str
    occurrence: int
    """Number of earlier mutants in this function that have the same file, operator, `before` and `after`."""
    index: int = field(compare=False)
    """Position in the list of the file's mutants."""
    lines: tuple[tuple[int, int], tuple[int, int]] = field(compare=False)
    """First and last line of the changed expression, and of its statement."""
    names: frozenset[str] = field(compare=False)
    """Names by which functions use this statement, if it isn't in a function's body."""
    digest: str = field(compare=False)
    """Hash of the source of the function or statement."""

    @property
    def name(self) -> str:
        """Name that identifies the mutant."""
        return f"{self.file}:{self.function}: {self.operator}: {self.before} → {self.after} #{self.occurrence}"

    def rank(self, seed: int) -> bytes:
        """Return the mutant's place in the random order of a seed. It doesn't depend on other mutants."""
        return hashlib.sha256(f"{seed} {self.name}".encode()).digest()


@dataclass
class Change:
    """A change of a syntax tree."""

    operator: str
    node: ast.AST
    """Node that is changed."""
    after: ast.AST | None
    """Node that replaces `node`; None: a keyword argument is left out."""
    apply: Callable[[], None]


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Return all mutants of a file."""
    tree, found, seen = ast.parse(source), [], Counter[tuple[str, ...]]()
    for index, (place, change) in enumerate(_changes(tree)):
        key = (
            place.name,
            change.operator,
            _text(change.node),
            "nothing" if change.after is None else _text(change.after),
        )
        digest = hashlib.sha256(ast.dump(place.owner).encode()).hexdigest()[:16]
        found.append(Mutant(file, *key, seen[key], index, place.lines(change.node), place.names, digest))
        seen[key] += 1
    return found


def mutated(source: str, index: int) -> ast.Module:
    """Return the tree of a file's mutant."""
    tree = ast.parse(source)
    list(_changes(tree))[index][1].apply()
    return ast.fix_missing_locations(tree)


def functions_by_line(source: str) -> dict[int, tuple[str, int]]:
    """Return the innermost function of each line that is in one, and the function's first line."""
    found: dict[int, tuple[str, int]] = {}

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}".lstrip(".")
            if isinstance(child, ast.FunctionDef):
                found.update(dict.fromkeys(range(child.lineno, _last(child) + 1), (inner, child.lineno)))
            visit(child, inner)

    visit(ast.parse(source), "")
    return found


@dataclass
class _Place:
    """Position of the walk in a file."""

    name: str
    """Qualified name of the function or class."""
    owner: ast.AST
    """Function, or statement at the level of a class or module."""
    statement: ast.AST
    names: frozenset[str] = frozenset()
    """`Mutant.names` of the mutants here."""

    def lines(self, node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
        statement = getattr(self.statement, "lineno", 0), _last(self.statement)
        return (getattr(node, "lineno", statement[0]), _last(node) or statement[1]), statement


def _last(node: ast.AST) -> int:
    return getattr(node, "end_lineno", 0)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.operator | ast.cmpop | ast.boolop):
        return type(node).__name__
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 100 else f"{text[:99]}…"


def _changes(tree: ast.Module) -> Iterator[tuple[_Place, Change]]:
    yield from _block(tree, "body", _Place("", tree, tree))


def _block(parent: ast.AST, attribute: str, place: _Place) -> Iterator[tuple[_Place, Change]]:
    """Yield the changes of a list of statements."""
    statements = getattr(parent, attribute)
    inside = isinstance(place.owner, ast.FunctionDef)
    for k, node in enumerate(statements):
        if isinstance(node, SKIPPED) or _is_text(node) or _is_protocol(node) or _is_main(node):
            continue
        if isinstance(node, ast.ClassDef):
            names = frozenset({node.name} if any(isinstance(n, ast.FunctionDef) for n in node.body) else ())
            yield from _block(node, "body", _Place(f"{place.name}.{node.name}".lstrip("."), node, node, names))
            continue
        if isinstance(node, ast.FunctionDef):
            yield from _function(node, place)
            continue
        here = _Place(place.name, place.owner, node)
        if not inside:
            here = _Place(place.name, node, node, place.names or _targets(node))
        elif (removal := _removal(node)) is not None:
            operator, after = removal
            yield here, Change(operator, node, after, _setter(statements, k, after))
        if isinstance(node, ast.Raise):
            continue
        for part in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, part, None), list):
                yield from _block(node, part, here)
        for handler in getattr(node, "handlers", ()):
            yield from _block(handler, "body", here)
        for case in getattr(node, "cases", ()):
            if case.guard is not None:
                yield from ((here, c) for c in _expression(case.guard, _setter(case, "guard"), condition=True))
            yield from _block(case, "body", here)
        yield from ((here, change) for change in _own_expressions(node))


def _function(node: ast.FunctionDef, place: _Place) -> Iterator[tuple[_Place, Change]]:
    here = _Place(f"{place.name}.{node.name}".lstrip("."), node, node)
    for defaults in (node.args.defaults, node.args.kw_defaults):
        for k, default in enumerate(defaults):
            if default is not None:
                for change in _expression(default, _setter(defaults, k)):
                    yield here, Change(f"default: {change.operator}", change.node, change.after, change.apply)
    if not any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list):
        yield from _block(node, "body", here)


def _removal(node: ast.stmt) -> tuple[str, ast.stmt] | None:
    """Return the operator and the replacement of a statement that can be left out."""
    match node:
        case ast.Expr(value=ast.Call() as call) if _called(call) not in TYPING:
            return "statement left out", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]) | ast.AugAssign() | ast.Raise() | ast.Delete():
            return "statement left out", ast.Pass()
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            return "return value", ast.Return(ast.Constant(None))
        case ast.Break():
            return "loop", ast.Continue()
        case ast.Continue():
            return "loop", ast.Break()
        case _:
            return None


def _own_expressions(node: ast.stmt) -> Iterator[Change]:
    """Yield the changes of a statement's expressions, without those of the statements in it."""
    if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        after = ARITHMETIC[type(node.op)]()
        yield Change("arithmetic", node.op, after, _setter(node, "op", after))
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "decorator_list", "returns", "msg", "cases", "handlers", "body", "orelse"):
            continue
        if name == "items":
            for item in value:
                yield from _expression(item.context_expr, _setter(item, "context_expr"))
        for k, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.expr):
                put = _setter(value, k) if isinstance(value, list) else _setter(node, name)
                yield from _expression(child, put, condition=name == "test")


Put = Callable[..., None]


def _setter(holder: object, key: str | int, *fixed: ast.AST) -> Put:
    """Return a function that puts a node (`fixed`, if it is given) at an attribute or an index."""

    def put(*given: ast.AST) -> None:
        (node,) = fixed or given
        if isinstance(holder, list):
            holder[int(key)] = node
        else:
            setattr(holder, str(key), node)

    return put


def _expression(node: ast.expr, put: Put, condition: bool = False) -> Iterator[Change]:
    """Yield the changes of an expression and of its parts."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Call) and _called(node) in TYPING):
        return

    def change(operator: str, after: ast.expr) -> Change:
        return Change(operator, node, after, lambda: put(after))

    yield from (change(operator, after) for operator, after in _replacements(node))
    if condition and not isinstance(node, ast.Compare) and not _is_not(node):
        yield change("condition", ast.UnaryOp(ast.Not(), copy.deepcopy(node)))
    if isinstance(node, ast.Call):
        yield from _call(node)
        return
    for name, value in ast.iter_fields(node):
        for k, child in enumerate(value if isinstance(value, list) else [value]):
            here = _setter(value, k) if isinstance(value, list) else _setter(node, name)
            if isinstance(child, ast.comprehension):
                yield from _expression(child.iter, _setter(child, "iter"))
                for n, test in enumerate(child.ifs):
                    yield from _expression(test, _setter(child.ifs, n), condition=True)
            elif isinstance(child, ast.expr):
                yield from _expression(child, here, condition=name == "test")


def _replacements(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Yield an expression's own replacements, with their operators."""
    match node:
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", ast.Constant(value + 1)
            yield "constant", ast.Constant(value - 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC and not _is_message(left, right):
            yield "arithmetic", ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
            yield "sign" if isinstance(node.op, ast.USub) else "condition", operand
        case ast.BoolOp(op=op, values=values):
            yield "boolean", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for k, op in enumerate(ops):
                for other in COMPARISONS[type(op)]:
                    yield "comparison", ast.Compare(left, [*ops[:k], other(), *ops[k + 1 :]], comparators)


def _call(node: ast.Call) -> Iterator[Change]:
    yield from _expression(node.func, _setter(node, "func"))
    if _called(node) in MESSAGES:
        return
    for k, argument in enumerate(node.args):
        yield from _expression(argument, _setter(node.args, k))
    for keyword in node.keywords:
        yield from _expression(keyword.value, _setter(keyword, "value"))
    for k, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield Change("argument left out", keyword, None, lambda k=k: node.keywords.pop(k))  # type: ignore[misc]


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring or `...`."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_message(*operands: ast.expr) -> bool:
    return any(
        isinstance(o, ast.JoinedStr) or (isinstance(o, ast.Constant) and isinstance(o.value, str)) for o in operands
    )


def _is_not(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _is_protocol(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and any(n in ast.unparse(node.test) for n in ("TYPE_CHECKING", "__name__"))


def _targets(node: ast.AST) -> frozenset[str]:
    """Return the names that a statement assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    return frozenset(n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
