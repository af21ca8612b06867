"""Packed weights as numbers: each the exact value of what is stored, rounded once to FP32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from builder.base.errors import Place, Problem, SourceError
from builder.base.words import counted
from builder.tensors.conversions import floats
from builder.tensors.lazy import DType, LazyTensor
from builder.tensors.merged import ELEMENTS
from builder.tensors.packed.schemes import (
    DESCRIPTION,
    MARKER,
    OF_INPUT,
    Packing,
    Shape,
    description,
    packing,
    split,
    up,
)

if TYPE_CHECKING:
    import torch

Tile = Callable[[int, int, int, int], "torch.Tensor"]


class Decoded(LazyTensor):
    """A packed weight as FP32, decoded as it is read: some rows, or a part of one, at a time.

    `tile` gives the numbers of so many rows and columns from a first row and column on; the columns begin at
    a multiple of `align`, and are `width` of a whole row: those beyond the weight's own are padding.
    """

    __slots__ = ("align", "columns", "tile", "width")

    def __init__(self, shape: Shape, tile: Tile, *, columns: int, width: int, align: int = 1) -> None:
        super().__init__(DType.F32, shape)
        self.tile, self.columns, self.width, self.align = tile, columns, width, align

    @property
    def computed(self) -> bool:
        """True: torch multiplies."""
        return True

    def read_into(self, start: int, out: memoryview) -> None:
        """Decode the range, at most a window of elements at a time, however long a row is."""
        import torch

        target = torch.frombuffer(out, dtype=torch.float32)
        first, at = start // 4, start // 4
        end = first + len(target)
        while at < end:
            row, column = divmod(at, self.columns)
            rows = 0 if column else min(ELEMENTS // self.width, (end - at) // self.columns)
            if rows:
                made = self.tile(row, rows, 0, self.width)[:, : self.columns]
            else:
                low = column // self.align * self.align
                stop = min(self.columns, column + end - at, low + ELEMENTS)
                made = self.tile(row, 1, low, up(stop, self.align) - low)[:, column - low : stop - low]
            target[at - first :][: made.numel()].view(made.shape).copy_(made)
            at += made.numel()


class Numbers(NamedTuple):
    """Tensors of which none is packed any more, and what was decoded, in words."""

    tensors: dict[str, LazyTensor]
    words: tuple[str, ...] = ()


def decoded(
    tensors: Mapping[str, LazyTensor], shapes: Mapping[str, Shape], hint: str, place: Place | None = None
) -> Numbers:
    """The tensors with every packed weight as numbers, its companions gone; nothing but they are read.

    `shapes` are those of the weights where they are known: what is padded does not say it. Raises SourceError
    for what cannot be decoded, by the name of its scheme; `hint` says what can be done, `place` is the file.
    """
    packed = packing(tensors)
    if not packed:
        return Numbers(dict(tensors))
    spent = {side for beside in packed.weights.values() for side in beside}
    idle = 0
    made: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        try:
            if name in packed.weights:
                made[name] = _decoder(packed, name, shapes.get(name))
            elif name not in packed.companions:
                made[name] = tensor
            elif name not in spent:
                if _is_idle(packed, name):
                    idle += 1
                else:
                    made[name] = tensor
        except _OddError as odd:
            scheme = packed.scheme(name) if name in packed.weights else packed.companions[name].name
            fact = f"{scheme} weights cannot be decoded"
            raise SourceError(Problem(fact, place, (f"`{name}`: {odd}",), hint)) from None
    words = []
    if packed.weights:
        words.append(f"decoded: {counted(len(packed.weights), 'weight')} of {packed.named}")
    if idle:
        words.append(
            f"left out: {counted(idle, 'tensor')} that would have plain weights taken for packed ones"
        )
    return Numbers(made, tuple(words))


class _OddError(Exception):
    """Why a weight cannot be decoded."""


class _Layer(NamedTuple):
    """A packed weight, what lies beside it by the name of its kind, what describes it, and its shape."""

    weight: LazyTensor
    beside: Mapping[str, LazyTensor]
    said: Mapping[str, Any]
    shape: Shape | None

    def side(self, name: str, *types: DType) -> LazyTensor:
        """A companion that must be there."""
        if name not in self.beside:
            raise _OddError(f"its `{name}` is missing")
        if (held := self.beside[name]).dtype not in types:
            raise _OddError(f"its `{name}` is {held.dtype.code}")
        return held

    def told(self, key: str, default: Any) -> Any:
        """What the description says, where it may be nested."""
        nested = self.said.get("params")
        return self.said.get(key, nested.get(key, default) if isinstance(nested, dict) else default)


# What a decoder gives for a layer; what else may lie beside it says nothing of its value.
_Decoder = Callable[[_Layer], LazyTensor]
_SCALES = {"weight_scale", "scale_weight", "weight_scale_2", "weight_scale_inv"}
_FLOATS = (DType.F32, DType.F16, DType.BF16, DType.F64)
_F8 = (DType.F8_E4M3, DType.F8_E5M2, DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ)


def _decoder(packed: Packing, name: str, shape: Shape | None) -> LazyTensor:
    """A weight as numbers; raises _OddError."""
    weight = packed.tensors[name]
    beside = {split(full)[1]: packed.tensors[full] for full in packed.weights[name]}
    if beside.keys() == {MARKER}:
        return weight  # a plain FP8 among scaled ones
    said: Mapping[str, Any] = {}
    kind = packed.scheme(name)
    if DESCRIPTION in beside:
        said = description(beside[DESCRIPTION]) or {}
        if not isinstance(said.get("format"), str):
            raise _OddError("its description has no `format`")
        kind = said["format"]
    if kind not in _KINDS:
        raise _OddError(_WHY_NOT.get(kind, _UNKNOWN))
    types, sides, make = _KINDS[kind]
    if weight.dtype not in types:
        raise _OddError(f"it is {weight.dtype.code}")
    if odd := sorted(beside.keys() - sides - OF_INPUT):
        raise _OddError(f"it has a `{odd[0]}`, and nothing is known of such")
    layer = _Layer(weight, beside, said, shape)
    if kind not in _TURNED and layer.told("convrot", False) is not False:
        raise _OddError(f"its description says `convrot`, which is not known of {kind}")
    made = make(layer)
    if shape is not None and made.shape != shape:
        raise _OddError(f"it is {list(made.shape)}, not {list(shape)}")
    return made


def _is_idle(packed: Packing, name: str) -> bool:
    """Whether a companion without a packed weight says nothing, or that one is packed which is not.

    Raises _OddError where it says much.
    """
    layer, side = split(name)
    tensor = packed.tensors[name]
    if packed.companions[name].name in _WHY_NOT:
        raise _OddError(_WHY_NOT[packed.companions[name].name])
    beside = f"{layer}.weight" in packed.tensors
    if side == MARKER or (side == DESCRIPTION and beside):
        return True
    if side not in _SCALES or not beside:
        return False
    if tensor.numel == 1 and tensor.dtype in _FLOATS and float(_floats(tensor)) == 1.0:
        return True
    raise _OddError("it lies beside a weight that is not packed")


# ── reading ──


def _read(tensor: LazyTensor, first: int, count: int, dtype: DType | None = None) -> torch.Tensor:
    """Some elements, in a type of as many bits where that is another."""
    import torch

    data = bytearray(count * tensor.dtype.itemsize)
    if not data:
        return torch.empty(0)
    tensor.read_into(first * tensor.dtype.itemsize, memoryview(data))
    return torch.frombuffer(data, dtype=(dtype or tensor.dtype).torch)


def _floats(tensor: LazyTensor) -> torch.Tensor:
    return floats(_read(tensor, 0, tensor.numel))


def _matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns; a tensor of more dimensions is one of rows."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


# ── a scale for all, or for each row ──


def _scaled(layer: _Layer) -> LazyTensor:
    """Numbers times their scale."""
    if {"scale_weight", "weight_scale"} <= layer.beside.keys():
        raise _OddError("it has both a `weight_scale` and a `scale_weight`")
    name = "scale_weight" if "scale_weight" in layer.beside else "weight_scale"
    scale = layer.side(name, *_FLOATS)
    return _by_row(layer, scale, layer.weight.shape, _plain, 0)


def _int8(layer: _Layer) -> LazyTensor:
    """The same of integers, in a rotated basis where the description says so."""
    turned = layer.told("convrot", False)
    if not isinstance(turned, bool):
        raise _OddError(f"its description says `convrot` {turned!r:.40}")
    return _by_row(
        layer,
        layer.side("weight_scale", *_FLOATS),
        layer.weight.shape,
        _plain,
        _group(layer) if turned else 0,
    )


def _int4(layer: _Layer) -> LazyTensor:
    """Two integers a byte, the lower half first, in a rotated basis."""
    scale = layer.side("weight_scale", *_FLOATS)
    if len(layer.weight.shape) != 2:
        raise _OddError(f"it is {list(layer.weight.shape)}, and no matrix")
    rows, half = layer.weight.shape
    return _by_row(layer, scale, (rows, 2 * half), _nibbles, _group(layer))


def _group(layer: _Layer) -> int:
    """So many columns are rotated together."""
    size = layer.told("convrot_groupsize", 256)
    if size not in (4, 16, 64, 256, 1024, 4096) or isinstance(size, bool):
        raise _OddError(f"its description says `convrot_groupsize` {size!r:.40}, which is no power of 4")
    return int(size)


def _plain(weight: LazyTensor, first: int, count: int) -> torch.Tensor:
    return floats(_read(weight, first, count))


def _nibbles(weight: LazyTensor, first: int, count: int) -> torch.Tensor:
    import torch

    found = _read(weight, first // 2, count // 2, DType.U8)
    return (torch.stack((found & 15, found >> 4), -1).flatten().to(torch.int8) ^ 8).sub_(8).float()


def _by_row(
    layer: _Layer,
    scale: LazyTensor,
    shape: Shape,
    read: Callable[[LazyTensor, int, int], torch.Tensor],
    group: int,
) -> LazyTensor:
    """Numbers times a scale for all or for their row; columns are rotated in groups, unless `group` is 0.

    Integers are rotated first, which is exact: so each number is rounded once.
    """
    rows, columns = _matrix(shape)
    each = scale.numel != 1
    if each and (len(shape) < 2 or scale.shape not in ((rows,), (rows, *(1,) * (len(shape) - 1)))):
        raise _OddError(
            f"its scale is {list(scale.shape)}, which is neither one number nor one a row of {rows}"
        )
    if group and (len(shape) != 2 or columns % group):
        raise _OddError(f"it is {list(shape)}, whose columns are no groups of {group}")

    def tile(row: int, count: int, column: int, width: int) -> torch.Tensor:
        numbers = read(layer.weight, row * columns + column, count * width)
        numbers = _rotated(numbers, group) if group else numbers
        factors = _read(scale, row if each else 0, count if each else 1).float().view(-1, 1)
        return numbers.view(count, width).mul_(factors)

    return Decoded(shape, tile, columns=columns, width=columns, align=group or 1)


def _rotated(numbers: torch.Tensor, group: int) -> torch.Tensor:
    """Each group times H, the Kronecker power of [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] / 2."""
    levels = round(math.log(group, 4))
    made = numbers.view(-1, *(4,) * levels)
    for axis in range(1, levels + 1):  # a row of the matrix is the sum of all less twice one of them
        made = made.sum(axis, keepdim=True) - 2 * made.flip(axis)
    return made.mul_(0.5**levels).flatten()


# ── a scale for each block ──

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _unswizzled(scale: LazyTensor, dtype: DType, blocks: int, rows: range, columns: range) -> torch.Tensor:
    """The scales of some rows and blocks of columns, of `blocks` a row, as they lie in tiles of 128 by 4.

    In a tile, [128, 4] scales lie as [32, 4, 4]: row modulo 32, row divided by 32, column.
    """
    import torch

    across = -(-blocks // 4)
    high = range(rows.start // 128, -(-rows.stop // 128))
    wide = range(columns.start // 4, -(-columns.stop // 4))
    tiles = [
        _read(scale, 512 * (tile * across + wide.start), 512 * len(wide), dtype).view(-1, 32, 4, 4)
        for tile in high
    ]
    # Bytes are moved: torch moves no floats of 8 bits in older versions.
    laid = torch.stack(tiles).permute(0, 3, 2, 1, 4).reshape(128 * len(high), 4 * len(wide))
    down, left = 128 * high.start, 4 * wide.start
    return laid[rows.start - down : rows.stop - down, columns.start - left : columns.stop - left]


def _in_blocks(
    layer: _Layer,
    block: int,
    step: int,
    a_byte: int,
    types: tuple[DType, ...],
    value: Callable[..., torch.Tensor],
) -> LazyTensor:
    """A matrix padded to `step`, with a swizzled scale for each `block` columns.

    `value` makes numbers of stored bytes `[blocks, bytes]` and the bytes of their scales `[blocks, 1]`.
    """
    scale = layer.side("weight_scale", *types)
    if len(layer.weight.shape) != 2:
        raise _OddError(f"it is {list(layer.weight.shape)}, and no matrix")
    high, wide = layer.weight.shape[0], layer.weight.shape[1] * a_byte
    shape = layer.shape if layer.shape is not None else (high, wide)
    if wide % block or (high, wide) not in (shape, tuple(up(n, step) for n in shape)):
        raise _OddError(f"what is stored is {list(layer.weight.shape)}, which is not {list(shape)} packed")
    blocks = wide // block
    if scale.numel != up(high, 128) * up(blocks, 4):
        raise _OddError(f"its `weight_scale` is {list(scale.shape)}, not [{up(high, 128)}, {up(blocks, 4)}]")

    def tile(row: int, rows: int, column: int, columns: int) -> torch.Tensor:
        held = _read(layer.weight, (row * wide + column) // a_byte, rows * columns // a_byte, DType.U8)
        within = range(column // block, (column + columns) // block)
        scales = _unswizzled(scale, DType.U8, blocks, range(row, row + rows), within)
        return value(held.view(-1, block // a_byte), scales.reshape(-1, 1)).float().view(rows, columns)

    return Decoded(shape, tile, columns=shape[1], width=wide, align=block)


def _nvfp4(layer: _Layer) -> LazyTensor:
    """Two E2M1 a byte, the higher half first, times an E4M3 for 16 and an FP32 for all."""
    all_ = layer.side("weight_scale_2", *_FLOATS)
    if all_.numel != 1:
        raise _OddError(f"its `weight_scale_2` is {list(all_.shape)}, not one number")

    def value(held: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        import torch

        table = torch.tensor([*_E2M1, *(-n for n in _E2M1)], dtype=torch.float64)
        numbers = table[torch.stack((held >> 4, held & 15), -1).flatten(1).int()]
        of_block = scales.contiguous().view(torch.float8_e4m3fn).double()
        return numbers.mul_(of_block).mul_(_floats(all_).double())  # 30 bits: exact in FP64

    return _in_blocks(layer, 16, 16, 2, (DType.F8_E4M3, DType.U8), value)


def _mxfp8(layer: _Layer) -> LazyTensor:
    """FP8 times a power of two for 32."""

    def value(held: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        import torch

        powers = torch.tensor([*(2.0 ** (e - 127) for e in range(255)), math.nan], dtype=torch.float64)
        numbers = floats(held.flatten().view(layer.weight.dtype.torch)).double().view(held.shape)
        return numbers.mul_(powers[scales.int()])

    return _in_blocks(layer, 32, 32, 1, (DType.F8_E8M0, DType.U8), value)


_BLOCK = 128  # rows and columns


def _block_fp8(layer: _Layer) -> LazyTensor:
    """FP8 times an FP32 for each block of 128 by 128, which is not the inverse that its name says."""
    scale, shape = layer.side("weight_scale_inv", *_FLOATS), layer.weight.shape
    if len(shape) != 2 or scale.shape != (expected := tuple(-(-n // _BLOCK) for n in shape)):
        blocks = f", not {list(expected)}" if len(shape) == 2 else ""
        raise _OddError(f"it is {list(shape)}, and its scale {list(scale.shape)}{blocks}")
    across = scale.shape[1]

    def tile(row: int, rows: int, column: int, columns: int) -> torch.Tensor:
        import torch

        high = range(row // _BLOCK, -(-(row + rows) // _BLOCK))
        wide = range(column // _BLOCK, -(-(column + columns) // _BLOCK))
        count = len(high) * len(wide)  # whole rows of blocks, or a part of one
        held = _read(scale, high.start * across + wide.start, count).float().view(len(high), len(wide))
        down = torch.arange(row, row + rows) // _BLOCK - high.start
        along = torch.arange(column, column + columns) // _BLOCK - wide.start
        numbers = _plain(layer.weight, row * shape[1] + column, rows * columns)
        return numbers.view(rows, columns).mul_(held[down][:, along])

    return Decoded(shape, tile, columns=shape[1], width=shape[1], align=1)


# ── of a table ──


def _four_bits(layer: _Layer) -> LazyTensor:
    """Two places in a table a byte, the higher half first, times an FP32 for each block of the flat tensor.

    Where those are packed too, they are what bitsandbytes makes of them in FP32: of a table, times an FP32
    for each block of them, plus an offset.
    """
    (state,) = (t for n, t in layer.beside.items() if n.startswith(_STATE))
    said = description(state) or {}
    shape, block = said.get("shape"), _block_size(said.get("blocksize"))
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_size(n) for n in shape):
        raise _OddError("its `quant_state` says no shape")
    numel = math.prod(shape)
    if layer.weight.numel != -(-numel // 2):
        raise _OddError(f"{layer.weight.numel:,} bytes are stored of what is said to be {shape}")
    counts = -(-numel // block)
    code = layer.side("weight.quant_map", DType.F32)
    nested = "weight.nested_absmax" in layer.beside
    most = layer.side("weight.absmax", *((DType.U8,) if nested else _FLOATS))
    if code.numel != 16 or most.numel != counts:
        sizes = f"{code.numel} numbers and `absmax` of {most.numel}"
        raise _OddError(f"its table is of {sizes}, not 16 and {counts}")
    scales = _nested(layer, said, most, counts) if nested else lambda a, n: _read(most, a, n).float()

    def tile(row: int, rows: int, column: int, columns: int) -> torch.Tensor:
        import torch

        held = _read(layer.weight, column // 2, columns // 2)
        places = torch.stack((held >> 4, held & 15), -1).flatten().int()
        first, last = column // block, -(-(column + columns) // block)
        spread = scales(first, last - first).repeat_interleave(block)[column - first * block :][:columns]
        return (_floats(code)[places] * spread).view(1, columns)

    return Decoded(tuple(shape), tile, columns=numel, width=2 * layer.weight.numel, align=2)


_STATE = "weight.quant_state."


def _is_size(said: object) -> bool:
    return isinstance(said, int) and not isinstance(said, bool) and 0 <= said < 1 << 48


def _block_size(said: object) -> int:
    """How many numbers are a block."""
    if not isinstance(said, int) or said not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise _OddError(f"its `quant_state` says blocks of {said!r:.40}")
    return said


def _nested(
    layer: _Layer, said: Mapping[str, Any], most: LazyTensor, counts: int
) -> Callable[[int, int], torch.Tensor]:
    """What gives the scales of some blocks where these are packed as well."""
    size, offset = _block_size(said.get("nested_blocksize")), said.get("nested_offset")
    table = layer.side("weight.nested_quant_map", DType.F32)
    outer = layer.side("weight.nested_absmax", DType.F32)
    if not isinstance(offset, int | float):
        raise _OddError("its `quant_state` says no offset of what is nested")
    if table.numel != 256 or outer.numel != -(-counts // size):
        raise _OddError(f"its nested table is of {table.numel}, and its nested `absmax` of {outer.numel}")

    def scales(first: int, count: int) -> torch.Tensor:
        import torch

        low, high = first // size, -(-(first + count) // size)
        spread = _read(outer, low, high - low).repeat_interleave(size)[first - low * size :][:count]
        found = _floats(table)[_read(most, first, count).int()]
        return found.mul_(spread).add_(torch.tensor(float(offset)))

    return scales


# By the name of a scheme or of ComfyUI's format: the types of the weight, what belongs to it, how it is read.
_KINDS: Mapping[str, tuple[tuple[DType, ...], set[str], _Decoder]] = {
    "scaled FP8": (_F8, {"scale_weight", "weight_scale"}, _scaled),
    "scaled F8": (_F8, {"weight_scale"}, _scaled),
    "float8_e4m3fn": ((DType.F8_E4M3,), {"scale_weight", "weight_scale"}, _scaled),
    "float8_e5m2": ((DType.F8_E5M2,), {"scale_weight", "weight_scale"}, _scaled),
    "mxfp8": ((DType.F8_E4M3, DType.F8_E5M2), {"weight_scale"}, _mxfp8),
    "nvfp4": ((DType.U8,), {"weight_scale", "weight_scale_2"}, _nvfp4),
    "int8_tensorwise": ((DType.I8,), {"weight_scale"}, _int8),
    "convrot_w4a4": ((DType.I8,), {"weight_scale"}, _int4),
    "block FP8": (_F8, {"weight_scale_inv"}, _block_fp8),
    **{
        f"bitsandbytes {kind.upper()}": (
            (DType.U8,),
            {
                f"{_STATE}bitsandbytes__{kind}",
                *(f"weight.{n}" for n in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
            },
            _four_bits,
        )
        for kind in ("nf4", "fp4")
    },
}
_TURNED = {"int8_tensorwise", "convrot_w4a4"}  # may lie in a rotated basis
HALVES = {"nvfp4", "convrot_w4a4", "bitsandbytes NF4", "bitsandbytes FP4"}  # two numbers a byte
WIDER = "take a model with weights of 16 bits or more"  # a hint
_UNKNOWN = "nothing is known of such"


def why_not(scheme: str) -> str | None:
    """Why a scheme is not decoded; None where it is, for all that its name says."""
    return None if scheme in _KINDS else _WHY_NOT.get(scheme, _UNKNOWN)


# Schemes that nothing here reads, and why.
_WHY_NOT = {
    "NVFP4": "no description says in which order its scales lie",
    "scaled I8": "no description says whether it is rotated",
    "compressed-tensors": "its layout is said in another file",
    "W4A8": "its codebooks are not known here",
    "asym_w4a8_int8": "its codebooks are not known here",
    "SVDQuant": "it is laid out for a kernel",
    "svdquant_w4a4": "it is laid out for a kernel",
    "GPTQ or AWQ": "its order is said in another file",
    "bitsandbytes": "its integers have no description",
    "MLX": "its groups are said in another file",
}
