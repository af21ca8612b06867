"""Every opcode of protocols 0 to 5: a handler takes the position after it, and gives the next one's."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from builder.formats.torch.pickles.machine import Machine, extend, update
from builder.formats.torch.pickles.values import Dict, Malformed, Object, Stateful

MAX_DIGITS = 1000  # of an integer, or its bytes

Handler = Callable[[Machine, int], int]


class Stop(Exception):
    """The pickle's end."""


def _unknown(m: Machine, at: int) -> int:
    raise Malformed(f"byte 0x{m.data[at - 1]:02x} is not an opcode")


TABLE: list[Handler] = [_unknown] * 256


def _opcode(*codes: bytes) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for code in codes:
            TABLE[code[0]] = handler
        return handler

    return register


_U16 = struct.Struct("<H").unpack_from
_I32 = struct.Struct("<i").unpack_from
_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from
_F64 = struct.Struct(">d").unpack_from


@_opcode(b"\x80")
def _proto(m: Machine, at: int) -> int:
    if m.data[at] > 5:
        raise Malformed(f"protocol {m.data[at]} is not known")
    return at + 1


@_opcode(b"\x95")
def _frame(m: Machine, at: int) -> int:
    (size,) = _U64(m.data, at)
    if size > m.left(at + 8):
        raise Malformed(f"a frame of {size:,} bytes goes past its end")
    return at + 8


@_opcode(b".")
def _stop(m: Machine, at: int) -> int:
    if not m.stack or m.marks:
        raise Malformed("it ends without a value")
    raise Stop


@_opcode(b"(")
def _mark(m: Machine, at: int) -> int:
    m.mark()
    return at


@_opcode(b"0")
def _pop(m: Machine, at: int) -> int:
    if m.stack:
        m.stack.pop()
    else:
        m.marked()
    return at


@_opcode(b"1")
def _pop_mark(m: Machine, at: int) -> int:
    m.marked()
    return at


@_opcode(b"2")
def _dup(m: Machine, at: int) -> int:
    m.stack.append(m.stack[-1])
    return at


@_opcode(b"q")
def _binput(m: Machine, at: int) -> int:
    m.memoize(m.data[at])
    return at + 1


@_opcode(b"r")
def _long_binput(m: Machine, at: int) -> int:
    m.memoize(_U32(m.data, at)[0])
    return at + 4


@_opcode(b"\x94")
def _memoize(m: Machine, at: int) -> int:
    m.memoize(len(m.memo))
    return at


@_opcode(b"p")
def _put(m: Machine, at: int) -> int:
    raw, at = m.line(at)
    m.memoize(_integer(raw))
    return at


@_opcode(b"h")
def _binget(m: Machine, at: int) -> int:
    m.recall(m.data[at])
    return at + 1


@_opcode(b"j")
def _long_binget(m: Machine, at: int) -> int:
    m.recall(_U32(m.data, at)[0])
    return at + 4


@_opcode(b"g")
def _get(m: Machine, at: int) -> int:
    raw, at = m.line(at)
    m.recall(_integer(raw))
    return at


# Scalars.


def _constant(value: object) -> Handler:
    def push(m: Machine, at: int) -> int:
        m.stack.append(value)
        return at

    return push


def _fixed(unpack: Callable[[bytes, int], tuple[object, ...]], width: int) -> Handler:
    def push(m: Machine, at: int) -> int:
        m.stack.append(unpack(m.data, at)[0])
        return at + width

    return push


for _code, _value in {b"N": None, b"\x88": True, b"\x89": False, b")": ()}.items():
    _opcode(_code)(_constant(_value))
_opcode(b"M")(_fixed(_U16, 2))
_opcode(b"J")(_fixed(_I32, 4))
_opcode(b"G")(_fixed(_F64, 8))


@_opcode(b"K")
def _binint1(m: Machine, at: int) -> int:
    m.stack.append(m.data[at])
    return at + 1


def _integer(raw: bytes) -> int:
    if len(raw) > MAX_DIGITS:
        raise Malformed(f"an integer has {len(raw):,} digits")
    try:
        return int(raw)
    except ValueError:
        raise Malformed("an integer's digits are none") from None


@_opcode(b"I")
def _int(m: Machine, at: int) -> int:
    raw, at = m.line(at)
    m.stack.append(raw == b"01" if raw in (b"00", b"01") else _integer(raw))
    return at


@_opcode(b"L")
def _long(m: Machine, at: int) -> int:
    raw, at = m.line(at)
    m.stack.append(_integer(raw.removesuffix(b"L")))
    return at


def _from_bytes(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


@_opcode(b"\x8a")
def _long1(m: Machine, at: int) -> int:
    return m.string(at + 1, m.data[at], _from_bytes)


@_opcode(b"\x8b")
def _long4(m: Machine, at: int) -> int:
    (size,) = _I32(m.data, at)
    if not 0 <= size <= MAX_DIGITS:
        raise Malformed(f"an integer has {size:,} bytes")
    return m.string(at + 4, size, _from_bytes)


@_opcode(b"F")
def _float(m: Machine, at: int) -> int:
    raw, at = m.line(at)
    try:
        m.stack.append(float(raw))
    except ValueError:
        raise Malformed("a number's digits are none") from None
    return at


# Strings.


def _utf8(raw: bytes) -> str:
    return str(raw, "utf-8", "backslashreplace")


def _python2(raw: bytes) -> str | bytes:
    """A string of Python 2, which may be text or bytes."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        return raw


def _sized(
    unpack: Callable[[bytes, int], tuple[int, ...]], width: int, decode: Callable[[bytes], object]
) -> Handler:
    def push(m: Machine, at: int) -> int:
        (size,) = unpack(m.data, at)
        if size < 0:
            raise Malformed(f"a string has {size:,} bytes")
        return m.string(at + width, size, decode)

    return push


_U8 = struct.Struct("<B").unpack_from
for _code, _handler in {
    b"X": _sized(_U32, 4, _utf8),
    b"\x8c": _sized(_U8, 1, _utf8),
    b"\x8d": _sized(_U64, 8, _utf8),
    b"B": _sized(_U32, 4, bytes),
    b"C": _sized(_U8, 1, bytes),
    b"\x8e": _sized(_U64, 8, bytes),
    b"\x96": _sized(_U64, 8, bytes),
    b"T": _sized(_I32, 4, _python2),
    b"U": _sized(_U8, 1, _python2),
}.items():
    _opcode(_code)(_handler)

_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_LETTERS = dict(zip(b"abfnrtv", b"\a\b\f\n\r\t\v", strict=True))


def _unescape(match: re.Match[bytes]) -> bytes:
    body = match[1]
    if len(body) == 3 and body[:1] == b"x":
        return bytes([int(body[1:], 16)])
    if body[0] in b"01234567":
        return bytes([int(body, 8) & 0xFF])
    return bytes([_LETTERS.get(body[0], body[0])])


@_opcode(b"S")
def _string(m: Machine, at: int) -> int:
    raw, at = m.line(at)
    m.keep(4 * len(raw))  # which may be escapes, each taken for itself
    raw = raw.strip()
    if len(raw) < 2 or raw[0] != raw[-1] or raw[:1] not in (b"'", b'"'):
        raise Malformed("a string has no quotes")
    m.stack.append(_python2(_ESCAPE.sub(_unescape, raw[1:-1])))
    return at


@_opcode(b"V")
def _unicode(m: Machine, at: int) -> int:
    raw, at = m.line(at)
    m.keep(len(raw))
    try:
        text = str(raw, "raw-unicode-escape")
    except UnicodeDecodeError:
        raise Malformed("a string's escapes are wrong") from None
    m.stack.append(_utf8(text.encode("utf-8", "backslashreplace")))
    return at


# Containers.


@_opcode(b"\x85")
def _tuple1(m: Machine, at: int) -> int:
    m.count()
    m.stack[-1] = (m.stack[-1],)
    return at


@_opcode(b"\x86")
def _tuple2(m: Machine, at: int) -> int:
    last = m.stack.pop()
    m.count()
    m.stack[-1] = (m.stack[-1], last)
    return at


@_opcode(b"\x87")
def _tuple3(m: Machine, at: int) -> int:
    last, middle = m.stack.pop(), m.stack.pop()
    m.count()
    m.stack[-1] = (m.stack[-1], middle, last)
    return at


@_opcode(b"t")
def _tuple(m: Machine, at: int) -> int:
    items = m.marked()
    m.make(tuple(items))
    return at


@_opcode(b"]")
def _empty_list(m: Machine, at: int) -> int:
    m.make([])
    return at


@_opcode(b"l")
def _list(m: Machine, at: int) -> int:
    items = m.marked()
    m.make(items)
    return at


@_opcode(b"}")
def _empty_dict(m: Machine, at: int) -> int:
    m.make(Dict())
    return at


@_opcode(b"d")
def _dict(m: Machine, at: int) -> int:
    items = m.marked()
    made = Dict()
    update(made, items)
    m.make(made)
    return at


@_opcode(b"\x8f")
def _empty_set(m: Machine, at: int) -> int:
    m.make(Object("builtins.set", (), []))
    return at


@_opcode(b"\x91")
def _frozenset(m: Machine, at: int) -> int:
    items = m.marked()
    m.make(Object("builtins.frozenset", (), items))
    return at


@_opcode(b"a")
def _append(m: Machine, at: int) -> int:
    item = m.stack.pop()
    extend(m.stack[-1], [item])
    return at


@_opcode(b"e", b"\x90")
def _appends(m: Machine, at: int) -> int:
    items = m.marked()
    extend(m.stack[-1], items)
    return at


@_opcode(b"s")
def _setitem(m: Machine, at: int) -> int:
    value, key = m.stack.pop(), m.stack.pop()
    update(m.stack[-1], [key, value])
    return at


@_opcode(b"u")
def _setitems(m: Machine, at: int) -> int:
    items = m.marked()
    update(m.stack[-1], items)
    return at


# Names, and what would be calls.


@_opcode(b"c")
def _global(m: Machine, at: int) -> int:
    module, at = m.line(at)
    name, at = m.line(at)
    m.stack.append(m.find(_utf8(module), _utf8(name)))
    return at


@_opcode(b"\x93")
def _stack_global(m: Machine, at: int) -> int:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.find(module, name))
    return at


@_opcode(b"i")
def _inst(m: Machine, at: int) -> int:
    at = _global(m, at)
    found = m.stack.pop()
    args = m.marked()
    m.stack.append(m.call(found, tuple(args)))
    return at


@_opcode(b"o")
def _obj(m: Machine, at: int) -> int:
    items = m.marked()
    m.stack.append(m.call(items[0], tuple(items[1:])))
    return at


@_opcode(b"R", b"\x81")
def _reduce(m: Machine, at: int) -> int:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args)
    return at


@_opcode(b"\x92")
def _newobj_ex(m: Machine, at: int) -> int:
    named, args = m.stack.pop(), m.stack.pop()
    if type(named) is not Dict:
        raise Malformed("a call's named arguments are not a dict")
    made = m.call(m.stack[-1], args)
    m.stack[-1] = Object("the result of a call", (made, named)) if named else made
    return at


@_opcode(b"b")
def _build(m: Machine, at: int) -> int:
    state = m.stack.pop()
    target = m.stack[-1]
    if not isinstance(target, (Dict, Stateful)):
        raise Malformed("it sets attributes of what has none")
    if target.state is not None:
        m.count()
        state = (target.state, state)
    target.state = state
    return at


@_opcode(b"Q")
def _binpersid(m: Machine, at: int) -> int:
    m.stack[-1] = m.persistent(m.stack[-1])
    return at


@_opcode(b"P")
def _persid(m: Machine, at: int) -> int:
    raw, at = m.line(at)
    m.stack.append(m.persistent(_utf8(raw)))
    return at


@_opcode(b"\x82", b"\x83", b"\x84")
def _extension(m: Machine, at: int) -> int:
    raise Malformed("it refers to a registry of extensions, which only its writer has")


@_opcode(b"\x97", b"\x98")
def _buffer(m: Machine, at: int) -> int:
    raise Malformed("it refers to buffers, which only its writer had")
