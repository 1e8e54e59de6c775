"""Digits of source code, which stay the same where an edit has no effect.

They are a hash of the tree that Python makes of a source (its module ast), written so that every
Python from 3.10 on writes the same. Comments, layout and parentheses are not in that tree.
Docstrings and the type hints in functions are left out. Local variables are numbered in the order
in which they come: their names do not count. Names of parameters do, since calls may use them.
"""

import ast
import copy
import functools
import hashlib
import linecache
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
# Nodes that bind a name which is no node of its own, and the field that has it.
NAMING = {ast.ExceptHandler: "name", ast.MatchAs: "name", ast.MatchStar: "name"}
NAMING |= {ast.MatchMapping: "rest", ast.alias: "asname"}
# Fields of the tree that hold no code of their own, or hints of types.
LEFT_OUT = ("ctx", "kind", "returns", "type_comment", "type_ignores", "type_params")


def digits_of(*sources: str) -> str:
    """Eight digits for what function_source and file_source return."""
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:8]


def function_source(function: Callable) -> str:
    """What counts of a function, without its decorators. A decorator that changes what runs has
    returned another function, with a source of its own. "" where no source can be read."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename))
    node = functions_in(text).get(code.co_firstlineno)
    return source_of(node, decorators=False) if node else ""


def file_source(path: Path) -> str:
    """What counts of a file."""
    return source_of(ast.parse(path.read_bytes()))


@functools.lru_cache(8)
def functions_in(text: str) -> dict[int, Function]:
    """The functions of a file by their first line, which is that of the first decorator."""
    try:
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, Function)]
    except SyntaxError:
        return {}
    return {min(x.lineno for x in (node, *node.decorator_list)): node for node in nodes}


def source_of(tree: ast.AST, decorators: bool = True) -> str:
    tree = copy.deepcopy(tree)
    if not decorators:
        tree.decorator_list = []
    Renaming().visit(tree)
    return written(tree)


def written(x: Any) -> str:
    """A node, a list of nodes or a value as text. What is empty is not written: a newer Python may
    have more fields."""
    if isinstance(x, list):
        return f"[{' '.join(written(y) for y in x if not is_docstring(y))}]"
    if not isinstance(x, ast.AST):
        return type(x).__name__ + ascii(x)
    if isinstance(x, ast.AnnAssign) and x.value and not x.annotation:
        x = ast.Assign([x.target], x.value)
    fields = {name: y for name, y in ast.iter_fields(x) if y not in (None, [])}
    if isinstance(x, ast.JoinedStr):  # Python 3.12 puts empty texts into it
        fields["values"] = [y for y in x.values if getattr(y, "value", None) != ""]
    told = " ".join(f"{name}={written(y)}" for name, y in fields.items() if name not in LEFT_OUT)
    return f"{type(x).__name__}({told})"


def is_docstring(x: Any) -> bool:
    """Whether this is a statement that is a text, wherever it stands."""
    text = x.value if isinstance(x, ast.Expr) else None
    return isinstance(text, ast.Constant) and isinstance(text.value, str)


def names_bound(nodes: Iterable[ast.AST]) -> dict[str, str | None]:
    """The names that statements of a function bind, name -> what Renaming calls it: None for a
    local variable, which gets a number; the name itself if it is imported or declared global."""
    names, kept, outer, nodes = set(), set(), set(), list(nodes)
    while nodes:
        node = nodes.pop()
        inner = ast.iter_child_nodes(node)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, Function | ast.ClassDef):
            names.add(node.name)
            inner = []
        elif isinstance(node, ast.Lambda):
            inner = []
        elif isinstance(node, Comprehension):  # := in it binds a name around it
            inner = [x.target for x in ast.walk(node) if isinstance(x, ast.NamedExpr)]
        elif isinstance(node, ast.alias):
            names |= {node.asname} - {None}
            kept |= set() if node.asname else {node.name.partition(".")[0]}
        elif isinstance(node, ast.Global):
            kept |= {*node.names}
        elif isinstance(node, ast.Nonlocal):
            outer |= {*node.names}
        elif field := NAMING.get(type(node)):
            names |= {getattr(node, field)} - {None}
        nodes.extend(inner)
    return dict.fromkeys(names - kept - outer) | {name: name for name in kept}


def parameters(node: Function | ast.Lambda) -> list[ast.arg]:
    x = node.args
    every = [*x.posonlyargs, *x.args, x.vararg, *x.kwonlyargs, x.kwarg]
    return [arg for arg in every if arg is not None]


class NamesOfClass(dict):
    """The names in the body of a class, which keep theirs and which its methods do not see."""


class Renaming(ast.NodeVisitor):
    """Numbers the local variables of all functions in a tree.

    `scopes` are the functions, comprehensions and classes around a node, the innermost last: each
    has the names that it binds and what they are called here, None until they come first.
    """

    def __init__(self):
        self.scopes: list[dict[str, str | None]] = []
        self.count = 0

    def new(self, name: str) -> str:
        scope = next((scope for scope in reversed(self.scopes) if name in scope), {name: name})
        if scope[name] is None:
            scope[name] = f"${self.count}"
            self.count += 1
        return scope[name]

    def visit_all(self, nodes: Iterable[ast.AST | None], scope: dict | None = None):
        """Visits them, within another scope if one is given."""
        before = self.scopes
        if scope is not None:  # what is inside a class does not see its names
            self.scopes = [x for x in before if not isinstance(x, NamesOfClass)] + [scope]
        for node in nodes:
            if node is not None:
                self.visit(node)
        self.scopes = before

    def visit_Name(self, node: ast.Name):
        node.id = self.new(node.id)

    def visit_AnnAssign(self, node: ast.AnnAssign):
        if self.scopes and not isinstance(self.scopes[-1], NamesOfClass):
            node.annotation = None  # a function does not even evaluate it
        self.generic_visit(node)

    def visit_FunctionDef(self, node: Function):
        node.name = self.new(node.name)
        self.visit_all((*node.decorator_list, *node.args.defaults, *node.args.kw_defaults))
        names = {x.arg: x.arg for x in parameters(node)}
        for x in parameters(node):
            x.annotation = None
        self.visit_all(node.body, names_bound(node.body) | names)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda):
        self.visit_all((*node.args.defaults, *node.args.kw_defaults))
        own = parameters(node)
        self.visit_all([*own, node.body], dict.fromkeys(x.arg for x in own))

    def visit_arg(self, node: ast.arg):
        node.arg = self.new(node.arg)

    def visit_ListComp(self, node: ast.AST):
        first, *others = node.generators
        self.visit(first.iter)  # outside
        inside = [first.target, *first.ifs, *others]
        inside += [x for name, x in ast.iter_fields(node) if name != "generators"]
        self.visit_all(inside, names_bound(x.target for x in node.generators))

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_ClassDef(self, node: ast.ClassDef):
        node.name = self.new(node.name)
        self.visit_all((*node.decorator_list, *node.bases, *node.keywords))
        names = names_bound(node.body)
        self.visit_all(node.body, NamesOfClass({name: name for name in names}))

    def visit_Nonlocal(self, node: ast.Nonlocal):
        node.names = [self.new(name) for name in node.names]

    def generic_visit(self, node: ast.AST):
        field = NAMING.get(type(node))
        if field and getattr(node, field):
            setattr(node, field, self.new(getattr(node, field)))
        super().generic_visit(node)
