"""A sample of test images with a model's answers: those it gives, for one pass of the trunk."""

import pytest

from partialhn import predict
from partialhn.evaluation import answer_sample
from partialhn.predict import Predictor


def test_the_trunk_runs_once_over_all_tasks(digit_tasks, tmp_path, monkeypatch):
    predictor, batches = Predictor.load(digit_tasks.folder / "model-3"), []
    run = predict.run_trunk

    def counted(trunk, images_BCHW, *kept_on):
        batches.append(len(images_BCHW))
        return run(trunk, images_BCHW, *kept_on)

    monkeypatch.setattr(predict, "run_trunk", counted)
    answer_sample.write_sample(tmp_path / "sample.parquet", predictor, digit_tasks.experiences[:3])
    assert batches == [3 * (answer_sample.IMAGES // 3)]
    rows = answer_sample.read_sample(tmp_path / "sample.parquet").to_pylist()
    for task in digit_tasks.NAMES:  # as `predict` answers for the task alone, to the bit
        mine = [row for row in rows if row["task"] == task]
        found = predictor.predict([row["image"] for row in mine], task)
        assert [row["expected"] for row in mine] == found.labels
        assert [row["probability"] for row in mine] == found.probabilities_BK.max(1).tolist()
        assert {row["label"] for row in mine} == set(found.classes)


def test_no_image_that_fits(digit_tasks, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_sample, "MAX_BYTES", 0)
        answer_sample.write_sample(tmp_path / "sample.parquet",
                            Predictor.load(digit_tasks.folder / "model-1"),
                            digit_tasks.experiences[:1])
    assert answer_sample.read_sample(tmp_path / "sample.parquet").num_rows == 0


@pytest.mark.parametrize("count", [1, 3])
def test_the_model_is_asked_again(digit_tasks, tmp_path, count):
    predictor = Predictor.load(digit_tasks.folder / f"model-{count}")
    answer_sample.write_sample(tmp_path / "a.parquet", predictor, digit_tasks.experiences[:count])

    def answer(images, task):
        found = predictor.predict(images, task)
        return found.labels, found.probabilities_BK.max(1).tolist()

    checked = answer_sample.check_sample(answer_sample.read_sample(tmp_path / "a.parquet"), answer)
    assert checked.passed
    assert checked.accuracy == checked.expected_accuracy
