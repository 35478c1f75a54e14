"""The command `partialhn export`. Imports nothing heavy, so that `--help` is fast."""

import dataclasses
import json
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the network of one task, or of all, to a file that runs without this package.

    The file takes float32 pixels of 0 to 1, normalises them itself and gives logits. Its metadata
    says how an image becomes these pixels, and the names of the classes. Its answers are compared
    with the model's before it is written.
    """

    model: str
    """Model: models:/NAME@champion, models:/NAME@task-TASK or models:/NAME/VERSION."""
    task: str
    """Name of the task, its index from 0, or all: every task, with the index as a second input."""
    output: str
    """File to write, local or s3://; its name ends in .onnx, .pt2 or .safetensors."""
    format: Literal["onnx", "torch", "safetensors"] = "onnx"
    """onnx: for onnxruntime, with a batch of any size (needs the extra export). torch: a program
    that PyTorch alone loads (.pt2). safetensors: the tensors of one task's network, with the names
    of torchvision or timm where they have the same network."""
    overwrite: bool = False
    """Replace an existing file."""
    storage: str = "partialhn-store"
    """The storage that train was given, with the default registry."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    json: bool = False
    """Print the file's metadata as JSON."""

    def run(self) -> None:
        from partialhn.numbers import size
        from pipelines.export_model import export_version

        done = export_version(self.model, self.task, self.output, self.format, self.overwrite,
                              self.storage, self.tracking_uri)
        if self.json:
            print(json.dumps(done.record, indent=1))
            return
        print(f"{self.output}: {_tasks(done.record)} of {done.record['model']}, "
              f"{size(len(done.content))}; probabilities differ from the model's by at most "
              f"{done.difference:.0e}")
        print("\n".join(_use(self.output, self.format, done.record)))


def _tasks(record: dict[str, Any]) -> str:
    if "tasks" in record:
        return f"{len(record['tasks'])} tasks"
    return f"task {record['task']!r} ({', '.join(record['classes'])})"


def _use(output: str, format: str, record: dict[str, Any]) -> list[str]:
    """How the file is used, for the terminal."""
    pixels = "x".join(map(str, record["input"]["shape"]))
    lines = [f"pixels: float32, {pixels}, red green blue; an image becomes pixels so:",
             *(f"  {step}" for step in record["preprocessing"]["steps"]), "next:"]
    together = "tasks" in record
    if format == "onnx":
        task = ", 'task': numpy.array(0)" if together else ""
        return [*lines, f"  onnxruntime.InferenceSession({output!r})"
                        f".run(None, {{'pixels': pixels{task}}})"]
    if format == "torch":
        task = ", torch.tensor(0)" if together else ""
        return [*lines, f"  torch.export.load({output!r}).module()(pixels{task})"]
    if record["loads_into"] is None:
        return [*lines, f"  (no library's network takes these tensors: {record['why_not']}; "
                        "format onnx or torch holds the network, too)"]
    return [*lines, f"  network = {record['loads_into']}",
            f"  network.load_state_dict(safetensors.torch.load_file({output!r}))"]


COMMANDS: dict[str, Any] = {"export": Export}
