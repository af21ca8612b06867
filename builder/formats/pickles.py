"""Pickles read as data: an interpreter of their opcodes that imports nothing and calls nothing."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from builder.errors import Place, Problem, SourceError
from builder.formats.blob import Blob
from builder.formats.pickle_globals import holds_code

# A checkpoint of 10,000 tensors with optimizer states needs about a million. Each opcode may leave some
# hundred bytes in memory, so this bounds memory too.
MAX_OPCODES = 4_000_000
MAX_BYTES = 256 << 20  # of opcodes and operands, without strings that are longer than a window
MAX_DEPTH = 100_000  # of open marks; picklers recurse and end at about a thousand
MAX_DIGITS = 1000
_WINDOW = 1 << 20
_MARGIN = 16  # more than the longest operand of fixed size


class Malformed(Exception):
    """What a pickle says cannot be; holds the fact."""


class Global:
    """A name that a pickle refers to, such as `torch.FloatStorage`; never imported."""

    __slots__ = ("module", "qualname")

    def __init__(self, module: str, qualname: str) -> None:
        self.module = module
        self.qualname = qualname

    @property
    def name(self) -> str:
        """Module and name with a dot between."""
        return f"{self.module}.{self.qualname}"


class Stateful:
    """What a pickle may set attributes of; they come as one value, or several as nested pairs."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: object = None


class Dict(list[object]):
    """A dict as a pickle spells it: key, value, key, value…

    Not hashed, since a key may be anything, such as a tuple of tuples that takes ages to hash; and a key
    that comes twice stays visible. `state` holds attributes, such as the `_metadata` of a state dict.
    """

    __slots__ = ("state",)

    def __init__(self, pairs: tuple[object, ...] | list[object] = ()) -> None:
        super().__init__(pairs)
        self.state: object = None


class Object(Stateful):
    """What calling a global would have made: its name, and everything that was passed to it."""

    __slots__ = ("args", "items", "name", "pairs")

    def __init__(self, name: str, args: object = ()) -> None:
        super().__init__()
        self.name = name
        self.args = args
        self.items: list[object] | None = None
        self.pairs: list[object] | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A string too long to be kept; `kind` is `str` or `bytes`, `size` in bytes."""

    kind: str
    size: int


@dataclass(frozen=True, slots=True)
class Unpickled:
    """A pickle's value, the byte after its end, and the names it refers to."""

    value: object
    end: int
    globals: frozenset[str]


Builder = Callable[[tuple[object, ...]], object]


def load(
    blob: Blob,
    start: int = 0,
    end: int | None = None,
    *,
    file: str,
    part: str,
    builders: Mapping[str, Builder] | None = None,
    persistent: Callable[[object], object] | None = None,
) -> Unpickled:
    """Interpret the pickle that begins at byte `start` of a blob and ends before byte `end`.

    Values are None, bool, int, float, str, bytes, tuple, list, `Dict`, `Object`, `Global`, `Skipped` and
    whatever `builders` (by the global's name, given the arguments) and `persistent` (given the id) make;
    both raise Malformed when they cannot. `file` and `part` name the place in errors.

    Raises SourceError for a pickle that is malformed, truncated, beyond the limits above, or that refers
    to names that only code needs; those are then all named.
    """
    machine = _Machine(blob, start, blob.size if end is None else end, file, part)
    machine.builders.update(builders or {})
    machine.persistent = persistent
    return machine.run()


class _Stop(Exception):
    """The pickle's end."""


class _Machine:
    """The unpickler's registers, and a window on the bytes.

    The window is padded at the end of the stream, so that operands of fixed size can always be read; a
    read beyond the end shows when the next opcode is due.
    """

    def __init__(self, blob: Blob, start: int, end: int, file: str, part: str) -> None:
        self.blob = blob
        self.end = end
        self.file = file
        self.part = part
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.code: dict[str, int] = {}  # name -> offset where it was first met
        self.builders: dict[str, Builder] = dict(_BUILDERS)
        self.persistent: Callable[[object], object] | None = None
        self.start = start
        self.base = start  # where the window lies
        self.data = b""
        self.real = 0  # bytes in the window that are not padding
        self.safe = -1  # last position at which an opcode may begin
        self.loaded = 0
        self.at = 0

    def run(self) -> Unpickled:
        at = 0
        table = _TABLE
        try:
            try:
                for _ in range(MAX_OPCODES):
                    if at > self.safe:
                        at = self.refill(at)
                    self.at = at
                    at = table[self.data[at]](self, at + 1)
                raise Malformed(f"it has more than {MAX_OPCODES:,} opcodes")
            except IndexError:
                raise Malformed("it takes more from its stack than is there") from None
        except _Stop:
            end = self.base + self.at + 1
            if self.code:
                raise self.refusal() from None
            return Unpickled(self.stack[-1], end, frozenset(g.name for g in self.globals.values()))
        except Malformed as error:
            if self.code:
                raise self.refusal() from None
            raise SourceError(
                Problem(
                    f"the pickle `{self.part}` is malformed: {error}",
                    Place(self.file),
                    (f"at byte {self.base + self.at - self.start:,} of the pickle",),
                    "nothing of it was run; the file is damaged or was made to mislead",
                )
            ) from None

    def refusal(self) -> SourceError:
        """The error for a pickle that holds code."""
        first = min(self.code.values()) - self.start
        return SourceError(
            Problem(
                f"the file holds code: its pickle refers to {', '.join(f'`{n}`' for n in self.code)}",
                Place(self.file),
                (f"first at byte {first:,} of `{self.part}`", "nothing was imported or run"),
                "do not open this file with other programs; get the model from another source",
            )
        )

    def refill(self, at: int) -> int:
        """Move the window to position `at` of the present one; the new position, which is 0."""
        self.base += at
        count = min(_WINDOW, self.end - self.base)
        self.data, self.real, self.safe, self.at = b"", 0, -1, 0
        if count <= 0:
            raise Malformed("it ends in the middle")
        self.loaded += count
        if self.loaded > MAX_BYTES:
            raise Malformed(f"it is longer than {MAX_BYTES:,} bytes")
        buffer = bytearray(count + _MARGIN)
        self.blob.read_into(self.base, memoryview(buffer)[:count])
        self.data = bytes(buffer)
        self.real = count
        self.safe = count - (1 if self.base + count == self.end else _MARGIN)
        return 0

    def string(self, at: int, size: int, decode: Callable[[bytes], object]) -> int:
        """Push the string of `size` bytes at `at`; the position after it."""
        stop = at + size
        if stop <= self.real:
            self.stack.append(decode(self.data[at:stop]))
            return stop
        if size > self.end - self.base - at:
            raise Malformed(f"a string of {size:,} bytes goes past its end")
        if size > _WINDOW:
            self.stack.append(Skipped("str" if decode is _utf8 else "bytes", size))
            self.base += stop
            self.real, self.safe = 0, -1
            return 0
        self.refill(at)
        self.stack.append(decode(self.data[:size]))
        return size

    def line(self, at: int) -> tuple[bytes, int]:
        """The line at `at` without its newline, and the position after it."""
        stop = self.data.find(b"\n", at, self.real)
        if stop < 0:
            at = self.refill(at)
            stop = self.data.find(b"\n", at, self.real)
            if stop < 0:
                raise Malformed("a line of it has no end")
        return self.data[at:stop], stop + 1

    def take_mark(self) -> list[object]:
        """The values since the last mark, which they leave."""
        if not self.marks:
            raise Malformed("it goes back to a mark that is not there")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def find(self, module: object, name: object) -> Global:
        """The stub of a global, the same for each mention."""
        if type(module) is not str or type(name) is not str:
            raise Malformed("a global's name is not a string")
        found = self.globals.get((module, name))
        if found is None:
            found = self.globals[module, name] = Global(module, name)
            if holds_code(module, name):
                self.code.setdefault(found.name, self.base + self.at)
        return found

    def call(self, function: object, args: object) -> object:
        """What calling a stub gives: a value where we know how, else an inert object."""
        if type(args) is not tuple:
            raise Malformed("a call's arguments are not a tuple")
        if type(function) is not Global:
            return Object("a call's result", (function, args))
        build = self.builders.get(function.name)
        return build(args) if build else Object(function.name, args)


def _utf8(raw: bytes) -> str:
    return str(raw, "utf-8", "backslashreplace")


def _python2(raw: bytes) -> str | bytes:
    """A string of Python 2: text where it is text."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        return raw


def _integer(raw: bytes) -> int:
    if len(raw) > MAX_DIGITS:
        raise Malformed(f"an integer has {len(raw):,} digits")
    try:
        return int(raw)
    except ValueError:
        raise Malformed("an integer's digits are none") from None


# Opcodes: each handler gets the position after its opcode and returns the one after its operands.

_Handler = Callable[[_Machine, int], int]
_TABLE: list[_Handler] = []


def _unknown(m: _Machine, at: int) -> int:
    raise Malformed(f"byte 0x{m.data[at - 1]:02x} is not an opcode")


_TABLE += [_unknown] * 256


def _opcode(*codes: bytes) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        for code in codes:
            _TABLE[code[0]] = handler
        return handler

    return register


_U16 = struct.Struct("<H").unpack_from
_I32 = struct.Struct("<i").unpack_from
_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from
_F64 = struct.Struct(">d").unpack_from


@_opcode(b"\x80")
def _proto(m: _Machine, at: int) -> int:
    if m.data[at] > 5:
        raise Malformed(f"protocol {m.data[at]} is not known")
    return at + 1


@_opcode(b"\x95")
def _frame(m: _Machine, at: int) -> int:
    (size,) = _U64(m.data, at)
    if size > m.end - m.base - at - 8:
        raise Malformed(f"a frame of {size:,} bytes goes past its end")
    return at + 8


@_opcode(b".")
def _stop(m: _Machine, at: int) -> int:
    if not m.stack or m.marks:
        raise Malformed("it ends without a value")
    raise _Stop


@_opcode(b"(")
def _mark(m: _Machine, at: int) -> int:
    if len(m.marks) >= MAX_DEPTH:
        raise Malformed(f"it is nested more than {MAX_DEPTH:,} deep")
    m.marks.append(m.stack)
    m.stack = []
    return at


@_opcode(b"0")
def _pop(m: _Machine, at: int) -> int:
    if m.stack:
        m.stack.pop()
    else:
        m.take_mark()
    return at


@_opcode(b"1")
def _pop_mark(m: _Machine, at: int) -> int:
    m.take_mark()
    return at


@_opcode(b"2")
def _dup(m: _Machine, at: int) -> int:
    m.stack.append(m.stack[-1])
    return at


# The memo is a dict, since an index may be anything up to 2^32.


@_opcode(b"q")
def _binput(m: _Machine, at: int) -> int:
    m.memo[m.data[at]] = m.stack[-1]
    return at + 1


@_opcode(b"r")
def _long_binput(m: _Machine, at: int) -> int:
    m.memo[_U32(m.data, at)[0]] = m.stack[-1]
    return at + 4


@_opcode(b"\x94")
def _memoize(m: _Machine, at: int) -> int:
    m.memo[len(m.memo)] = m.stack[-1]
    return at


@_opcode(b"p")
def _put(m: _Machine, at: int) -> int:
    raw, at = m.line(at)
    m.memo[_integer(raw)] = m.stack[-1]
    return at


def _recall(m: _Machine, index: int) -> None:
    try:
        m.stack.append(m.memo[index])
    except KeyError:
        raise Malformed(f"it recalls memo {index}, which was never set") from None


@_opcode(b"h")
def _binget(m: _Machine, at: int) -> int:
    _recall(m, m.data[at])
    return at + 1


@_opcode(b"j")
def _long_binget(m: _Machine, at: int) -> int:
    _recall(m, _U32(m.data, at)[0])
    return at + 4


@_opcode(b"g")
def _get(m: _Machine, at: int) -> int:
    raw, at = m.line(at)
    _recall(m, _integer(raw))
    return at


# Scalars.


@_opcode(b"N")
def _none(m: _Machine, at: int) -> int:
    m.stack.append(None)
    return at


@_opcode(b"\x88")
def _true(m: _Machine, at: int) -> int:
    m.stack.append(True)
    return at


@_opcode(b"\x89")
def _false(m: _Machine, at: int) -> int:
    m.stack.append(False)
    return at


@_opcode(b"K")
def _binint1(m: _Machine, at: int) -> int:
    m.stack.append(m.data[at])
    return at + 1


@_opcode(b"M")
def _binint2(m: _Machine, at: int) -> int:
    m.stack.append(_U16(m.data, at)[0])
    return at + 2


@_opcode(b"J")
def _binint(m: _Machine, at: int) -> int:
    m.stack.append(_I32(m.data, at)[0])
    return at + 4


@_opcode(b"I")
def _int(m: _Machine, at: int) -> int:
    raw, at = m.line(at)
    m.stack.append(raw == b"01" if raw in (b"00", b"01") else _integer(raw))
    return at


@_opcode(b"L")
def _long(m: _Machine, at: int) -> int:
    raw, at = m.line(at)
    m.stack.append(_integer(raw.removesuffix(b"L")))
    return at


def _long_bytes(m: _Machine, at: int, size: int) -> int:
    if not 0 <= size <= MAX_DIGITS:
        raise Malformed(f"an integer has {size:,} bytes")
    return m.string(at, size, lambda raw: int.from_bytes(raw, "little", signed=True))


@_opcode(b"\x8a")
def _long1(m: _Machine, at: int) -> int:
    return _long_bytes(m, at + 1, m.data[at])


@_opcode(b"\x8b")
def _long4(m: _Machine, at: int) -> int:
    return _long_bytes(m, at + 4, _I32(m.data, at)[0])


@_opcode(b"F")
def _float(m: _Machine, at: int) -> int:
    raw, at = m.line(at)
    try:
        m.stack.append(float(raw))
    except ValueError:
        raise Malformed("a number's digits are none") from None
    return at


@_opcode(b"G")
def _binfloat(m: _Machine, at: int) -> int:
    m.stack.append(_F64(m.data, at)[0])
    return at + 8


# Strings.


@_opcode(b"X")
def _binunicode(m: _Machine, at: int) -> int:
    return m.string(at + 4, _U32(m.data, at)[0], _utf8)


@_opcode(b"\x8c")
def _short_binunicode(m: _Machine, at: int) -> int:
    return m.string(at + 1, m.data[at], _utf8)


@_opcode(b"\x8d")
def _binunicode8(m: _Machine, at: int) -> int:
    return m.string(at + 8, _U64(m.data, at)[0], _utf8)


@_opcode(b"B")
def _binbytes(m: _Machine, at: int) -> int:
    return m.string(at + 4, _U32(m.data, at)[0], bytes)


@_opcode(b"C")
def _short_binbytes(m: _Machine, at: int) -> int:
    return m.string(at + 1, m.data[at], bytes)


@_opcode(b"\x8e", b"\x96")
def _binbytes8(m: _Machine, at: int) -> int:
    return m.string(at + 8, _U64(m.data, at)[0], bytes)


@_opcode(b"T")
def _binstring(m: _Machine, at: int) -> int:
    (size,) = _I32(m.data, at)
    if size < 0:
        raise Malformed(f"a string has {size} bytes")
    return m.string(at + 4, size, _python2)


@_opcode(b"U")
def _short_binstring(m: _Machine, at: int) -> int:
    return m.string(at + 1, m.data[at], _python2)


_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_LETTERS = dict(zip(b"abfnrtv", b"\a\b\f\n\r\t\v", strict=True))


def _unescape(match: re.Match[bytes]) -> bytes:
    body = match[1]
    if len(body) == 3 and body[:1] == b"x":
        return bytes([int(body[1:], 16)])
    if body.isdigit() and body < b"8":
        return bytes([int(body, 8) & 0xFF])
    return bytes([_LETTERS[body[0]]]) if body[0] in _LETTERS else body


@_opcode(b"S")
def _string(m: _Machine, at: int) -> int:
    raw, at = m.line(at)
    raw = raw.strip()
    if len(raw) < 2 or raw[0] != raw[-1] or raw[:1] not in (b"'", b'"'):
        raise Malformed("a string has no quotes")
    m.stack.append(_python2(_ESCAPE.sub(_unescape, raw[1:-1])))
    return at


@_opcode(b"V")
def _unicode(m: _Machine, at: int) -> int:
    raw, at = m.line(at)
    try:
        text = str(raw, "raw-unicode-escape")
    except UnicodeDecodeError:
        raise Malformed("a string's escapes are wrong") from None
    m.stack.append(text.encode("utf-8", "backslashreplace").decode("utf-8"))
    return at


# Containers.


@_opcode(b")")
def _empty_tuple(m: _Machine, at: int) -> int:
    m.stack.append(())
    return at


@_opcode(b"\x85")
def _tuple1(m: _Machine, at: int) -> int:
    m.stack[-1] = (m.stack[-1],)
    return at


@_opcode(b"\x86")
def _tuple2(m: _Machine, at: int) -> int:
    last = m.stack.pop()
    m.stack[-1] = (m.stack[-1], last)
    return at


@_opcode(b"\x87")
def _tuple3(m: _Machine, at: int) -> int:
    last, middle = m.stack.pop(), m.stack.pop()
    m.stack[-1] = (m.stack[-1], middle, last)
    return at


@_opcode(b"t")
def _tuple(m: _Machine, at: int) -> int:
    items = m.take_mark()
    m.stack.append(tuple(items))
    return at


@_opcode(b"]")
def _empty_list(m: _Machine, at: int) -> int:
    m.stack.append([])
    return at


@_opcode(b"l")
def _list(m: _Machine, at: int) -> int:
    items = m.take_mark()
    m.stack.append(items)
    return at


@_opcode(b"}")
def _empty_dict(m: _Machine, at: int) -> int:
    m.stack.append(Dict())
    return at


def _paired(items: list[object]) -> list[object]:
    if len(items) % 2:
        raise Malformed("a dict's last key has no value")
    return items


@_opcode(b"d")
def _dict(m: _Machine, at: int) -> int:
    items = m.take_mark()
    m.stack.append(Dict(_paired(items)))
    return at


def _collection(name: str, items: list[object] | None = None) -> Object:
    made = Object(name)
    made.items = items
    return made


@_opcode(b"\x8f")
def _empty_set(m: _Machine, at: int) -> int:
    m.stack.append(_collection("builtins.set"))
    return at


@_opcode(b"\x91")
def _frozenset(m: _Machine, at: int) -> int:
    items = m.take_mark()
    m.stack.append(_collection("builtins.frozenset", items))
    return at


def _extend(target: object, items: list[object]) -> None:
    if type(target) is list:
        target.extend(items)
    elif type(target) is Object:
        if target.items is None:
            target.items = []
        target.items.extend(items)
    else:
        raise Malformed("it adds items to what is no list")


@_opcode(b"a")
def _append(m: _Machine, at: int) -> int:
    item = m.stack.pop()
    _extend(m.stack[-1], [item])
    return at


@_opcode(b"e", b"\x90")
def _appends(m: _Machine, at: int) -> int:
    items = m.take_mark()
    _extend(m.stack[-1], items)
    return at


def _update(target: object, items: list[object]) -> None:
    if type(target) is Dict:
        target.extend(_paired(items))
    elif type(target) is Object:
        if target.pairs is None:
            target.pairs = []
        target.pairs.extend(_paired(items))
    else:
        raise Malformed("it sets keys of what is no dict")


@_opcode(b"s")
def _setitem(m: _Machine, at: int) -> int:
    value, key = m.stack.pop(), m.stack.pop()
    _update(m.stack[-1], [key, value])
    return at


@_opcode(b"u")
def _setitems(m: _Machine, at: int) -> int:
    items = m.take_mark()
    _update(m.stack[-1], items)
    return at


# Names, and what would be calls.


@_opcode(b"c")
def _global(m: _Machine, at: int) -> int:
    module, at = m.line(at)
    name, at = m.line(at)
    m.stack.append(m.find(_utf8(module), _utf8(name)))
    return at


@_opcode(b"\x93")
def _stack_global(m: _Machine, at: int) -> int:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.find(module, name))
    return at


@_opcode(b"i")
def _inst(m: _Machine, at: int) -> int:
    module, at = m.line(at)
    name, at = m.line(at)
    args = m.take_mark()
    m.stack.append(m.call(m.find(_utf8(module), _utf8(name)), tuple(args)))
    return at


@_opcode(b"o")
def _obj(m: _Machine, at: int) -> int:
    items = m.take_mark()
    m.stack.append(m.call(items[0], tuple(items[1:])))
    return at


@_opcode(b"R", b"\x81")
def _reduce(m: _Machine, at: int) -> int:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args)
    return at


@_opcode(b"\x92")
def _newobj_ex(m: _Machine, at: int) -> int:
    named, args = m.stack.pop(), m.stack.pop()
    made = m.call(m.stack[-1], args)
    if type(named) is not Dict:
        raise Malformed("a call's named arguments are not a dict")
    if named:
        made = Object(made.name, (args, named)) if type(made) is Object else made
    m.stack[-1] = made
    return at


@_opcode(b"b")
def _build(m: _Machine, at: int) -> int:
    state = m.stack.pop()
    target = m.stack[-1]
    if not isinstance(target, (Dict, Stateful)):
        raise Malformed("it sets attributes of what has none")
    target.state = state if target.state is None else (target.state, state)
    return at


@_opcode(b"Q")
def _binpersid(m: _Machine, at: int) -> int:
    m.stack[-1] = _persistent(m, m.stack[-1])
    return at


@_opcode(b"P")
def _persid(m: _Machine, at: int) -> int:
    raw, at = m.line(at)
    m.stack.append(_persistent(m, _utf8(raw)))
    return at


def _persistent(m: _Machine, key: object) -> object:
    if m.persistent is None:
        raise Malformed("it refers to something outside itself")
    return m.persistent(key)


@_opcode(b"\x82", b"\x83", b"\x84")
def _extension(m: _Machine, at: int) -> int:
    raise Malformed("it refers to the reader's own registry of extensions")


@_opcode(b"\x97", b"\x98")
def _buffer(m: _Machine, at: int) -> int:
    raise Malformed("it refers to buffers that are not in the file")


# Calls whose results are values.


def _make_dict(args: tuple[object, ...]) -> object:
    """OrderedDict, dict and their like, from nothing, a dict or a list of pairs."""
    made = Dict()
    source = args[-1] if args else None
    if type(source) is Dict:
        made.extend(source)
    elif type(source) in (list, tuple):
        assert isinstance(source, (list, tuple))
        for pair in source:
            if not isinstance(pair, (list, tuple)) or type(pair) is Dict or len(pair) != 2:
                raise Malformed("a dict is made of what are not pairs")
            made.extend(pair)
    elif source is not None and type(source) is not Global:
        raise Malformed("a dict is made of what are not pairs")
    return made


def _sequence(args: tuple[object, ...]) -> list[object]:
    if not args:
        return []
    source = args[0]
    if len(args) == 1 and type(source) in (list, tuple):
        assert isinstance(source, (list, tuple))
        return list(source)
    if len(args) == 1 and type(source) is Object:
        return list(source.items or ())
    raise Malformed("a list is made of what is no list")


def _encode(args: tuple[object, ...]) -> object:
    """`_codecs.encode(text, "latin1")`: how protocols before 3 spell bytes."""
    match args:
        case (str() as text, str() as coding) if coding.replace("-", "") in ("latin1", "iso88591"):
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                raise Malformed("bytes are spelt with characters that are none") from None
    return Object("_codecs.encode", args)


def _make_bytes(args: tuple[object, ...]) -> object:
    match args:
        case ():
            return b""
        case (bytes() as raw,):
            return raw
        case (str(), str()):
            return _encode(args)
    return Object("builtins.bytes", args)


def _reconstruct(args: tuple[object, ...]) -> object:
    """`copyreg._reconstructor(class, base, state)`: how protocols 0 and 1 spell objects."""
    match args:
        case (Global() as cls, Global(), state):
            if cls.name in ("collections.OrderedDict", "builtins.dict", "__builtin__.dict"):
                return Dict()
            return Object(cls.name, () if state is None else (state,))
    return Object("copyreg._reconstructor", args)


def _newobj(args: tuple[object, ...]) -> object:
    match args:
        case (Global() as cls, *rest):
            return Object(cls.name, tuple(rest))
    return Object("copyreg.__newobj__", args)


_BUILDERS: dict[str, Builder] = {
    "collections.OrderedDict": _make_dict,
    "_collections.OrderedDict": _make_dict,
    "collections.defaultdict": _make_dict,
    "collections.Counter": _make_dict,
    "_codecs.encode": _encode,
}
for _module in ("builtins", "__builtin__"):
    _BUILDERS |= {
        f"{_module}.dict": _make_dict,
        f"{_module}.list": _sequence,
        f"{_module}.tuple": lambda args: tuple(_sequence(args)),
        f"{_module}.set": lambda args: _collection("builtins.set", _sequence(args)),
        f"{_module}.frozenset": lambda args: _collection("builtins.frozenset", _sequence(args)),
        f"{_module}.bytes": _make_bytes,
        f"{_module}.bytearray": _make_bytes,
    }
for _module in ("copyreg", "copy_reg"):
    _BUILDERS |= {f"{_module}._reconstructor": _reconstruct, f"{_module}.__newobj__": _newobj}
