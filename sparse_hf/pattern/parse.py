"""The text form of patterns: a whitelisted expression tree, never `eval`."""

from __future__ import annotations

import ast
import difflib
import inspect
from functools import lru_cache
from typing import Any

from .words import WORDS, Maker

# far above any pattern that means something, far below what would exhaust the parser
MAX_CHARACTERS = 100_000
# longest text that an error shows
MAX_SHOWN = 200
# the one word without arguments: what layers are called that leave nothing out
DENSE = "dense"
# signatures of words that are kept
SIGNATURES_KEPT = 256


class PatternError(ValueError):
    """A text that is not a pattern; the message says where and what would be.

    Examples:
        >>> try:
        ...     parse("window(1)")
        ... except PatternError as error:
        ...     print(str(error).splitlines()[0])
        column 1: window: missing a required argument: 'right'; the form is window(left, right)
    """


def parse(text: str) -> Any:
    """Read a pattern, like `window(256, 256) | first(1)`.

    Raises:
        PatternError: with the column, the word at fault, and the known words.
    """
    if not isinstance(text, str):
        raise PatternError(f"a pattern is text like 'window(255, 0) | first(4)', not {text!r}")
    if not text.strip():
        raise PatternError(f"the pattern is empty; the known words are {_known()}")
    if len(text) > MAX_CHARACTERS:
        raise PatternError(f"the pattern has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    try:
        # leading white space would be an indent; parentheses let a pattern run over several lines
        tree = ast.parse(f"({text}\n)", mode="eval").body
        return _pattern(tree, text)
    except SyntaxError as error:
        raise _error(text, (error.offset or 1) - 1, f"{error.msg}") from None
    except (RecursionError, MemoryError):
        raise PatternError("the pattern is nested too deeply") from None


@lru_cache(maxsize=SIGNATURES_KEPT)
def _signature(maker: Maker) -> inspect.Signature:
    return inspect.signature(maker)


def _known() -> str:
    return ", ".join(sorted([*WORDS, DENSE]))


def _error(text: str, column: int, message: str) -> PatternError:
    column = max(1, min(column, len(text)))
    shown = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
    pointer = f"\n  {shown}\n  {' ' * (column - 1)}^" if column <= MAX_SHOWN and "\n" not in shown else ""
    return PatternError(f"column {column}: {message}{pointer}")


def _pattern(node: ast.expr, text: str) -> Any:
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
        end = node.values[0].end_col_offset or at
        raise _error(text, end + 1, f"write {symbol!r} instead of {word!r}")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(node.func.id, node, text)
    if isinstance(node, ast.Name):
        if node.id == DENSE:
            return WORDS["full"]()
        if node.id in WORDS:
            raise _error(text, at, f"{node.id!r} needs its arguments: {_usage(node.id)}")
        raise _unknown(node.id, at, text)
    raise _error(
        text, at, f"{ast.unparse(node)!r} is not a pattern; patterns are calls like window(255, 0), joined by | and &"
    )


def _call(word: str, node: ast.Call, text: str) -> Any:
    at = node.col_offset
    if word not in WORDS:
        raise _unknown(word, at, text)
    positional = _positional(word, len(node.args))
    # a class says which of its arguments are patterns; all others are values
    of_patterns, of_fractions = (getattr(WORDS[word], kind, ()) for kind in ("pattern_fields", "fraction_fields"))

    def read(name: str, argument: ast.expr) -> Any:
        return _pattern(argument, text) if name in of_patterns else _value(argument, text, name in of_fractions)

    values = [read(name, argument) for name, argument in zip(positional, node.args, strict=True)]
    named = {}
    for argument in node.keywords:
        name = argument.arg
        if name is None:
            raise _error(text, at, f"** is not read; the form is {_usage(word)}")
        named[name] = read(name, argument.value)
    try:
        _signature(WORDS[word]).bind(*values, **named)
        return WORDS[word](*values, **named)
    except TypeError as error:
        raise _error(text, at, f"{word}: {error}; the form is {_usage(word)}") from None
    except ValueError as error:
        raise _error(text, at, str(error)) from None


def _positional(word: str, count: int) -> list[str]:
    """The names of the first `count` arguments; of those that there are none of, an empty name."""
    names = []
    for parameter in _signature(WORDS[word]).parameters.values():
        rest = count - len(names) if parameter.kind is parameter.VAR_POSITIONAL else 1
        names += [parameter.name] * rest
    return [*names[:count], *[""] * (count - len(names))]


def _value(node: ast.expr, text: str, may_be_fraction: bool = False) -> Any:
    """A whole number, True or False, None, text, or tuples of them; where it may be, any number."""
    known = (int, str, float) if may_be_fraction else (int, str)
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, known)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number = node.operand.value
        if isinstance(number, (int, float) if may_be_fraction else int) and not isinstance(number, bool):
            return -number
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(item, text) for item in node.elts)
    kind = "numbers" if may_be_fraction else "whole numbers"
    raise _error(text, node.col_offset, f"{ast.unparse(node)!r} is not a value; arguments are {kind} or None")


def _usage(word: str) -> str:
    return f"{word}({', '.join(map(_shown, _signature(WORDS[word]).parameters.values()))})"


def _shown(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        one = parameter.name.removesuffix("s")
        return f"{one}, {one}, ..."
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"


def _unknown(word: str, column: int, text: str) -> PatternError:
    close = difflib.get_close_matches(word, [*WORDS, DENSE], 1)
    about = f"; did you mean {close[0]!r}? A" if close else f". The known words are {_known()}; a"
    return _error(
        text, column, f"unknown word {word!r}{about} pattern of your own is known once the module that defines it is imported"
    )  # fmt: skip
