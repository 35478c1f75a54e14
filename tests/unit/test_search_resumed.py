"""What a resumed search takes from the options given to it, and what it refuses."""

import dataclasses

import pytest

from partialhn.config import ComputeConfig, Config, DataConfig, HypernetConfig, TrainConfig
from partialhn.errors import InputError
from pipelines.platform.storage import open_storage
from pipelines.search.checks import check_same_space, resumed, sole_session
from pipelines.search.settings import SearchConfig
from pipelines.search.space import parse_space

SAVED = Config(data=DataConfig(data="images", tasks=4), train=TrainConfig(epochs=5))


def test_without_options_it_is_as_it_was_started():
    assert resumed(SAVED, Config()) == SAVED
    assert resumed(SAVED, SAVED) == SAVED


def test_the_machine_and_the_place_of_the_images_are_those_given():
    here = Config(data=DataConfig(data="moved/images", image_column="picture"),
                  compute=ComputeConfig(threads=7))
    found = resumed(SAVED, here)
    assert (found.data.data, found.data.image_column) == ("moved/images", "picture")
    assert found.compute.threads == 7
    assert (found.data.tasks, found.train) == (4, SAVED.train)


@pytest.mark.parametrize(("given", "parts"), [
    (Config(data=DataConfig(tasks=3)), ["tasks is 3", "allowed: 4", "--name"]),
    (Config(train=TrainConfig(epochs=6)), ["epochs is 6", "allowed: 5"]),
    (Config(train=TrainConfig(strategy="ridge")), ["strategy is 'ridge'", "allowed: 'partial_hn'"]),
    (Config(hypernet=HypernetConfig(norm="group")), ["norm is 'group'"])])
def test_an_option_that_makes_another_search_is_refused(given, parts):
    with pytest.raises(InputError) as error:
        resumed(SAVED, given)
    for part in parts:
        assert part in str(error.value)


def test_other_depths_are_refused(tmp_path):
    space = parse_space({}, SAVED, (2, 3))
    check_same_space(space, SAVED, SearchConfig())
    check_same_space(space, SAVED, SearchConfig(depths=("layer2", 3)))
    file = tmp_path / "space.yaml"
    file.write_text("train.label_smoothing: 0.1")
    for options in (SearchConfig(depths=(3, 4)), SearchConfig(space=str(file))):
        with pytest.raises(InputError, match=r"the depths \[2, 3\]; allowed: leave depths"):
            check_same_space(space, SAVED, options)
    same = dataclasses.replace(SAVED)
    check_same_space(parse_space({"train.label_smoothing": 0.1}, same, (2, 3)), same,
                     SearchConfig(depths=(2, 3), space=str(file)))


def test_a_second_session_of_a_search_is_refused_while_the_first_works(tmp_path):
    storage = open_storage(str(tmp_path))
    with sole_session(storage, "mine"):
        with pytest.raises(InputError, match=r"search 'mine' is in use by another process \(.*"
                           r"process \d+.*allowed: another --name"):
            sole_session(storage, "mine")
        with sole_session(storage, "other"):
            pass
    with sole_session(storage, "mine"):
        assert (tmp_path / "searches" / "mine" / "lease").is_dir()
