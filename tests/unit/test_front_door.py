"""`import partialhn as phn`: light, lazy and typed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import partialhn as phn

ROOT = Path(__file__).parents[2]


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                          check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)


def test_importing_it_loads_nothing_heavy():
    code = ("import sys, partialhn as phn; dir(phn); phn.Config; phn.InputError; phn.preset\n"
            "print([name for name in ('torch', 'numpy', 'pandas', 'pyarrow', 'PIL', 'rich',"
            " 'matplotlib', 'pipelines') if name in sys.modules])")
    done = run("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", phn.__all__)
def test_every_public_name_is_there_and_described(name):
    value = getattr(phn, name)
    assert name in dir(phn)
    assert name.startswith("__") or value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Strem'"):
        phn.Strem  # noqa: B018


def test_a_type_checker_sees_the_types(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import partialhn as phn\n"
                      'reveal_type(phn.Stream("digits").metrics.accuracy)\n'
                      'phn.Stream("digits").lern()\n'
                      "phn.Strem\n")
    others = ("torch", "numpy", "pandas", "pyarrow", "matplotlib", "PIL", "rich", "yaml")
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n" + "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
        for name in others))  # reading their types would take half a minute
    done = run("-m", "mypy", str(script), cwd=tmp_path)
    assert 'Revealed type is "float"' in done.stdout.replace("builtins.", ""), done.stdout
    assert '"Stream" has no attribute "lern"' in done.stdout
    assert 'has no attribute "Strem"' in done.stdout
    assert (ROOT / "partialhn" / "py.typed").exists()
