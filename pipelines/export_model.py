"""`partialhn export`: a registered version's network as a file that runs without this package.

`Registry.load_predictor` downloads the model, and `partialhn.export.export` writes the file.
"""

from pathlib import Path

from partialhn.export.export import Exported, FormatName, check_output, export_content, write_whole
from partialhn.export.formats import FORMATS
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect


def export_version(model: str, task: str, output: str, format: FormatName,
                   overwrite: bool = False, storage: str = "partialhn-store",
                   tracking_uri: str | None = None) -> Exported:
    """Exports one task, or all of them, of a registered version.

    Args:
        model: models:/NAME@champion, models:/NAME@task-TASK or models:/NAME/VERSION.
        task: a task's name, its index from 0, or all.
        output: file to write, local or s3://; it appears only when it is complete.
        format: onnx, torch or safetensors.
        overwrite: whether an existing file is replaced.
        storage: the storage that `partialhn train` was given, with the default registry.
        tracking_uri: MLflow server or database, as for `partialhn train`.

    Raises: InputError for an unknown model or task, an existing file, a missing package, or a
        network that the format cannot hold.
    """
    target = open_storage(output)
    check_output(Path(target.root).name, format, target.exists(target.root) and not overwrite)
    FORMATS[format].require()
    registry = connect(open_storage(storage), tracking_uri, create=False)
    predictor, version = registry.load_predictor(model)
    exported = export_content(predictor, task, format, version.uri)
    if target.is_local:
        write_whole(Path(target.root), exported.content)
    else:
        with target.filesystem.open_output_stream(target.root) as sink:
            sink.write(exported.content)
    return exported
