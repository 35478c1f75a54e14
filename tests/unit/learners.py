"""What tests compare learners by."""

import dataclasses

from partialhn.networks.tensors import hash_tensors


def weights_hash(learner):
    return hash_tensors(learner.strategy.state_dict())


def measured(learner):
    """Everything recorded but for seconds, and the grounds of measurements, which name the device.
    """
    return ([dataclasses.replace(record, seconds=0) for record in learner.epochs],
            [dataclasses.replace(record, train_seconds=0, evaluate_seconds=0, measured=None)
             for record in learner.finished])
