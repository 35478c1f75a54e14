"""The formats of exported files: what each writes, and how it is run again to check it.

Legend: B batch, C channels, H W spatial, L most classes of a task.
"""

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.export.record import INPUT, KEY, OUTPUT, TASK

ONNX_BYTES = 2_000_000_000
"""Size of weights that one ONNX file can hold: protocol buffers end at 2 GiB."""


class Subject(NamedTuple):
    """The network that is exported, with its record."""

    network: nn.Module
    """Takes pixels_BCHW, and where `together` the task's index."""
    together: bool
    record: dict[str, Any]
    body: nn.Module | None = None
    """The library's own network without the normalisation of pixels, where there is one."""

    def example(self) -> tuple[Tensor, ...]:
        """Inputs that show shapes and types."""
        _, channels, height, width = self.record["input"]["shape"]
        pixels_BCHW = torch.rand(2, channels, height, width)
        return (pixels_BCHW, torch.tensor(0)) if self.together else (pixels_BCHW,)


Run = Callable[..., Tensor]
"""pixels_BCHW, and where tasks are together the task's index, to logits_BL."""


class Format(Protocol):
    """One format."""

    ending: str
    """How the names of its files end."""

    def require(self) -> None:
        """Raises: InputError naming the extra, where a package is missing."""

    def content(self, subject: Subject) -> bytes:
        """The file. Raises: InputError for a network that this format cannot hold."""

    def opened(self, content: bytes, subject: Subject) -> Run:
        """The function that a file's content is, calculated as its users will."""


class Torch:
    """A program of torch.export, which loads with PyTorch alone."""

    ending = ".pt2"

    def require(self) -> None:
        """PyTorch is always here."""

    def content(self, subject: Subject) -> bytes:
        buffer = io.BytesIO()
        program = traced(subject)
        with _quiet():
            torch.export.save(program, buffer, extra_files={f"{KEY}.json":
                                                            json.dumps(subject.record)})
        return buffer.getvalue()

    def opened(self, content: bytes, subject: Subject) -> Run:
        del subject
        with _quiet():
            return torch.export.load(io.BytesIO(content)).module()


class Onnx:
    """ONNX with a dynamic batch, for onnxruntime and the tools of devices."""

    ending = ".onnx"

    def require(self) -> None:
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript")
                   if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(f"format onnx needs {', '.join(missing)}, not installed here; "
                             "allowed: pip install 'partialhn[export]', or format torch or "
                             "safetensors")

    def content(self, subject: Subject) -> bytes:
        size = sum(value.nbytes for value in subject.network.state_dict().values())
        if size > ONNX_BYTES:
            raise InputError(f"the network has {size / 1e9:.1f} GB of weights, and one ONNX file "
                             "holds 2 GB; allowed: a single task, or format torch")
        program = traced(subject)
        try:
            with _quiet():
                model = torch.onnx.export(
                    program, dynamo=True, verbose=False, external_data=False,
                    input_names=[INPUT, TASK][:1 + subject.together], output_names=[OUTPUT])
        except Exception as error:  # the converter raises anything
            raise _cannot(subject, "ONNX", error, "format torch") from error
        assert model is not None
        proto = model.model_proto
        proto.metadata_props.add(key=KEY, value=json.dumps(subject.record))
        proto.producer_name = KEY
        return bytes(proto.SerializeToString())

    def opened(self, content: bytes, subject: Subject) -> Run:
        del subject
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

        def run(*inputs: Tensor) -> Tensor:
            feed = dict(zip((INPUT, TASK), (value.numpy() for value in inputs), strict=False))
            return torch.from_numpy(session.run(None, feed)[0])

        return run


class Safetensors:
    """The network's tensors by name, and the record; the network itself is somebody's code."""

    ending = ".safetensors"

    def require(self) -> None:
        """The package is always here."""

    def content(self, subject: Subject) -> bytes:
        if subject.together:
            raise InputError("format safetensors holds tensors without the code that chooses a "
                             "task; allowed: a single task, or format onnx or torch")
        tensors = (subject.body or subject.network).state_dict()
        return save({name: value.clone().contiguous() for name, value in tensors.items()},
                    {KEY: json.dumps(subject.record)})

    def opened(self, content: bytes, subject: Subject) -> Run:
        network = subject.body or subject.network
        network.load_state_dict(load(content))
        if subject.body is None:
            return network
        mean_C, std_C = (torch.tensor(subject.record["preprocessing"][key])[:, None, None]
                         for key in ("mean", "std"))
        return lambda pixels_BCHW: network((pixels_BCHW - mean_C) / std_C)


FORMATS: dict[str, Format] = {"onnx": Onnx(), "torch": Torch(), "safetensors": Safetensors()}


def traced(subject: Subject) -> torch.export.ExportedProgram:
    """The network as a graph with a dynamic batch.

    Raises: InputError for a network that PyTorch cannot trace.
    """
    batch = {0: torch.export.Dim("batch", min=1)}
    dynamic = (batch, None) if subject.together else (batch,)
    try:
        with _quiet():
            return torch.export.export(subject.network, subject.example(), dynamic_shapes=dynamic)
    except Exception as error:  # tracing runs other people's code
        raise _cannot(subject, "a graph", error, "format safetensors") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about the exporters' own future, and without the fused attention that
    they cannot trace.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _cannot(subject: Subject, what: str, error: Exception, other: str) -> InputError:
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return InputError(f"backbone {subject.record['backbone']} cannot be written as {what}: "
                      f"{type(error).__name__}: {first}; allowed: {other}")
