"""One shard of features as Arrow bytes, and back: number types, scales, compression.

A shard is one record batch of `id`, `label` and `features`, a fixed-shape tensor of float32,
float16, uint16 (the bits of bfloat16, for which Arrow has no type) or int8.

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
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from partialhn.errors import InputError
from partialhn.features.cache import mapped

DTYPES: Mapping[str, tuple[torch.dtype, type[np.generic], pa.DataType]] = {
    "float32": (torch.float32, np.float32, pa.float32()),
    "float16": (torch.float16, np.float16, pa.float16()),
    "bfloat16": (torch.bfloat16, np.int16, pa.uint16()),
    "int8": (torch.int8, np.int8, pa.int8()),
}
"""By name: as a tensor, as numpy sees its bytes, and as Arrow keeps it."""
COMPRESSIONS = ("none", "lz4")
_LEVELS = 127
_CHECKED = 64
"""Images whose numbers are checked at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """What a shard holds."""

    z_NVCHW: Tensor
    """In the stored number type; mapped where the shard is mapped and not compressed."""
    scale_C: Tensor | None
    """What int8 is multiplied with, float32; None for the floating types."""
    y_N: np.ndarray
    ids: list[str]


def encode(z_NVCHW: Tensor, y_N: np.ndarray, ids: Sequence[str], dtype: str, compression: str,
           described: str) -> memoryview:
    """The bytes of a shard; `described` goes into its schema.

    Raises: InputError for features that are not finite in their number type, naming the image.
    """
    kind, seen_as, stored_as = DTYPES[dtype]
    metadata = {"partialhn": described}
    if kind is torch.int8:
        z_NVCHW = z_NVCHW.float()
        _check_finite(z_NVCHW, ids, dtype)
        z_NVCHW, scale_C = _quantised(z_NVCHW)
        metadata["scale"] = json.dumps(scale_C.tolist())
    bits = z_NVCHW.to(kind).cpu().contiguous()
    if kind is not torch.int8:
        _check_finite(bits, ids, dtype)
    values = (bits.view(torch.int16) if kind is torch.bfloat16 else bits).numpy()
    assert values.dtype == seen_as
    flat = pa.Array.from_buffers(stored_as, values.size, [None, pa.py_buffer(values)])
    tensor = pa.fixed_shape_tensor(stored_as, values.shape[1:])
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
    kind, seen_as, stored_as = DTYPES[dtype]
    table = pa.ipc.open_file(content).read_all()
    table.validate(full=True)
    labels = table["label"]
    if (table["features"].num_chunks != 1 or labels.type != pa.int64() or labels.null_count
            or table["features"].type.value_type != stored_as):
        raise ValueError(f"it holds {table.schema}")
    rows_N = table["features"].chunk(0).storage
    values = rows_N.flatten()
    if rows_N.null_count or values.null_count:  # Arrow would give zeros for them
        raise ValueError("it holds features that are null")
    flat = np.frombuffer(values.buffers()[1], dtype=seen_as, count=len(values),
                         offset=values.offset * np.dtype(seen_as).itemsize)
    y_N, ids = labels.to_numpy(), table["id"].to_pylist()
    if len(y_N) != rows or len(ids) != rows:
        raise ValueError(f"it holds {len(y_N)} labels for {rows} rows")
    z_NVCHW = as_tensor(flat.reshape(rows, *shape_VCHW)).view(kind)
    scale_C = _scale(table.schema, shape_VCHW[1]) if kind is torch.int8 else None
    return Block(z_NVCHW, scale_C, y_N, ids)


def spilled(block: Block) -> Block:
    """The same with its features in a file that nobody else sees, mapped: they take no memory."""
    flat = block.z_NVCHW.flatten()
    with tempfile.TemporaryFile() as file:
        flat.view(torch.uint8).numpy().tofile(file)
        file.flush()
        bytes_ = as_tensor(np.frombuffer(mapped(file), np.uint8))
    return dataclasses.replace(block, z_NVCHW=bytes_.view(flat.dtype).view(block.z_NVCHW.shape))


def _quantised(z_NVCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, and the scale of each channel; an empty one has scale 1."""
    top_C = z_NVCHW.abs().transpose(1, 2).transpose(0, 1).flatten(1)
    top_C = top_C.amax(1) if top_C.numel() else torch.zeros(len(top_C))
    scale_C = torch.where(top_C > 0, top_C / _LEVELS, torch.ones_like(top_C))
    shape = (1, 1, -1, *[1] * (z_NVCHW.dim() - 3))
    return (z_NVCHW / scale_C.view(shape)).round_().clamp_(-_LEVELS, _LEVELS), scale_C


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
    whole = torch.int32 if z_NVCHW.dtype is torch.float32 else torch.int16
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
