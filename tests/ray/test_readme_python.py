"""The Python of the README runs as it stands there, on real images."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_readme_python_blocks_run_in_order(tmp_path, monkeypatch, capsys, ray_cluster):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["result"]["acc"] > 0.5
    printed = capsys.readouterr().out
    assert "models:/my-digits@champion" in printed
    assert "label" in printed
    assert (tmp_path / "result.json").exists()


