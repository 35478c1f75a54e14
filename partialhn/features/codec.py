"""One shard of features as Arrow bytes, and back: number types, scales, compression.

A shard is one record batch of `id`, `label` and `features`, a fixed-shape tensor of the number
type, or of its bits as unsigned whole numbers where Arrow has no such type (bfloat16).

int8 is symmetric with a scale for each channel of each shard: scale_C = max |z| / 127, q = round(z
/ scale). A shard is what one actor computes as a whole, so its scale is a function of its images
alone, whoever computes it and whatever else is computed; a scale for each image would cost bytes
that matter where few pixels are left, and fixed statistics would have to be agreed on first. It is
kept in the shard's schema, so that a shard can be read alone.

Legend: N images, V views, C channels, H W spatial.
"""

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from partialhn.errors import InputError
from partialhn.features.mapping import mapped
from partialhn.features.table import NUMBER_TYPES
from partialhn.plugins import load_object

BITS = {kind.itemsize: kind for kind in (torch.int8, torch.int16, torch.int32, torch.int64)}
"""Whole numbers by their number of bytes."""


@dataclasses.dataclass(frozen=True)
class NumberType:
    """A number type in which features are stored."""

    tensor: torch.dtype
    """As a tensor has it."""
    arrow: pa.DataType
    """As Arrow stores it: of the same bytes, whose bits it keeps."""
    levels: int | None = None
    """Whole numbers from -levels to levels, which a scale for each channel turns into features;
    None: the numbers are the features."""

    def __post_init__(self) -> None:
        if self.tensor.itemsize != self.arrow.byte_width:
            raise InputError(f"a number type of stored features is {self.tensor} and {self.arrow}; "
                             "allowed: two types of the same number of bytes")

    @property
    def bits(self) -> torch.dtype:
        """Whole numbers of the same bytes, through which NumPy sees numbers it has no type for."""
        return BITS[self.tensor.itemsize]


def number_type(name: str) -> NumberType:
    """The number type of a name. Raises: InputError for a name that no line of the table has."""
    line = NUMBER_TYPES.find(name)
    what = f"number type {name!r}"
    kind = load_object(line, what) if isinstance(line, str) else line
    if not isinstance(kind, NumberType):
        raise InputError(f"{what} is a {type(kind).__name__}; allowed: a "
                         "partialhn.features.codec.NumberType")
    return kind


FLOAT32 = NumberType(torch.float32, pa.float32())
FLOAT16 = NumberType(torch.float16, pa.float16())
BFLOAT16 = NumberType(torch.bfloat16, pa.uint16())
INT8 = NumberType(torch.int8, pa.int8(), levels=127)
_CHECKED = 64
"""Images whose numbers are checked at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """What a shard holds."""

    z_NVCHW: Tensor
    """In the stored number type; mapped where the shard is mapped and not compressed."""
    scale_C: Tensor | None
    """What whole numbers are multiplied with, float32; None where the numbers are the features."""
    y_N: np.ndarray
    ids: list[str]


def encode(z_NVCHW: Tensor, y_N: np.ndarray, ids: Sequence[str], dtype: str, compression: str,
           described: str) -> memoryview:
    """The bytes of a shard; `described` goes into its schema.

    Raises: InputError for features that are not finite in their number type, naming the image.
    """
    kind = number_type(dtype)
    metadata = {"partialhn": described}
    if kind.levels:
        z_NVCHW = z_NVCHW.float()
        _check_finite(z_NVCHW, ids, dtype)
        z_NVCHW, scale_C = _quantised(z_NVCHW, kind.levels)
        metadata["scale"] = json.dumps(scale_C.tolist())
    numbers = z_NVCHW.to(kind.tensor).cpu().contiguous()
    if not kind.levels:
        _check_finite(numbers, ids, dtype)
    values = numbers.view(kind.bits).numpy()
    flat = pa.Array.from_buffers(kind.arrow, values.size, [None, pa.py_buffer(values)])
    tensor = pa.fixed_shape_tensor(kind.arrow, values.shape[1:])
    storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
    schema = pa.schema([("id", pa.string()), ("label", pa.int64()), ("features", tensor)],
                       metadata=metadata)
    batch = pa.record_batch([pa.array(ids, pa.string()), pa.array(y_N, pa.int64()),
                             pa.ExtensionArray.from_storage(tensor, storage)], schema=schema)
    options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def decode(content: pa.Buffer, dtype: str, rows: int, shape_VCHW: Sequence[int]) -> Block:
    """What a shard holds; its offsets are checked before they are followed.

    Raises: ValueError, KeyError, TypeError or an Arrow error for anything but such a shard.
    """
    kind = number_type(dtype)
    table = pa.ipc.open_file(content).read_all()
    table.validate(full=True)
    labels = table["label"]
    if (table["features"].num_chunks != 1 or labels.type != pa.int64() or labels.null_count
            or table["features"].type.value_type != kind.arrow):
        raise ValueError(f"it holds {table.schema}")
    rows_N = table["features"].chunk(0).storage
    values = rows_N.flatten()
    if rows_N.null_count or values.null_count:  # Arrow would give zeros for them
        raise ValueError("it holds features that are null")
    bits = torch.empty(0, dtype=kind.bits).numpy().dtype
    flat = np.frombuffer(values.buffers()[1], dtype=bits, count=len(values),
                         offset=values.offset * bits.itemsize)
    y_N, ids = labels.to_numpy(), table["id"].to_pylist()
    if len(y_N) != rows or len(ids) != rows:
        raise ValueError(f"it holds {len(y_N)} labels for {rows} rows")
    z_NVCHW = as_tensor(flat.reshape(rows, *shape_VCHW)).view(kind.tensor)
    scale_C = _scale(table.schema, shape_VCHW[1]) if kind.levels else None
    return Block(z_NVCHW, scale_C, y_N, ids)


def spilled(block: Block) -> Block:
    """The same with its features in a file that nobody else sees, mapped: they take no memory."""
    flat = block.z_NVCHW.flatten()
    with tempfile.TemporaryFile() as file:
        flat.view(torch.uint8).numpy().tofile(file)
        file.flush()
        bytes_ = as_tensor(np.frombuffer(mapped(file), np.uint8))
    return dataclasses.replace(block, z_NVCHW=bytes_.view(flat.dtype).view(block.z_NVCHW.shape))


def _quantised(z_NVCHW: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Whole numbers from -levels to levels, and each channel's scale; an empty one has scale 1."""
    top_C = z_NVCHW.abs().transpose(1, 2).transpose(0, 1).flatten(1)
    top_C = top_C.amax(1) if top_C.numel() else torch.zeros(len(top_C))
    scale_C = torch.where(top_C > 0, top_C / levels, torch.ones_like(top_C))
    shape = (1, 1, -1, *[1] * (z_NVCHW.dim() - 3))
    return (z_NVCHW / scale_C.view(shape)).round_().clamp_(-levels, levels), scale_C


def _check_finite(z_NVCHW: Tensor, ids: Sequence[str], dtype: str) -> None:
    """Raises InputError naming the first image whose features are not finite."""
    finite_N = torch.cat([_finite(part) for part in torch.split(z_NVCHW, _CHECKED)])
    if not finite_N.all():
        first = int((~finite_N).nonzero()[0])
        raise InputError(f"the features of image {ids[first]} are not finite as {dtype}, and "
                         f"those of {int((~finite_N).sum()) - 1} more images of its shard; "
                         "allowed: a trunk whose features are finite, or --feature-dtype "
                         "float32 or bfloat16 where they are only too large for float16")


def _finite(z_NVCHW: Tensor) -> Tensor:
    """Whether all numbers of each image are finite: finite_N, by their bits.

    For 16-bit numbers `isfinite` and `aminmax` take thirty times as long as this on a CPU.
    """
    whole = BITS[z_NVCHW.dtype.itemsize]
    infinite = int(torch.tensor(torch.inf, dtype=z_NVCHW.dtype).view(whole))
    magnitude_NF = z_NVCHW.flatten(1).view(whole) & torch.iinfo(whole).max
    return magnitude_NF.amax(1) < infinite


def _scale(schema: pa.Schema, channels: int) -> Tensor:
    found = json.loads(schema.metadata[b"scale"])
    scale_C = torch.tensor(found, dtype=torch.float32)
    if scale_C.shape != (channels,) or not (torch.isfinite(scale_C) & (scale_C > 0)).all():
        raise ValueError(f"its scale is {found!r:.80}")
    return scale_C


def as_tensor(values: np.ndarray) -> Tensor:
    """A tensor over read-only mapped memory; it is only ever gathered from."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)
