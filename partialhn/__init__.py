"""Partial hypernetworks for continual learning: a plain PyTorch and Arrow library.

    import partialhn as phn

    stream = phn.Stream("digits", tasks=5, input_size=16, epochs=4, folder="my-stream")
    stream.learn()
    stream.accuracy_matrix

The names in `__all__` are the public interface. Each is imported when it is first used, so
importing this package loads neither torch nor pandas. Nothing here imports Ray, MLflow or an S3
client.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partialhn.checkpoints.model import Model
    from partialhn.config import Config, load_config
    from partialhn.data.table import register_data_form
    from partialhn.errors import InputError, IntegrityError
    from partialhn.evaluation.metrics import StreamMetrics
    from partialhn.features.table import register_number_type
    from partialhn.networks.table import register_backbone
    from partialhn.notebook.display import TaskResult
    from partialhn.notebook.stream import Stream
    from partialhn.predict import Prediction, Predictor
    from partialhn.presets import preset
    from partialhn.run import RunResult, run_stream
    from partialhn.strategies import Strategy, register_strategy

__version__ = "0.1.0"

__all__ = ["Config", "InputError", "IntegrityError", "Model", "Prediction", "Predictor",
           "RunResult", "Strategy", "Stream", "StreamMetrics", "TaskResult", "__version__",
           "load_config", "preset", "register_backbone", "register_data_form",
           "register_number_type", "register_strategy", "run_stream"]

if not TYPE_CHECKING:  # a type checker that saw __getattr__ would accept every name
    _HOMES = {"Config": "config", "InputError": "errors", "IntegrityError": "errors",
              "Model": "checkpoints.model", "Prediction": "predict", "Predictor": "predict",
              "RunResult": "run", "Strategy": "strategies", "Stream": "notebook.stream",
              "StreamMetrics": "evaluation.metrics", "TaskResult": "notebook.display",
              "load_config": "config", "preset": "presets",
              "register_backbone": "networks.table", "register_data_form": "data.table",
              "register_number_type": "features.table",
              "register_strategy": "strategies.table", "run_stream": "run"}

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
