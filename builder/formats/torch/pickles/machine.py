"""The registers of an unpickler, and its window on the bytes."""

from __future__ import annotations

from collections.abc import Callable

from builder.formats.blob import Blob
from builder.formats.torch.pickles.policy import holds_code
from builder.formats.torch.pickles.values import Dict, Global, Malformed, Object, Skipped

# A checkpoint of 10,000 tensors with optimizer states needs about a million opcodes, and a tenth of what is
# allowed of the rest.
MAX_OPCODES = 4_000_000
MAX_VALUES = 600_000  # lists, tuples, dicts and objects, of some hundred bytes each; and as many memos
MAX_BYTES = 256 << 20  # read, without long strings
MAX_TEXT = 32 << 20  # bytes of all strings that are kept
MAX_STRING = 64 << 10  # bytes of one that is kept
MAX_COPIED = 64 << 20  # bytes of references
MAX_DEPTH = 100_000  # of open marks; picklers recurse and end at about a thousand
MAX_GLOBALS = 10_000
MAX_NAME = 1_000  # characters of a global's module or name

_FIRST_WINDOW = 8 << 10  # many a pickle is tiny
_WINDOW = 1 << 20
_MARGIN = 16  # more than the longest operand of fixed size

Builder = Callable[[tuple[object, ...]], object]
Persistent = Callable[[object], object]


class Machine:
    """An unpickler that imports nothing: stack, marks, memo and the globals met so far.

    The window is padded at the end of the stream, so that operands of fixed size can always be read; a
    read beyond the end shows when the next opcode is due.
    """

    def __init__(
        self, blob: Blob, start: int, end: int, builders: dict[str, Builder], persistent: Persistent | None
    ) -> None:
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}  # an index may be anything up to 2^32
        self.globals: dict[tuple[str, str], Global] = {}
        self.code: dict[str, int] = {}  # name that holds code -> where it was first met
        self.data = b""
        self.real = 0  # bytes in the window that are not padding
        self.safe = -1  # last position at which an opcode may begin
        self.at = 0  # where the present opcode is
        self._blob = blob
        self._base = start
        self._end = end
        self._builders = builders
        self._persistent = persistent
        self._window = _FIRST_WINDOW
        self._unread = MAX_BYTES
        self._uncopied = MAX_COPIED
        self._unmade = MAX_VALUES
        self._unkept = MAX_TEXT

    @property
    def position(self) -> int:
        """Where the present opcode is in the blob."""
        return self._base + self.at

    def left(self, at: int) -> int:
        """Bytes from position `at` of the window to the end of the stream; negative beyond it."""
        return self._end - self._base - at

    def refill(self, at: int, least: int = 0) -> int:
        """Move the window to position `at` of the present one; the new position, which is 0."""
        kept = self.data[at : self.real]  # not read twice, which costs a deflated blob dear
        self._base += at
        left = self._end - self._base
        count = min(max(self._window, least + _MARGIN), left)
        self._window = _WINDOW
        self.data, self.real, self.safe, self.at = b"", 0, -1, 0
        if count <= 0:
            raise Malformed("it ends in the middle")
        self._unread -= count - len(kept)
        if self._unread < 0:
            raise Malformed(f"it has more than {MAX_BYTES:,} bytes")
        buffer = bytearray(count + _MARGIN)
        buffer[: len(kept)] = kept
        self._blob.read_into(self._base + len(kept), memoryview(buffer)[len(kept) : count])
        self.data = bytes(buffer)
        self.real = count
        self.safe = count - (1 if count == left else _MARGIN)
        return 0

    def string(self, at: int, size: int, decode: Callable[[bytes], object]) -> int:
        """Push the string of `size` bytes at `at`, decoded; the position after it."""
        stop = at + size
        if not 0 <= size <= self.left(at):
            raise Malformed(f"a string of {size:,} bytes goes past its end")
        if size > MAX_STRING:
            self.stack.append(Skipped("bytes" if decode is bytes else "str", size))
            if stop <= self.real:
                return stop
            self._base += stop
            self.data, self.real, self.safe = b"", 0, -1
            return 0
        self.keep(size)
        if stop > self.real:
            self.refill(at, size)
            at, stop = 0, size
        self.stack.append(decode(self.data[at:stop]))
        return stop

    def keep(self, size: int) -> None:
        """Count a string of so many bytes."""
        self._unkept -= size
        if self._unkept < 0:
            raise Malformed(f"its strings have more than {MAX_TEXT:,} bytes")

    def make(self, value: object) -> None:
        """Push a new container."""
        self.count()
        self.stack.append(value)

    def count(self) -> None:
        """Count a new container."""
        self._unmade -= 1
        if self._unmade < 0:
            raise Malformed(f"it has more than {MAX_VALUES:,} lists, dicts and objects")

    def memoize(self, index: int) -> None:
        """Keep the newest value in the memo."""
        self.memo[index] = self.stack[-1]
        if len(self.memo) > MAX_VALUES:
            raise Malformed(f"it has more than {MAX_VALUES:,} memos")

    def line(self, at: int) -> tuple[bytes, int]:
        """The line at `at` without its newline, and the position after it."""
        stop = self.data.find(b"\n", at, self.real)
        if stop < 0:
            at = self.refill(at, MAX_STRING)
            stop = self.data.find(b"\n", 0, self.real)
        if not at <= stop <= at + MAX_STRING:
            raise Malformed("a line of it is too long" if stop > at else "a line of it has no end")
        return self.data[at:stop], stop + 1

    def mark(self) -> None:
        """Begin a new run of values."""
        if len(self.marks) >= MAX_DEPTH:
            raise Malformed(f"it is nested more than {MAX_DEPTH:,} deep")
        self.marks.append(self.stack)
        self.stack = []

    def marked(self) -> list[object]:
        """The values since the last mark, which end."""
        if not self.marks:
            raise Malformed("it goes back to a mark that is not there")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def recall(self, index: int) -> None:
        """Push what the memo holds."""
        try:
            self.stack.append(self.memo[index])
        except KeyError:
            raise Malformed(f"it recalls memo {index}, which was never set") from None

    def find(self, module: object, name: object) -> Global:
        """The stub of a global, the same for each mention."""
        if type(module) is not str or type(name) is not str:
            raise Malformed("a global's name is not a string")
        found = self.globals.get((module, name))
        if found is None:
            if len(module) > MAX_NAME or len(name) > MAX_NAME or len(self.globals) >= MAX_GLOBALS:
                raise Malformed("it refers to names that are too long or too many")
            found = self.globals[module, name] = Global(module, name)
            if holds_code(module, name):
                self.code.setdefault(found.name, self.position)
        return found

    def call(self, function: object, args: object) -> object:
        """What calling a stub gives: a value where we know how, else an inert object."""
        if type(args) is not tuple:
            raise Malformed("a call's arguments are not a tuple")
        if type(function) is not Global:
            self.count()
            return Object("the result of a call", (function, args))
        self.count()
        build = self._builders.get(function.name)
        if build is None:
            return Object(function.name, args)
        made = build(args)
        # A short opcode can make a long copy, again and again.
        self._uncopied -= 8 * len(args)
        if isinstance(made, (list, tuple)):
            self._uncopied -= 8 * len(made)
        elif isinstance(made, bytes):
            self._uncopied -= len(made)
        elif type(made) is Object and made.items:
            self._uncopied -= 8 * len(made.items)
        if self._uncopied < 0:
            raise Malformed("it makes copies of copies")
        return made

    def persistent(self, key: object) -> object:
        """What an id of something outside the pickle stands for."""
        if self._persistent is None:
            raise Malformed("it refers to something outside itself")
        return self._persistent(key)


def extend(target: object, items: list[object]) -> None:
    """Append items to a list or to what was one."""
    if type(target) is list:
        target.extend(items)
    elif type(target) is Object:
        target.items = target.items or []
        target.items.extend(items)
    else:
        raise Malformed("it adds items to what is no list")


def update(target: object, items: list[object]) -> None:
    """Set keys of a dict or of what was one; `items` are keys and values in turn."""
    if len(items) % 2:
        raise Malformed("a dict's last key has no value")
    if type(target) is Dict:
        target.extend(items)
    elif type(target) is Object:
        target.pairs = target.pairs or []
        target.pairs.extend(items)
    else:
        raise Malformed("it sets keys of what is no dict")
