"""The text form of patterns: a whitelisted expression tree, never `eval`."""

from __future__ import annotations

import ast
import difflib
import inspect

from .base import Pattern
from .blocks import BlockTable, PerHead, RandomBlocks
from .complement import Outside
from .lsh import LSH, LSHChunks
from .primitives import (
    Chunk,
    First,
    Fixed,
    Last,
    Marked,
    MarkedKeys,
    MarkedQueries,
    Stride,
    Summary,
    Window,
    causal,
    full,
)
from .recipes import RECIPES
from .ring import Ring

PRIMITIVES = (
    Window, First, Last, Marked, MarkedKeys, MarkedQueries, Stride, Fixed, Summary, Chunk, Ring, RandomBlocks, BlockTable,
    LSH, LSHChunks, Outside, PerHead,
)  # fmt: skip
WORDS = {p.word: p for p in PRIMITIVES}
# those whose arguments are patterns
OF_PATTERNS = {Outside.word, PerHead.word}
CALLS = {**WORDS, "causal": causal, "full": full, **RECIPES}
# far above any pattern that means something, far below what would exhaust the parser
LONGEST = 100_000


class PatternError(ValueError):
    """A text that is not a pattern; the message says where and what would be."""


def parse(text: str) -> Pattern:
    """Read a pattern, like `window(256, 256) | first(1)`.

    Raises:
        PatternError: with the column, the word at fault, and the known words.
    """
    if not isinstance(text, str):
        raise PatternError(f"a pattern is text like 'window(255, 0) | first(4)', not {text!r}")
    if not text.strip():
        raise PatternError(f"the pattern is empty; the known words are {', '.join(CALLS)}")
    if len(text) > LONGEST:
        raise PatternError(f"the pattern has {len(text):,} characters; at most {LONGEST:,} are read")
    try:
        # leading white space would be an indent; parentheses let a pattern run over several lines
        tree = ast.parse(f"({text}\n)", mode="eval").body
        return _pattern(tree, text)
    except SyntaxError as error:
        raise _error(text, (error.offset or 1) - 1, f"{error.msg}") from None
    except (RecursionError, MemoryError):
        raise PatternError("the pattern is nested too deeply") from None


def _error(text: str, column: int, message: str) -> PatternError:
    column = max(1, min(column, len(text)))
    shown = text if len(text) <= 200 else text[:200] + "..."
    pointer = f"\n  {shown}\n  {' ' * (column - 1)}^" if column <= 200 and "\n" not in shown else ""
    return PatternError(f"column {column}: {message}{pointer}")


def _pattern(node: ast.expr, text: str) -> Pattern:
    # the parenthesis put in front makes ast's columns, which count from 0, count from 1
    at = node.col_offset
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        left, right = _pattern(node.left, text), _pattern(node.right, text)
        try:
            return left | right if isinstance(node.op, ast.BitOr) else left & right
        except TypeError as error:
            raise _error(text, at, str(error)) from None
    if isinstance(node, ast.BoolOp):
        word, symbol = ("or", "|") if isinstance(node.op, ast.Or) else ("and", "&")
        raise _error(text, node.values[0].end_col_offset + 1, f"write {symbol!r} instead of {word!r}")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(node, text)
    if isinstance(node, ast.Name):
        if node.id in CALLS:
            raise _error(text, at, f"{node.id!r} needs its arguments: {_usage(node.id)}")
        raise _unknown(node.id, at, text)
    raise _error(
        text, at, f"{ast.unparse(node)!r} is not a pattern; patterns are calls like window(255, 0), joined by | and &"
    )


def _call(node: ast.Call, text: str) -> Pattern:
    word, at = node.func.id, node.col_offset
    if word not in CALLS:
        raise _unknown(word, at, text)
    values = [_pattern(a, text) if word in OF_PATTERNS else _value(a, text) for a in node.args]
    named = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _error(text, at, f"** is not read; the form is {_usage(word)}")
        named[keyword.arg] = _value(keyword.value, text)
    try:
        inspect.signature(CALLS[word]).bind(*values, **named)
        return CALLS[word](*values, **named)
    except TypeError as error:
        raise _error(text, at, f"{word}: {error}; the form is {_usage(word)}") from None
    except ValueError as error:
        raise _error(text, at, str(error)) from None


def _value(node: ast.expr, text: str):
    """A number, None, text, or tuples of them."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (int, str))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value if isinstance(node.operand.value, int) else None
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(item, text) for item in node.elts)
    raise _error(text, node.col_offset, f"{ast.unparse(node)!r} is not a value; arguments are whole numbers or None")


def _usage(word: str) -> str:
    if word == PerHead.word:
        return "per_head(pattern, pattern, ...)"
    parameters = inspect.signature(CALLS[word]).parameters.values()
    shown = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    return f"{word}({', '.join(shown)})"


def _unknown(word: str, column: int, text: str) -> PatternError:
    close = difflib.get_close_matches(word, CALLS, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return _error(text, column, f"unknown word {word!r}{hint} The known words are {', '.join(CALLS)}")
