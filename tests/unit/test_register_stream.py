"""`Stream.register`: versions as `partialhn train` makes them, in a real MLflow on SQLite."""

import pytest

import partialhn as phn
from partialhn.errors import InputError, IntegrityError
from partialhn.evaluation.answer_sample import check_sample, read_sample
from partialhn.notebook.registries import GROUP, installed_registry
from pipelines.platform.storage import open_storage
from pipelines.registry.client import Registry, connect
from pipelines.registry.package import artifact
from pipelines.registry.verify import verify
from pipelines.settings import OutputConfig
from pipelines.train import train


@pytest.fixture(scope="module")
def registered(tmp_path_factory, empty_registry):
    """A stream, its storage, and the URIs after two tasks, after three, and once more."""
    folder = tmp_path_factory.mktemp("registered")
    empty_registry(folder / "store")
    stream = phn.Stream("digits", folder=folder / "new", progress=False, tasks=3, classes=6,
                        images_per_class=40, input_size=8, trunk_epochs=1, epochs=1, views=1,
                        augment="none", threads=1, device="cpu", fresh_columns=4)
    uris, store = [], str(folder / "store")
    stream.learn_next()
    stream.learn_next()
    uris.append(stream.register("digits", store))
    stream.learn()
    uris += [stream.register("digits", store), stream.register("digits", store)]
    return stream, store, uris


def test_a_version_for_each_task_and_none_twice(registered):
    stream, store, uris = registered
    assert uris == ["models:/digits/2", "models:/digits/3", "models:/digits/3"]
    versions = connect(open_storage(store)).versions("digits")
    assert [version.task for version in versions] == ["0", "1", "2"]
    assert [set(version.aliases) for version in versions] == [
        {"task-0"}, {"task-1"}, {"task-2", "champion"}]
    assert versions[-1].tags["weights_hash"] == stream.weights_hash
    assert versions[-1].metrics["acc"] == stream.metrics.accuracy


def test_a_version_has_its_sample_its_history_and_the_result(registered, tmp_path):
    stream, store, uris = registered
    registry = connect(open_storage(store))
    folder = registry.download(registry.resolve(uris[-1]), tmp_path)
    checked = check_sample(read_sample(artifact(folder, "sample")),
                           lambda images, task: _answers(stream.predict(images, task)))
    assert checked.passed
    assert checked.images > 30
    assert registry.aliases.keeps_history("digits")
    assert registry.load_predictor("models:/digits@champion")[0].model.weights_hash() == (
        stream.weights_hash)
    assert registry.result("digits")["accuracy_matrix"][2] == [
        *stream.results[2].accuracy.values()]


@pytest.mark.parametrize(("raised", "refused"), [
    (PermissionError(13, "Permission denied"), InputError),
    (ConnectionRefusedError(111, "Connection refused"), InputError),
    (FileNotFoundError(2, "No such file or directory"), IntegrityError)])
def test_files_out_of_reach_are_not_called_damaged(registered, monkeypatch, tmp_path, raised,
                                                   refused):
    """Nobody should roll back or repair because keys are wrong or a server is down."""
    def fails(*_):
        raise raised

    registry = connect(open_storage(registered[1]))
    version = registry.resolve("models:/digits@champion")
    monkeypatch.setattr(Registry, "files", fails)
    with pytest.raises(refused) as caught:
        registry.load_predictor(version.uri)
    assert ("is damaged" in str(caught.value)) == (refused is IntegrityError)
    assert ("is unknown" in str(caught.value)) == (refused is InputError)
    if refused is InputError:
        for reads in (lambda: registry.stored_hashes(version, tmp_path / "x"),
                      lambda: verify(registry, version)):
            with pytest.raises(InputError, match="is unknown"):
                reads()
    else:
        assert registry.stored_hashes(version, tmp_path / "x") == {}
        assert not verify(registry, version)[0].passed


def _answers(table):
    return table["label"].tolist(), table["probability"].tolist()


def test_train_finds_everything_learned(registered, tmp_path):
    """The same stream in the same storage: no image is decoded, no task learned again."""
    stream, store, _ = registered
    lines = []
    output = OutputConfig("digits", store, None, str(tmp_path / "result.json"))
    result = train(stream.config, output, lines.append)
    assert result["images_decoded"] == 0
    assert result["device"] == "none: everything was learned before"
    assert result["weights_hash"] == stream.weights_hash
    assert [version["version"] for version in result["versions"]] == [1, 2, 3]
    assert "trunk: already trained" in lines


def test_a_name_that_cannot_be_used(registered):
    stream, store, _ = registered
    with pytest.raises(phn.InputError, match="name is 'my digits'; allowed: letters"):
        stream.register("my digits", store)


def test_the_registry_is_found_by_its_entry_point(registered):
    from pipelines.register_stream import register

    assert installed_registry() is register, f"install this project again: {GROUP} is not known"
