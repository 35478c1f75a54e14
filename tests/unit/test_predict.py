"""Predictor: names in, labels and probabilities out, one image's answer in any company."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.errors import InputError, IntegrityError
from partialhn.predict import Predictor
from partialhn.strategies import STRATEGIES
from partialhn.training.learner import Learner

INFOS = (TaskInfo("even", ("zero", "one")), TaskInfo("2", ("two", "three")),
         TaskInfo("odd", ("four", "five")))


@pytest.fixture(scope="module")
def folder(cut, tasks, config, tmp_path_factory):
    strategy = STRATEGIES["partial_hn"](cut.head, cut.start, config)
    list(Learner(strategy, config.train).learn(tasks[:3]))
    path = tmp_path_factory.mktemp("predict") / "model"
    Model(config, cut.trunk, strategy, INFOS).save(path)
    return path


@pytest.fixture(scope="module")
def predictor(folder):
    return Predictor.load(folder)


@pytest.fixture(scope="module")
def encoded(images):
    made = []
    for pixels in images[:70]:
        buffer = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        made.append(buffer.getvalue())
    return made


def test_answers_have_labels_and_probabilities(predictor, encoded):
    found = predictor.predict(encoded, "even")
    assert found.classes == ("zero", "one")
    assert found.probabilities_BK.shape == (70, 2)
    assert found.probabilities_BK.dtype == np.float32
    np.testing.assert_allclose(found.probabilities_BK.sum(1), 1, rtol=1e-5)
    best = found.probabilities_BK.argmax(1)
    assert found.labels == [found.classes[index] for index in best]


def test_answers_are_those_of_the_model(predictor, encoded, images):
    model = predictor.model
    with torch.no_grad():
        logits_BK = model.strategy(model.trunk(images[:70]), 2)
    np.testing.assert_allclose(predictor.predict(encoded, "odd").probabilities_BK,
                               logits_BK.softmax(1).numpy(), rtol=1e-4, atol=1e-6)


def test_an_answer_does_not_depend_on_company(predictor, encoded):
    together = predictor.predict(encoded, "even").probabilities_BK
    alone = np.concatenate([predictor.predict([one], "even").probabilities_BK
                            for one in encoded[:10]])
    np.testing.assert_allclose(alone, together[:10], rtol=1e-5, atol=1e-6)
    backwards = predictor.predict(encoded[::-1], "even").probabilities_BK[::-1]
    np.testing.assert_allclose(backwards, together, rtol=1e-5, atol=1e-6)


def test_tasks_by_name_and_by_index(predictor):
    assert predictor.tasks == ["even", "2", "odd"]
    given = ("even", "2", "odd", "0", "1")
    assert [predictor.task_index(task) for task in given] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("task", ["3", "-1", "Even", "", "²"])
def test_an_unknown_task_lists_those_there_are(predictor, task):
    with pytest.raises(InputError, match="allowed: even, 2, odd or an index from 0 to 2"):
        predictor.predict([], task)
    with pytest.raises(InputError, match=r"task is 'x{100}\.\.\.'; allowed: even"):
        predictor.task_index("x" * 1000)


def test_auto_is_allowed_only_where_it_can_be_used(predictor):
    with pytest.raises(InputError, match="task is 'none'; allowed: even, 2, odd, all or an index"):
        predictor.task_index("none", ("all",))
    has_auto = predictor.model.inference is not None
    with pytest.raises(InputError, match="odd, auto or an" if has_auto else "2, odd or an index"):
        predictor.check_task("none")
    with pytest.raises(InputError, match="task is 'auto'; allowed: even, 2, odd or an index"):
        predictor.predict([], "auto")


def test_no_images_no_answers(predictor):
    found = predictor.predict([], "even")
    assert found.labels == []
    assert found.probabilities_BK.shape == (0, 2)


def test_a_bad_image_is_named_by_its_position(predictor, encoded):
    with pytest.raises(InputError, match="number 1"):
        predictor.predict([encoded[0], b"not an image"], "even")
    with pytest.raises(InputError, match="number 0"):
        predictor.predict([encoded[0][:50]], "even")


def test_a_damaged_model_does_not_answer(folder, tmp_path):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "model.json").write_bytes((folder / "model.json").read_bytes())
    with pytest.raises(IntegrityError, match="damaged"):
        Predictor.load(tmp_path)
    with pytest.raises(IntegrityError, match="cannot be read"):
        Predictor.load(tmp_path / "none")


@pytest.mark.parametrize(("given", "message"), [
    (b"one image", "images is, or holds, a bytes; allowed: a list of encoded images"),
    ("image.png", "images is, or holds, a str"), (["image.png"], "images is, or holds, a str"),
    ([np.zeros((8, 8), np.uint8)], "images is, or holds, a ndarray"),
    ([b"no image"], r"^image number 0 is no readable .*; mend it or leave it out$")])
def test_what_is_no_list_of_encoded_images_is_refused(predictor, given, message):
    with pytest.raises(InputError, match=message):
        predictor.predict(given, "even")


def test_a_task_may_be_given_by_number(predictor, encoded):
    assert predictor.predict(encoded[:2], 0).classes == ("zero", "one")
