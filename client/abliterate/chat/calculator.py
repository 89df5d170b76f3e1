"""A calculator for a model to call: arithmetic read from a text, nothing else, and never much of it.

The text is parsed, not run: names, calls and operators that are not listed here are errors, and so is a number that
would not fit a screen. Pure.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable
from typing import Final

LONGEST: Final = 500
DEEPEST: Final = 60
MOST_BITS: Final = 4096

Number = int | float


def _round(value: Number, digits: Number = 0) -> Number:
    if abs(digits) > 300:
        raise NotArithmetic("no such place to round at")
    return round(value, int(digits)) if digits else round(value)


_BINARY: Final[dict[type[ast.operator], Callable[[Number, Number], Number]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: Final[dict[type[ast.unaryop], Callable[[Number], Number]]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_CONSTANTS: Final = {"pi": math.pi, "e": math.e, "tau": math.tau}
_FUNCTIONS: Final[dict[str, tuple[Callable[..., Number], int]]] = {
    "sqrt": (math.sqrt, 1), "exp": (math.exp, 1), "log": (math.log, 2), "log2": (math.log2, 1),
    "log10": (math.log10, 1), "sin": (math.sin, 1), "cos": (math.cos, 1), "tan": (math.tan, 1),
    "floor": (math.floor, 1), "ceil": (math.ceil, 1), "abs": (abs, 1), "round": (_round, 2), "min": (min, 9),
    "max": (max, 9),
}  # fmt: skip


class NotArithmetic(Exception):
    """The text is none, or asks for too much; the message says which."""


def calculate(text: str) -> Number:
    """The value of an expression as `2 * (3 + 4) ** 2`. Raises NotArithmetic, and nothing else."""
    if len(text) > LONGEST:
        raise NotArithmetic(f"longer than {LONGEST} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # as for 1if
            tree = ast.parse(text.strip().replace("^", "**").replace("×", "*").replace("÷", "/"), mode="eval")
        return _value(tree.body, 0)
    except NotArithmetic:
        raise
    except ZeroDivisionError as error:
        raise NotArithmetic("a division by zero") from error
    except (OverflowError, RecursionError, MemoryError) as error:
        raise NotArithmetic("too large a number") from error
    except (SyntaxError, ValueError, TypeError) as error:
        raise NotArithmetic("no arithmetic that is understood here") from error


def _value(node: ast.expr, depth: int) -> Number:
    if depth > DEEPEST:
        raise NotArithmetic("nested too deep")
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, depth + 1))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _bounded(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function, most = _FUNCTIONS.get(node.func.id, (None, 0))
        if function is not None and 1 <= len(node.args) <= most:
            return _bounded(function(*(_value(argument, depth + 1) for argument in node.args)))
    raise NotArithmetic("only numbers, + - * / // % **, brackets and " + ", ".join([*_FUNCTIONS, *_CONSTANTS]))


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if base.bit_length() * exponent > MOST_BITS:
            raise NotArithmetic("too large a number")
    elif base < 0 and exponent != int(exponent):
        raise NotArithmetic("no real number")
    elif isinstance(base, int):
        base = float(base)
    return _bounded(base**exponent)


def _bounded(value: Number) -> Number:
    if isinstance(value, int):
        if value.bit_length() > MOST_BITS:
            raise NotArithmetic("too large a number")
    elif not math.isfinite(value):
        raise NotArithmetic("too large a number")
    return value
