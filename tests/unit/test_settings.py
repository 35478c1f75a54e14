import dataclasses
import subprocess
import sys

import pytest

from partialhn.errors import InputError
from pipelines.settings import MAX_NAME, OutputConfig, RetrainConfig, check_name


@pytest.mark.parametrize("name", ["a", "my-stream", "Stream_2", "0", "x" * MAX_NAME])
def test_good_names(name):
    assert OutputConfig(name=name).name == check_name(name) == name


@pytest.mark.parametrize("name", ["", "my stream", "a/b", "a.b", "a:b", "-a", "_a", "å", "a\n",
                                  "x" * (MAX_NAME + 1)])
def test_bad_names_are_named(name):
    with pytest.raises(InputError, match="allowed: letters, digits") as caught:
        OutputConfig(name=name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("key", ["storage", "result"])
def test_empty_paths(key):
    with pytest.raises(InputError, match=f"{key} is ''; allowed: a path"):
        OutputConfig(**{key: ""})


def test_settings_import_nothing_heavy():
    heavy = ["torch", "mlflow", "ray", "pyarrow", "numpy", "pandas", "boto3"]
    code = f"import sys, pipelines.settings; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("words", [["--epochs", "3"], ["--freeze-depth=2"], ["--data", "x"]])
def test_retrain_points_to_the_file_for_options_of_train(words, capsys):
    from pipelines.cli.main import run

    assert run(["retrain", "--name", "s", *words]) == 2
    err = capsys.readouterr().err
    assert "is an option of train; retrain takes it from --config FILE.yaml, as {" in err
    assert "Traceback" not in err


def test_retrain_takes_every_option_of_its_own():
    from pipelines.cli.main import _parse

    assert _parse(["retrain", "--re-evaluate"]).retrain.re_evaluate
    for field in dataclasses.fields(RetrainConfig):
        value = [] if field.type is bool else ["3"]
        assert getattr(_parse(["retrain", f"--{field.name.replace('_', '-')}", *value]).retrain,
                       field.name) != field.default, field.name
