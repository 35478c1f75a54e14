"""A device that is not the host, for machines without a GPU: `torch.device("far")`.

Its tensors calculate on the CPU, with the CPU's kernels and to its bits, but PyTorch takes them
for tensors of another device: what is made without saying where lies on the host, and an operation
on both fails, as it does on a GPU. Copies, and indices on the host, are allowed there and here.
"""

import contextlib
import threading
import weakref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"
aten = torch.ops.aten
MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor,
           aten.index_put_.default, aten._index_put_impl_.default}

_setup_privateuseone_for_python_backend(NAME)


class Memory:
    """The memory of the device, which may be made small: then what does not fit is refused with
    the error that PyTorch raises for a GPU.
    """

    def __init__(self):
        self.limit, self.peak = None, 0
        self.tensors = weakref.WeakSet()
        self.one_at_a_time = threading.RLock()

    @contextlib.contextmanager
    def limited_to(self, nbytes):
        """A context in which all new tensors together fit into so many bytes, and no more."""
        self.tensors.clear()
        self.limit, self.peak = nbytes, 0
        try:
            yield
        finally:
            self.limit = None

    def take(self, tensor):
        """Counts a new tensor. Raises: OutOfMemoryError where it does not fit."""
        if self.limit is None:
            return
        with self.one_at_a_time:
            asked = tensor.near.untyped_storage()
            held = {storage.data_ptr(): storage.nbytes() for storage in
                    (each.near.untyped_storage() for each in self.tensors)}
            new = 0 if asked.data_ptr() in held else asked.nbytes()
            free = self.limit - sum(held.values())
            if new > free:
                raise torch.OutOfMemoryError(
                    f"far out of memory. Tried to allocate {new} bytes. The device has a total "
                    f"capacity of {self.limit} bytes of which {free} bytes are free. If reserved "
                    "but unallocated memory is large try another allocator.")
            self.peak = max(self.peak, sum(held.values()) + new)
            self.tensors.add(tensor)


MEMORY = Memory()


class Far(torch.Tensor):
    """A tensor of the device; `near` is where its numbers are."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device=f"{NAME}:0")

    def __init__(self, near):
        self.near = near
        MEMORY.take(self)

    def __repr__(self):
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, op, _types, args=(), kwargs=None):
        return _run(op, args, kwargs or {})


def _run(op, args, kwargs):
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    far = [value for value in tensors if isinstance(value, Far)]
    host = [value for value in tensors if value.dim() and not isinstance(value, Far)]
    if far and host and op not in MAY_MIX:
        raise RuntimeError(f"{op} got tensors on {NAME} and on the host: "
                           f"{[(tuple(x.shape), x.device.type) for x in tensors]}")
    near_args, near_kwargs = pytree.tree_unflatten(
        [value.near if isinstance(value, Far) else
         torch.device("cpu") if isinstance(value, torch.device) else value for value in flat], spec)
    made = op(*near_args, **near_kwargs)
    if op is aten.copy_.default:
        return args[0]
    device = kwargs.get("device")
    if not (far if device is None else torch.device(device).type == NAME):
        return made
    return return_and_correct_aliasing(op, args, kwargs,
                                       pytree.tree_map_only(torch.Tensor, Far, made))


_library = torch.library.Library("_", "IMPL")  # whoever makes a tensor there has none to start from
_library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")


class PutsThere(TorchFunctionMode):
    """What PyTorch does for a real device only: tensors of Python's numbers, and lists of them."""

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return function(*args, **kwargs | {"device": "cpu"}).to(NAME)
        if function is torch.Tensor.new_tensor and isinstance(args[0], Far):
            return args[0].near.new_tensor(*args[1:], **kwargs).to(NAME)
        if function is torch.Tensor.tolist and isinstance(args[0], Far):
            return args[0].near.tolist()
        return function(*args, **kwargs)
