"""`Stream`: the same weights as `run_stream`, resumed, shown, saved and asked with any images."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import partialhn as phn
from partialhn.config import Config
from partialhn.data.datasets import open_stream
from partialhn.notebook.options import SECTIONS
from partialhn.notebook.progress import LogBars, TerminalBars, bar_html
from partialhn.numbers import percent

ROOT = Path(__file__).parents[2]
OPTIONS = dict(tasks=3, classes=6, images_per_class=40, input_size=8, trunk_epochs=1, epochs=2,
               views=1, augment="none", threads=1, device="cpu", fresh_columns=4)


def open_tiny(folder, data="digits", **options):
    return phn.Stream(data, folder=folder, progress=False, **OPTIONS | options)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """The same stream by `run_stream`."""
    config = open_tiny(tmp_path_factory.mktemp("config") / "new").config
    return phn.run_stream(config, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Three tasks, learned one and then the others."""
    stream = open_tiny(tmp_path_factory.mktemp("stream") / "new")
    first = stream.learn_next()
    assert (first.task, first.index, first.tasks) == ("0", 0, 3)
    assert stream.learned == ["0"]
    assert stream.accuracy_matrix.shape == (1, 1)
    return stream.learn()


@pytest.fixture(scope="module")
def digits(stream):
    """Encoded test images of the first task."""
    return open_stream(stream.config.data, stream.folder / "datasets")[0].test.read()


def test_it_learns_what_run_stream_learns(stream, oracle):
    assert stream.weights_hash == oracle.model.weights_hash() == oracle.fields["weights_hash"]
    wanted = np.array(oracle.fields["accuracy_matrix"], dtype=float)
    np.testing.assert_array_equal(stream.accuracy_matrix.to_numpy(), wanted)
    assert stream.metrics.accuracy == oracle.fields["acc"]
    assert stream.metrics.forgetting == 0
    assert [result.task for result in stream.results] == ["0", "1", "2"]


def test_the_same_folder_goes_on_and_says_when_nothing_is_left(stream):
    again = phn.Stream(folder=stream.folder, progress=False)
    assert again.config == stream.config
    assert again.learned == ["0", "1", "2"]
    assert again.learn().weights_hash == stream.weights_hash
    pd.testing.assert_frame_equal(again.accuracy_matrix, stream.accuracy_matrix)
    with pytest.raises(phn.InputError, match=r"all 3 tasks are learned \(0, 1, 2\)"):
        again.learn_next()


KILLED = """
import sys, time
import partialhn as phn
from partialhn.notebook.progress import Bars
import partialhn.notebook.stream as module
class Slow(Bars):
    def show(self, name, done, total, note=""):
        print(name, done, flush=True)
        if name.startswith("task 2/") and done == 1:
            time.sleep(600)
module.open_bars = lambda progress: Slow()
phn.Stream("digits", folder=sys.argv[1], **{options!r}).learn()
"""


def test_killed_in_the_middle_of_task_2_it_learns_the_same(tmp_path, oracle):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(options=OPTIONS), str(tmp_path / "new")],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert any(line.startswith("task 2/3 '1' 1") for line in process.stdout)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    stream = open_tiny(tmp_path / "new")
    assert stream.learned == ["0"]
    assert stream.learn_next().task == "1"
    assert stream.learn().weights_hash == oracle.model.weights_hash()


def test_an_interrupted_epoch_leaves_no_trace(tmp_path, oracle, monkeypatch):
    stream = open_tiny(tmp_path / "new")
    stream.learn_next()

    def interrupt(self, name, done, total, note=""):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr("partialhn.notebook.progress.Bars.show", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream.learn()
    assert stream.learned == ["0"]
    assert stream.learn().weights_hash == oracle.model.weights_hash()


def test_compare_learns_the_other_strategies_too(tmp_path):
    stream = open_tiny(tmp_path / "new", compare=["naive"], epochs=1, tasks=2, classes=4)
    assert stream.learn_next().task == "0"
    assert list(stream.comparison.index) == ["partial_hn"]
    stream.learn()
    assert list(stream.comparison.index) == ["partial_hn", "naive"]
    assert stream.comparison.loc["partial_hn", "acc"] == stream.metrics.accuracy


def test_options_are_the_keys_of_the_configuration(tmp_path):
    sections = Config().to_dict()
    assert sum(map(len, sections.values())) == len(SECTIONS)
    for name, section in SECTIONS.items():
        assert name in sections[section]


@pytest.mark.parametrize(("options", "message"), [
    ({"epoch": 3}, "unknown option epoch; the nearest: epochs"),
    ({"zzz": 3}, "unknown option zzz; allowed: adapt_learning_rate, "),
    ({"epochs": 0}, "epochs is 0; allowed: 1 or more"),
    ({"epochs": "3"}, "train.epochs is '3'; allowed: a value of type int"),
    ({"workers": 2}, "workers is 2; a Stream learns in this process"),
    ({"data": "/nowhere"}, "'/nowhere' does not exist"),
    ({"preset": "digit"}, "preset is 'digit'; allowed: digits"),
    ({"preset": "digits", "config": Config()}, "config and preset are given"),
])
def test_options_that_cannot_be_used(tmp_path, options, message):
    with pytest.raises(phn.InputError, match=message):
        phn.Stream(folder=tmp_path / "new", progress=False, **options)
    assert not (tmp_path / "new" / "stream.json").exists()


def test_nothing_can_be_asked_before_the_first_task(tmp_path):
    stream = open_tiny(tmp_path / "new")
    for ask in (lambda: stream.metrics, lambda: stream.accuracy_matrix, stream.plot,
                lambda: stream.predict(b""), lambda: stream.save(tmp_path / "model"),
                lambda: stream.register("digits"), lambda: stream.comparison):
        with pytest.raises(phn.InputError, match="no task is learned yet"):
            ask()
    stream.learn_next()
    with pytest.raises(phn.InputError, match=r"task is '2', which is not learned yet; allowed: 0"):
        stream.predict(b"", task="2")
    with pytest.raises(phn.InputError, match=r"task is 'nine'; allowed: 0, auto"):
        stream.predict(b"", task="nine")


def test_a_folder_belongs_to_one_stream(stream, tmp_path):
    with pytest.raises(phn.InputError, match="epochs is 3, in the folder it is 2"):
        open_tiny(stream.folder, epochs=3)
    open_tiny(stream.folder, cache_gib=1, compare=["naive"])
    (tmp_path / "file").write_text("")
    with pytest.raises(phn.InputError, match="is a file; allowed: a folder"):
        open_tiny(tmp_path / "file")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "stream.json").write_text("{}")
    with pytest.raises(phn.IntegrityError, match=r"stream\.json cannot be read"):
        open_tiny(tmp_path / "damaged")


def add_task(folder, name, count=10):
    for label in "ab":
        for part in ("train", "test"):
            (folder / name / part / label).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8), 20 * number).save(
                    folder / name / part / label / f"{number}.png")


def test_new_tasks_may_come_but_old_ones_stay(tmp_path, monkeypatch):
    add_task(tmp_path / "data", "first")
    monkeypatch.chdir(tmp_path)
    assert phn.Stream(Path("data"), folder="new", input_size=8).tasks == ["first"]
    add_task(tmp_path / "data", "second")
    monkeypatch.chdir("/")
    assert phn.Stream(folder=tmp_path / "new").tasks == ["first", "second"]
    next((tmp_path / "data" / "first" / "train" / "a").iterdir()).unlink()
    with pytest.raises(phn.InputError, match="of other images: its task 0 was 'first'"):
        phn.Stream(folder=tmp_path / "new")


def test_images_in_every_form_are_answered_alike(stream, digits, tmp_path):
    for number, image in enumerate(digits[:3]):
        (tmp_path / f"{number}.png").write_bytes(image)
    wanted = stream.predict(digits[:3], task="0")
    assert list(wanted.columns) == ["id", "label", "probability"]
    assert list(wanted["id"]) == ["0", "1", "2"]
    paths = sorted(tmp_path.iterdir())
    pictures = [Image.open(path) for path in paths]
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    for images in (paths, pictures, arrays, np.stack(arrays), tuple(digits[:3]), tmp_path):
        found = stream.predict(images, task=0)
        pd.testing.assert_frame_equal(found[["label", "probability"]],
                                      wanted[["label", "probability"]])
    assert list(stream.predict(tmp_path, "0")["id"]) == ["0.png", "1.png", "2.png"]
    assert list(stream.predict(str(paths[1]), "0")["id"]) == ["1.png"]
    grey = np.asarray(pictures[0].convert("L"))
    for one in (digits[0], pictures[0], arrays[0], grey, grey[..., None]):
        assert stream.predict(one, "0")["label"].tolist() == wanted["label"][:1].tolist()
    assert len(stream.predict([], "0")) == 0


def test_the_folder_of_a_stream_is_no_model(stream):
    with pytest.raises(phn.InputError, match="is that of a stream; allowed: the folder of one"):
        phn.Predictor.load(stream.folder)


def test_answers_agree_with_the_saved_model(stream, digits, tmp_path):
    loaded = phn.Predictor.load(stream.save(tmp_path / "model")).predict(digits, "0")
    found = stream.predict(digits, "0")
    assert found["label"].tolist() == loaded.labels
    np.testing.assert_array_equal(found["probability"].to_numpy(dtype=np.float32),
                                  loaded.probabilities_BK.max(1))
    auto = stream.predict(digits)
    assert list(auto.columns) == ["id", "task", "label", "probability", "task_probability"]
    assert auto["task_probability"].between(0, 1).all()
    assert set(auto["task"]) <= {"0", "1", "2"}
    stream.save(tmp_path / "model")  # again, over its own
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(phn.InputError, match="holds something else than a model"):
        stream.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(("images", "message"), [
    (np.zeros((8, 8, 3)), "images has dtype float64; allowed: uint8"),
    (np.zeros((3, 8, 8), np.uint8), r"images has shape \(3, 8, 8\); allowed: \(H, W\)"),
    (np.zeros((0, 8, 3), np.uint8), "at least one pixel"),
    (np.zeros(8, np.uint8), r"images has shape \(8,\)"),
    (7, "images is a int; allowed: a path"),
    (pd.DataFrame({"image": [b"x"]}), "images is a DataFrame; allowed: a path"),
    ({"bytes": b"x"}, "images is a dict; allowed: a path"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), "images is a Tensor; allowed: a path"),
    (torch.zeros(8), "images is a Tensor; allowed: a path"),
    (memoryview(b"no image"), "image 0 is no readable.*; mend it or leave it out$"),
    (Image.fromarray(np.full((8, 8), 0.5, np.float32)), r"32-bit values \(mode F\)"),
    (Image.fromarray(np.full((8, 8), 70_000, np.int32)), r"32-bit values \(mode I\)"),
    ([b"no image"], "image 0 is no readable"),
    ("/nowhere", "'/nowhere' does not exist"),
])
def test_images_that_cannot_be_used(stream, images, message):
    with pytest.raises(phn.InputError, match=message):
        stream.predict(images, task="0")


def test_a_column_of_a_data_frame_is_a_list_of_images(stream, digits):
    column = pd.Series(digits[:3], index=[7, 8, 9])
    wanted = stream.predict(digits[:3], task="0")
    for images in (column, column.to_numpy()):
        pd.testing.assert_frame_equal(stream.predict(images, task="0"), wanted)


def test_a_predictor_says_which_function_infers_the_task(stream, digits):
    with pytest.raises(phn.InputError, match=r"task is 'auto'; allowed: .*, or predict_auto\("):
        phn.Predictor(stream.model).predict(digits[:1], "auto")


def test_options_may_be_numbers_of_numpy(tmp_path):
    stream = open_tiny(tmp_path / "new", tasks=None, classes=None, images_per_class=np.int64(40),
                       task_sizes=np.array([2, 4, 4]), learning_rate=np.float32(0.5))
    assert stream.config.data.images_per_class == 40
    assert stream.config.data.task_sizes == (2, 4, 4)
    assert stream.config.train.learning_rate == 0.5


@pytest.mark.parametrize("data", [pd.DataFrame({"image": [b"x"]}), np.zeros((500, 8, 8)), 7])
def test_images_in_memory_are_no_data(tmp_path, data):
    kind = type(data).__name__
    with pytest.raises(phn.InputError, match=rf"^data is a {kind}; allowed: the path of a folder"):
        open_tiny(tmp_path / "new", data=data)


def test_a_folder_alone_must_hold_a_stream(tmp_path):
    with pytest.raises(phn.InputError, match=r"'.*typo' holds no stream; allowed: the folder of"):
        phn.Stream(folder=tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_it_is_shown_in_a_notebook(stream):
    html = stream._repr_html_()
    assert "3 of 3 tasks learned" in html
    for value in stream.accuracy_matrix.to_numpy()[2]:
        assert percent(value) in html
    result = stream.results[-1]
    assert percent(result.accuracy['2']) in result._repr_html_()
    assert "3 of 3 tasks learned" in repr(stream)
    for text in (html, result._repr_html_()):
        assert "color:#" not in text, "text keeps the page's colour, light or dark"


def test_names_are_escaped_and_long_streams_cut():
    from partialhn.notebook.display import stream_html

    html = stream_html("<b>", [f"<i>{n}" for n in range(30)], [[0.5] * (n + 1) for n in range(20)])
    assert "<i>" not in html
    assert "<b><b>" not in html
    assert html.count("<tr>") == 13


def test_the_figure_has_labels_units_and_chance(stream):
    figure = stream.plot()
    matrix, mean = figure.axes[:2]
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("accuracy on task", "after learning task")
    assert "(%)" in mean.get_ylabel()
    assert mean.lines[1].get_label() == "chance"
    np.testing.assert_allclose(mean.lines[1].get_ydata(), [50, 50, 50])
    np.testing.assert_allclose(mean.lines[0].get_ydata()[-1], 100 * stream.metrics.accuracy)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_progress_in_a_log_is_a_line_a_step(capsys):
    with LogBars() as bars:
        for done in range(1, 51):
            bars.show("features", done, 50)
        bars.show("task 1/2 'a'", 2, 2, "accuracy 90.0 %")
    assert capsys.readouterr().err == "features: 50/50\ntask 1/2 'a': 2/2, accuracy 90.0 %\n"


def test_progress_in_a_terminal_stays_when_it_is_done(capsys):
    with TerminalBars() as bars:
        bars.show("trunk", 1, 3)
        bars.show("trunk", 3, 3, "accuracy 90.0 %")
    shown = capsys.readouterr().err
    assert "trunk" in shown
    assert "3/3" in shown
    assert "accuracy 90.0 %" in shown


def test_progress_in_a_notebook_replaces_its_line():
    assert '<progress value="2" max="4"' in bar_html("a<b", 2, 4, "x")
    assert "a&lt;b" in bar_html("a<b", 2, 4, "x")
