"""Tensors and storages as PyTorch's pickles refer to them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from builder.formats.torch.pickles import Builder, Global, Malformed, Object, Stateful
from builder.tensors.lazy import BY_TORCH_NAME, DType

MAX_DIMS = 64  # PyTorch's own limit

# Element types by the name of their storage class; types that a tensor of ours cannot have, as text.
_STORAGES: dict[str, DType | tuple[str, int]] = {
    "BFloat16Storage": DType.BF16,
    "BoolStorage": DType.BOOL,
    "ByteStorage": DType.U8,
    "CharStorage": DType.I8,
    "ComplexDoubleStorage": ("complex128", 16),
    "ComplexFloatStorage": DType.C64,
    "DoubleStorage": DType.F64,
    "FloatStorage": DType.F32,
    "HalfStorage": DType.F16,
    "IntStorage": DType.I32,
    "LongStorage": DType.I64,
    "QInt32Storage": ("qint32", 4),
    "QInt8Storage": ("qint8", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt8Storage": ("quint8", 1),
    "ShortStorage": DType.I16,
    "UntypedStorage": DType.U8,
    "_UntypedStorage": DType.U8,
}
_FOREIGN_TYPES = {"complex128": 16, "cdouble": 16, "complex32": 4, "chalf": 4}
_ALIASES = {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32"}
_ALIASES |= {"short": "int16", "cfloat": "complex64"}


@dataclass(frozen=True, slots=True)
class Elements:
    """An element type: its name, bytes an element, and the type of ours where there is one."""

    name: str
    itemsize: int
    dtype: DType | None


def _elements(found: DType | tuple[str, int]) -> Elements:
    if isinstance(found, DType):
        return Elements(str(found.torch_name), found.itemsize, found)
    return Elements(*found, None)


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements in the file, by its key there; `start` and `numel` in elements.

    `start` is not 0 only for the views on a storage that the oldest files have.
    """

    key: object
    elements: Elements
    numel: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.elements.itemsize


class TensorRef(Stateful):
    """A tensor as a view of a storage; offset and strides in elements of the tensor's own type."""

    __slots__ = ("elements", "offset", "shape", "storage", "strides")

    def __init__(
        self,
        storage: Storage,
        elements: Elements,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.storage = storage
        self.elements = elements
        self.offset = offset
        self.shape = shape
        self.strides = strides

    @classmethod
    def whole(cls, storage: Storage) -> TensorRef:
        """All of a storage, as a vector."""
        return cls(storage, storage.elements, 0, (storage.numel,), (1,))

    @property
    def extent(self) -> int:
        """Elements of the storage from its first one to the view's last one; 0 for an empty view."""
        if 0 in self.shape:
            return 0
        return self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of the view's elements."""
        return prod(self.shape) * self.elements.itemsize


def kind_of(cls: Global) -> Elements:
    """The element type of a storage class, by its name, as PyTorch does; raises Malformed."""
    found = _STORAGES.get(cls.qualname)
    if found is None:
        raise Malformed(f"`{cls.name}` is not a known kind of storage")
    return _elements(found)


def storage_of(key: object) -> Storage:
    """The storage that a persistent id means; raises Malformed."""
    match key:
        case (kind, Global() as cls, (str() | bytes() | int()) as name, _, numel) if (
            kind == "storage" or kind == b"storage"
        ):
            if type(numel) is not int or not 0 <= numel < 1 << 63:
                raise Malformed("a storage's number of elements is none")
            text = name.decode("ascii", "backslashreplace") if isinstance(name, bytes) else name
            return Storage(text, kind_of(cls), numel)
    raise Malformed("it refers to something outside itself that is no storage")


def elements_of(value: object) -> Elements:
    """The element type that a global such as `torch.float8_e4m3fn` names; raises Malformed."""
    if isinstance(value, Global) and value.module == "torch":
        name = _ALIASES.get(value.qualname, value.qualname)
        found = BY_TORCH_NAME.get(name)
        if found and found.bits >= 8:
            return _elements(found)
        if name in _FOREIGN_TYPES:
            return Elements(name, _FOREIGN_TYPES[name], None)
    if isinstance(value, Global):
        raise Malformed(f"`{value.name}` is not a known element type")
    raise Malformed("an element type is not a name")


def _sizes(value: object) -> tuple[int, ...]:
    if type(value) is not tuple and type(value) is not list:
        raise Malformed("a tensor's shape or strides are no tuple")
    if len(value) > MAX_DIMS:
        raise Malformed(f"a tensor has {len(value):,} dimensions")
    for size in value:
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise Malformed("a tensor's shape or strides are no counts")
    return tuple(value)


def tensor_of(
    storage: object, offset: object, shape: object, strides: object, elements: Elements | None = None
) -> TensorRef:
    """A view of a storage, which it must lie in; raises Malformed."""
    sizes, steps = _sizes(shape), _sizes(strides)
    if not isinstance(storage, Storage):
        raise Malformed("a tensor's storage is none")
    if type(offset) is not int or not 0 <= offset < 1 << 63 or len(sizes) != len(steps):
        raise Malformed("a tensor's offset, shape and strides do not fit together")
    made = TensorRef(storage, elements or storage.elements, offset, sizes, steps)
    if made.extent * made.elements.itemsize > storage.nbytes:
        raise Malformed(f"a tensor of shape {list(sizes)} goes past its storage of {storage.nbytes:,} bytes")
    return made


def _rebuild(args: tuple[object, ...]) -> object:
    if len(args) != 4:
        raise Malformed("a tensor is made of the wrong number of things")
    return tensor_of(args[0], args[1], args[2], args[3])


def _marked(made: object, metadata: object) -> object:
    """A tensor whose bits are to be read as conjugated or negated is not what its bytes say."""
    return Object("a tensor with bits to be negated", (made,)) if metadata else made


def _rebuild_v2(args: tuple[object, ...]) -> object:
    if not 4 <= len(args) <= 7:
        raise Malformed("a tensor is made of the wrong number of things")
    return _marked(tensor_of(args[0], args[1], args[2], args[3]), args[6] if len(args) > 6 else None)


def _rebuild_v3(args: tuple[object, ...]) -> object:
    if not 7 <= len(args) <= 8:
        raise Malformed("a tensor is made of the wrong number of things")
    return _marked(
        tensor_of(args[0], args[1], args[2], args[3], elements_of(args[6])),
        args[7] if len(args) > 7 else None,
    )


def _parameter(args: tuple[object, ...]) -> object:
    if not args:
        return Object("torch.nn.Parameter")
    made = args[0]
    if len(args) > 3 and isinstance(made, Stateful) and made.state is None:
        made.state = args[3]
    return made


def _from_type(args: tuple[object, ...]) -> object:
    """A tensor of a subclass: made as another rebuilder makes it, then given attributes."""
    match args:
        case (Global() as function, _, tuple() as inner, state):
            build = BUILDERS.get(function.name)
            made = build(inner) if build and build is not _from_type else Object(function.name, inner)
            if state is not None and isinstance(made, Stateful) and made.state is None:
                made.state = state
            return made
    raise Malformed("a tensor's subclass is made of the wrong things")


def _on_device(args: tuple[object, ...]) -> object:
    match args:
        case (TensorRef() as made, Global() as dtype, *_) if elements_of(dtype) == made.elements:
            return made
    return Object("torch._utils._rebuild_device_tensor_from_cpu_tensor", args)


def _size(args: tuple[object, ...]) -> object:
    match args:
        case ((tuple() | list()) as sizes,):
            return tuple(sizes)
    return Object("torch.Size", args)


BUILDERS: dict[str, Builder] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _on_device,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.tensor._rebuild_from_type": _from_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.nn.parameter.Buffer": _parameter,
    "torch.Size": _size,
}
