"""The demo: trains on scikit-learn's digits, 5 tasks of 2 classes, which need no download."""

import dataclasses
import shutil
import time
from pathlib import Path

from partialhn.config import Config
from partialhn.presets import preset
from pipelines.settings import OutputConfig

NAME = "digits"
KEPT = ("features", "trunks", "datasets")
"""Folders that a second run reuses; everything else is deleted first."""


def demo_config(size: str = "full") -> Config:
    """The demo's configuration; `small` has fewer epochs and no baselines."""
    config = preset("digits")
    if size == "full":
        return config
    return dataclasses.replace(
        config, backbone=dataclasses.replace(config.backbone, trunk_epochs=8),
        train=dataclasses.replace(config.train, epochs=10, compare=()))


def demo(folder: Path, size: str = "full") -> None:
    """Trains, predicts images of an early task and writes the report, all in `folder`."""
    from pipelines.label_images import predict_to_parquet
    from pipelines.report.page import text_summary, write_report
    from pipelines.train import train

    start = time.perf_counter()
    _start_over(folder)
    output = OutputConfig(name=NAME, storage=str(folder), result=str(folder / "result.json"),
                          tracking_uri=f"sqlite:///{(folder / 'mlflow.db').absolute()}")
    result = train(demo_config(size), output)
    early = result["tasks"][0]["name"]
    images = _write_images(folder, early, size)
    done = predict_to_parquet(result["model_uri"], early, str(images),
                              str(folder / "preds.parquet"), output.storage, output.tracking_uri)
    page = write_report(result, folder / "report.html")
    print(f"\n{text_summary(result)}")
    print(f"task {early!r}, learned first, predicted by the newest model: {done.images} images, "
          + ", ".join(f"{label!r} {count}" for label, count in done.labels.items()))
    for name, path in (("report", page), ("result", output.result), ("predictions", done.output),
                       ("features", folder / "features"), ("registry", folder / "mlflow.db")):
        print(f"{name + ':':<13}{path}")
    tool = ".venv/bin/partialhn" if Path(".venv/bin/partialhn").exists() else "partialhn"
    print(f"done in {time.perf_counter() - start:.0f} s; next:\n"
          f"  {tool} show --name {NAME} --storage {folder}\n"
          f"  {tool} predict --model {result['model_uri']} --task 1 --input {images} "
          f"--storage {folder}\n"
          f"  {tool} train --help")


def _start_over(folder: Path) -> None:
    if not folder.exists():
        return
    for item in folder.iterdir():
        if item.name in KEPT:
            continue
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()


def _write_images(folder: Path, task: str, size: str) -> Path:
    """Writes the test images of a task as image files; returns their folder."""
    from partialhn.data.datasets import open_stream

    stream = open_stream(demo_config(size).data, folder / "datasets")
    experience = next(experience for experience in stream if experience.name == task)
    target = folder / "images" / f"task-{task}"
    target.mkdir(parents=True)
    table = experience.test
    for number, (encoded, label) in enumerate(zip(table.read(), table.label_N, strict=True)):
        (target / f"{number:03d}-is-{experience.classes[label]}.png").write_bytes(encoded)
    return target
