"""Checks before a search starts, and whether a resumed search is the same one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from partialhn.config import Config
from partialhn.data.experience import Experience
from partialhn.errors import InputError
from partialhn.networks.backbone import build_network
from partialhn.run import check
from pipelines.platform.lease import Lease
from pipelines.platform.storage import Storage
from pipelines.search.settings import SearchConfig, parse_budget
from pipelines.search.space import Space, load_space

PLACE = ("data", "image_column", "label_column")
"""Options of the data that say where the same images are."""


def resumed(saved: Config, given: Config) -> Config:
    """The configuration that a search was started with, with the compute options given now, and
    the place of the images where one is given.

    Raises: InputError for another option that is given and would make another search of it.
    """
    usual = Config()
    for field in dataclasses.fields(Config):
        for key, value in vars(getattr(given, field.name)).items():
            began_with = getattr(getattr(saved, field.name), key)
            if (field.name == "compute" or value in (getattr(getattr(usual, field.name), key),
                                                     began_with)):
                continue
            if field.name == "data" and key in PLACE:
                saved = dataclasses.replace(saved, data=dataclasses.replace(saved.data,
                                                                            **{key: value}))
                continue
            raise InputError(f"{key} is {value!r}; allowed: {began_with!r}, as the search was "
                             "started with; or another --name without --resume")
    return dataclasses.replace(saved, compute=given.compute)


def check_same_space(saved: Space, config: Config, options: SearchConfig) -> None:
    """Checks depths and space that are given to a resumed search. Raises: InputError for others."""
    if options.depths is None and options.space is None:
        return
    if load_space(options.space, config, options.depths).to_dict() != saved.to_dict():
        given = f"depths {options.depths}" if options.depths else f"space {options.space!r}"
        raise InputError(f"{given}: the search was started with another space, of the depths "
                         f"{saved.depths()}; allowed: leave depths and space out to go on with it, "
                         "or another --name without --resume")


def check_search(config: Config, space: Space, budget: str) -> None:
    """Checks configuration, space and budget. Raises: InputError for what cannot work."""
    if config.compute.workers > 1:
        raise InputError(f"workers is {config.compute.workers}; allowed: 1, since a trial of a "
                         "search trains in one process (several trials run at once instead)")
    if config.train.strategy != "partial_hn":
        raise InputError(f"strategy is {config.train.strategy!r}; allowed: partial_hn, since the "
                         "search compares it with separate_heads by itself")
    if config.data.validation == 0:
        raise InputError("validation is 0; allowed: more than 0, since a search decides on "
                         "held-out images and never on test images")
    trials, least = parse_budget(budget).trials, len(space.grid_points())
    if trials is not None and trials < least:
        raise InputError(f"budget is {budget!r} for {least} grid points (depths); allowed: at "
                         f"least {least}-trials, or fewer depths")
    network = build_network(config.backbone.backbone, 2, input_size=config.data.input_size)
    for depth in space.possible_depths():
        check(dataclasses.replace(config, backbone=dataclasses.replace(
            config.backbone, freeze_depth=depth)), network)


def check_stream(experiences: Sequence[Experience]) -> None:
    """Checks the tasks. Raises: InputError for one task alone, or no held-out images."""
    if len(experiences) < 2:
        raise InputError("the stream has 1 task; allowed: 2 or more, since the cost of a depth is "
                         "measured on the tasks that the trunk was not trained on")
    for each in experiences:
        if not len(each.validation):
            raise InputError(f"task {each.name!r} has no held-out images; allowed: at least one a "
                             "task, so raise validation")


def sole_session(storage: Storage, name: str) -> Lease:
    """The claim to a search, to be released at the end of the session.

    Raises: InputError where another process works at it, whose trials this one would repeat.
    """
    lease = Lease(storage, name, of="searches")
    if (holder := lease.acquire()) is not None:
        raise InputError(f"search {name!r} is in use by another process ({holder}); allowed: "
                         f"another --name, or wait until that one ends or, if it was killed on "
                         f"another machine, for {lease.seconds:g} s")
    return lease


def settled(saved: dict[str, Any], asked: dict[str, Any],
            options: SearchConfig) -> dict[str, Any]:
    """The settings that the search was started with, with the options that may change.

    Raises: InputError where another search has the name, or its images are no longer the same.
    """
    prints = [[task["fingerprint"] for task in each["tasks"]] for each in (saved, asked)]
    same = {key: Config.from_dict(each["config"]).work_hash() + str(each["space"])
            for key, each in (("saved", saved), ("asked", asked))}
    if prints[0] != prints[1]:
        raise InputError(f"search {saved['name']!r} was started on other images (the tasks' "
                         "fingerprints differ); allowed: the same images, or another --name")
    if same["saved"] != same["asked"]:
        raise InputError(f"search {saved['name']!r} exists with another configuration or space; "
                         f"allowed: --resume {saved['name']} to go on with it, or another --name")
    return saved | {"options": options.changed(saved["options"])}
