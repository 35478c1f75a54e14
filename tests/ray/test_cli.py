"""The command line: help, exit codes, and a clear message for everything a user can get wrong."""

import dataclasses
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from partialhn import __version__
from partialhn.config import Config
from pipelines.cli.main import COMMANDS
from pipelines.settings import Group

HEAVY = ("torch", "torchvision", "ray", "mlflow", "pandas", "pyarrow", "sklearn", "boto3")
QUICK = ("--data", "digits", "--tasks", "3", "--input-size", "16", "--trunk-epochs", "1",
         "--epochs", "1", "--threads", "1")


def options(kind) -> dict[str, object]:
    """Every option of a command with its default; MISSING where it must be given."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            found |= options(field.type)
        else:
            found["--" + field.name.replace("_", "-")] = field.default
    return found


def leaves(commands, *before) -> list[tuple]:
    """The words and the class of every command, those of groups too."""
    return [leaf for name, kind in commands.items()
            for leaf in (leaves(kind.COMMANDS, *before, name) if issubclass(kind, Group)
                         else [((*before, name), kind)])]


def shown(default: object) -> str:
    if default == "":
        return "''"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def refused(answer: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2, one clear message with these parts, no traceback."""
    code, _, err = answer
    assert code == 2, err
    assert "Traceback" not in err
    for part in parts:
        assert re.search(part, err), (part, err)


# Help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words):
    code = (f"import sys, pipelines.cli.main as cli\ntry: cli.main({words!r})\n"
            f"finally: print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout


def test_the_installed_command():
    done = subprocess.run([Path(sys.executable).with_name("partialhn"), "--help"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in done.stdout


def test_version(command):
    assert command("--version") == (0, f"partialhn {__version__}\n", "")


@pytest.mark.parametrize(("words", "kind"), leaves(COMMANDS))
def test_help_lists_every_option_with_its_default(command, words, kind):
    code, out, _ = command(*words, "--help")
    assert code == 0
    _usage, _, listed = out.partition("\n\n")
    text = " ".join(re.sub(r"[│|]", " ", listed).split())
    for option, default in options(kind).items():
        if option not in text:  # one that is given by its place
            option = "STR"
        found = re.search(rf"{option}(?= [A-Z{{\[]|, --no-).*?"
                          r"\((?:default: ?(.*?)|(required))\)(?= |$)", text)
        assert found, option
        if default is dataclasses.MISSING:
            assert found[2] == "required", option
        else:
            assert found[1] == shown(default), option


def test_a_network_is_exported(command, learned, tmp_path):
    file = tmp_path / "deep" / "0.safetensors"

    def export(*words):
        return command("export", "--model", "models:/digits@champion", "--task", "0", "--format",
                       "safetensors", "--output", file, "--storage", learned.output.storage, *words)

    code, out, err = export()
    assert code == 0, err
    assert f"{file}: task '0' (" in out
    assert "resize to 16 x 16, bilinear" in out
    refused(export(), "0.safetensors' exists", "--overwrite")
    code, out, err = export("--overwrite", "--json")
    assert code == 0, err
    assert json.loads(out)["model"] == "models:/digits/3"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# Exit codes ----------------------------------------------------------------------------------


def test_bad_input_of_the_installed_command(tmp_path):
    """Here, because the session's Ray would hide that there is none at this address."""
    done = subprocess.run([Path(sys.executable).with_name("partialhn"), "train", *QUICK,
                           "--ray-address", "127.0.0.1:1"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    refused((done.returncode, done.stdout, done.stderr), "ray_address is '127.0.0.1:1'",
            "no cluster answers", "allowed: auto")


def test_a_failure_that_is_not_the_users_is_1(command, learned, digit_folder, tmp_path):
    """A flipped byte in a stored model."""
    stored = [path for path in Path(learned.output.storage).rglob("*.safetensors")
              if "mlartifacts" in path.parts]
    whole = {path: path.read_bytes() for path in stored}
    assert whole
    try:
        for path, content in whole.items():
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        code, _, err = command("predict", "--model", "models:/digits@champion", "--task", "0",
                               "--input", digit_folder(tmp_path / "images", 1, 1, 1), "--output",
                               tmp_path / "preds.parquet", "--storage", learned.output.storage)
    finally:
        for path, content in whole.items():
            path.write_bytes(content)
    assert code == 1, err
    assert "is damaged" in err
    assert not (tmp_path / "preds.parquet").exists()


def test_commands_on_a_stream(command, learned, digit_folder, tmp_path):
    """The four commands as a user types them; training finds what is there and exits with 0."""
    where = ("--storage", learned.output.storage)
    page, preds = tmp_path / "report.html", tmp_path / "preds.parquet"
    assert command("report", "--name", "digits", "--output", page, *where)[0] == 0
    assert page.read_text().startswith("<!doctype html>")
    code, out, _ = command("show", "--name", "digits", *where)
    assert code == 0
    assert "champion" in out
    code, out, _ = command("predict", "--model", "models:/digits@task-1", "--task", "0", "--input",
                           digit_folder(tmp_path / "images", 2, 2, 1), "--output", preds, *where)
    assert code == 0
    assert f"predictions: {preds}" in out
    assert pq.read_table(preds).num_rows == 6


def test_again_trains_nothing_and_decodes_nothing(learned, tmp_path, command):
    """The same work, its configuration from a file with one option put right by the command."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(learned.config.to_dict()
                                                      | {"compute": {"threads": 2}}))
    path = tmp_path / "result.json"
    code, out, err = command("train", "--config", tmp_path / "run.yaml", "--name", "digits",
                             "--storage", learned.output.storage, "--result", path,
                             "--threads", "1")
    assert code == 0, err
    result = json.loads(path.read_text())
    assert result["images_decoded"] == 0
    for key in ("accuracy_matrix", "epochs", "weights_hash", "versions", "feature_keys", "config"):
        assert result[key] == learned.result[key], key
    assert "trunk: already trained" in out
    assert not re.search(r"\bepoch \d", out)
    for part in ("accuracy", "forgotten", "partialhn report --name digits", f"result: {path}"):
        assert part in out


# Bad input -----------------------------------------------------------------------------------


@pytest.fixture
def train(command, tmp_path, monkeypatch):
    """`partialhn train` with these options, in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return lambda *words: command("train", *words)


def test_missing_path(train, tmp_path):
    refused(train("--data", tmp_path / "nowhere", "--tasks", 2), "nowhere")
    assert not list(Path.cwd().rglob("*.json"))


def test_no_images(train, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(train("--data", tmp_path / "empty", "--tasks", 2), "empty", "allowed|needs|no ")


def test_a_class_without_training_images(train, digit_folder, tmp_path):
    folder = digit_folder(tmp_path / "images", 3, 4, 2)
    for file in (folder / "train" / "digit-1").iterdir():
        file.unlink()
    refused(train("--data", folder, "--tasks", 2), "digit-1", "train")


def test_more_tasks_than_classes(train):
    refused(train(*QUICK, "--tasks", 11), "11", "10 classes|10")


@pytest.mark.parametrize(("words", "parts"), [
    (["--bogus", "3"], ["--bogus"]),
    (["--epochs", "many"], ["--epochs", "many"]),
    (["--epochs", "0"], ["epochs is 0", "allowed: 1 or more"]),
    (["--generator", "magic"], ["--generator", "magic", "bilinear"]),
    (["--freeze-depth", "17"], ["freeze_depth is 17", r"allowed: 0 .*to 4"]),
    (["--backbone", "resnet17"], ["resnet17", "resnet18"]),
    (["--name", "a/b"], ["'a/b'", "allowed: letters"]),
    (["--preset", "nothing"], ["'nothing'", "digits"]),
    (["--workers", "1000"], ["workers is 1000", "cluster has", "allowed: as many"]),
    (["--data", "torchvision:Nothing"], ["Nothing"]),
    (["--trunk", "nowhere.safetensors"], ["nowhere.safetensors"]),
])
def test_options_that_cannot_be(train, ray_cluster, words, parts):
    refused(train(*QUICK, *words), *parts)


@pytest.mark.parametrize(("text", "parts"), [
    ("train: {epochz: 3}", ["unknown configuration key train.epochz", "train.epochs"]),
    ("trian: {epochs: 3}", ["unknown configuration key trian", "allowed: data, backbone"]),
    ("train: {epochs: many}", ["train.epochs is 'many'", "int"]),
    ("train: [1, 2]", ["train is", "section"]),
    ("train: {epochs", ["run.yaml", "YAML"]),
])
def test_configuration_files_that_cannot_be(train, tmp_path, text, parts):
    (tmp_path / "run.yaml").write_text(text)
    refused(train("--config", tmp_path / "run.yaml"), *parts)


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a few bytes that would decode to side x side pixels."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (struct.pack(">I", len(body)) + kind + body
                + struct.pack(">I", zlib.crc32(kind + body)))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


@pytest.mark.parametrize(("content", "parts"), [
    (None, ["truncated|cut|unreadable|cannot be"]),
    (b"", ["empty|no image|not an image|cannot be"]),
    (bomb(), ["too large", "900000000", "max_image_pixels is 50000000"]),
], ids=["truncated", "empty", "bomb"])
def test_images_that_cannot_be(train, ray_cluster, digit_folder, tmp_path, content, parts):
    folder = digit_folder(tmp_path / "images", 2, 6, 2)
    image = folder / "train" / "digit-1" / "003.png"
    image.write_bytes(image.read_bytes()[:70] if content is None else content)
    refused(train(*QUICK, "--data", folder, "--tasks", 1, "--validation", 0), "digit-1/003.png",
            *parts)


def test_predictions_that_cannot_be(command, learned, digit_folder, tmp_path):
    images = digit_folder(tmp_path / "images", 1, 2, 1)
    (tmp_path / "none").mkdir()

    def predict(model="models:/digits@champion", task="0", images=images,
                storage=learned.output.storage):
        return command("predict", "--model", model, "--task", task, "--input", images, "--output",
                       tmp_path / "preds.parquet", "--storage", storage)

    refused(predict(model="models:/nobody@champion"), "'nobody'", "digits")
    refused(predict(model="models:/digits@nothing"), "alias 'nothing'", "champion")
    refused(predict(model="digits"), "'digits'", "allowed: models:/NAME@champion")
    refused(predict(task="7"), "task is '7'", "allowed: 0, 1, 2")
    refused(predict(images=tmp_path / "nowhere"), "nowhere")
    refused(predict(images=tmp_path / "none"), "none")
    refused(predict(storage=tmp_path / "elsewhere"), "elsewhere", "no registry")
    assert not (tmp_path / "preds.parquet").exists()


def test_streams_that_are_not_there(command, learned, tmp_path):
    for name in ("show", "report"):
        refused(command(name, "--name", "nobody", "--storage", learned.output.storage),
                "nobody", "digits")
    refused(command("report", "--result", tmp_path / "none.json"), "none.json")


def test_the_whole_configuration_is_on_the_command_line():
    """A key that only a file could set would be an option nobody finds."""
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    train = options(COMMANDS["train"])
    for kind in sections.values():
        for field in dataclasses.fields(kind):
            assert "--" + field.name.replace("_", "-") in train
    assert len(train) == len(set(train))


def test_no_word_is_bad_input_too(command):
    refused(command(), "train", "predict")
    refused(command("fly"), "fly")
