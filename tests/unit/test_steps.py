"""A recorded step: replayed without Python it does what taking it does, to the bit."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from partialhn.config import BackboneConfig
from partialhn.features.batches import ResidentBatches, Workers, epoch_batches
from partialhn.networks.backbone import build_network
from partialhn.networks.head import Head
from partialhn.networks.tensors import hash_tensors
from partialhn.run import cut_network
from partialhn.strategies import STRATEGIES
from partialhn.training.image_batches import Labelled
from partialhn.training.learner import Learner
from partialhn.training.optimiser import learning_rates, rate_factors
from partialhn.training.pretrain import network_optimiser, train_network
from partialhn.training.steps import UNRECORDED, Objective, Steps, recorder_for

KINDS = {
    "columns": {}, "bilinear": {"hypernet": {"generator": "bilinear"}},
    "additive": {"hypernet": {"generator": "additive"}},
    "instance norm": {"hypernet": {"norm": "instance"}},
    **{name: {"train": {"strategy": name}} for name in STRATEGIES if name != "partial_hn"},
}
for closed in ("ridge", "ncm"):  # they take no steps
    del KINDS[closed]
RECORDED = set(KINDS) - {"joint", "latent_replay"}


class Tape(TorchDispatchMode):
    """The operations of a step, as a CUDA graph keeps them: what was done, to which memory."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal",
                 "lift_fresh")
    """A device would have to be waited for, or numbers would come from the host's memory."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.FORBIDDEN
        made = function(*args, **kwargs or {})
        self.operations.append((function, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, made in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(made), pytree.tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """A recorder for the CPU. A CUDA graph is recorded without being run; this runs it."""

    def __init__(self):
        self.prepared, self.recorded, self.replayed = 0, 0, 0

    def prepare(self, body):
        self.prepared += 1
        body()

    def record(self, body):
        self.recorded += 1
        tape = Tape()
        with tape:
            body()
        ran = [True]

        def replay():
            if not ran:
                self.replayed += 1
                tape.replay()
            ran.clear()
        return replay


@pytest.fixture
def learn(network, tasks, with_options):
    def learn(kind, recorder=None, workers=None, stop=None, **options):
        sections = {name: dict(values) for name, values in KINDS[kind].items()}
        sections.setdefault("train", {}).update({"batch_size": 8, **options})
        config = with_options(**sections)
        learner = Learner(cut_network(config, network).strategy(config), config.train,
                          workers=workers,
                          recorder=recorder)
        for number, _ in enumerate(learner.learn(tasks[:3]), 1):
            if number == stop:
                break
        return learner
    return learn


def outcome(learner):
    return (hash_tensors(learner.strategy.state_dict()),
            [(record.loss, record.accuracy) for record in learner.epochs],
            [record.accuracy_row for record in learner.finished])


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_learn_the_same_bits(learn, kind):
    """Three tasks, ten steps each: had a step kept a number of its own, or the batch, the rate or
    the count of the first, the replays would repeat it.
    """
    tapes = Tapes()
    assert outcome(learn(kind, tapes)) == outcome(learn(kind))
    if kind in RECORDED:
        assert (tapes.prepared, tapes.recorded) == (3 * UNRECORDED, 3)
        assert tapes.replayed == 3 * (2 * 5 - UNRECORDED - 1)
    else:
        assert (tapes.prepared, tapes.recorded) == (0, 0)


def test_the_test_would_see_a_number_that_stays(learn, monkeypatch):
    """A rate that comes from the host is frozen into the record."""
    def step(self, read):
        rates = self._rates_SG[self._steps_run].tolist()
        for rate, group in zip(rates, self._optimiser.param_groups, strict=True):
            group["lr"].fill_(rate)
        loss, terms = self._objective(*read())
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._optimiser.step()
        torch._foreach_add_(self._sums[:len(terms)], terms)

    monkeypatch.setattr(Steps, "_run", step)
    monkeypatch.setattr(Tape, "FORBIDDEN", ())
    assert outcome(learn("columns", Tapes())) != outcome(learn("columns"))


def test_gone_on_with_after_an_epoch_it_is_the_same(learn, network, tasks, with_options):
    whole, first = learn("columns"), learn("columns", Tapes(), stop=4)
    config = with_options(train={"batch_size": 8})
    tapes = Tapes()
    second = Learner(cut_network(config, network).strategy(config), config.train, recorder=tapes)
    second.restore(*first.state())
    list(second.learn(tasks[:3]))
    assert outcome(second) == outcome(whole)
    assert tapes.recorded == 2


@pytest.mark.parametrize("options", [{"trunk_epochs": 3}, {"trunk_min_steps": 12}])
def test_replayed_steps_train_the_same_trunk(images, options):
    """Augmented images, and few ones that are warped too and make several passes an epoch."""
    config = BackboneConfig(trunk_batch_size=16, **options)
    outcomes, tapes = [], Tapes()
    for recorder in (None, tapes):
        network = build_network("slim_resnet18", 2, 0)
        records = train_network(network, Labelled(images[:40], torch.arange(40) % 2), config,
                                "crop-flip", network_optimiser(network, config),
                                recorder=recorder)
        losses = [record.loss for record in records]
        outcomes.append((losses, hash_tensors(network.state_dict())))
    assert outcomes[0] == outcomes[1]
    assert (tapes.prepared, tapes.recorded) == (UNRECORDED, 1)
    assert tapes.replayed >= 2


class Counted(TorchDispatchMode):
    """Counts operations that a device would run: neither views nor memory alone."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += not (function.is_view or name.startswith(("empty", "_record_function")))
        return function(*args, **kwargs or {})


class Counts:
    """A recorder that counts the operations of one step."""

    count = 0

    def prepare(self, body):
        body()

    def record(self, body):
        with Counted() as counted:
            body()
        self.count = counted.count
        return lambda: None


@pytest.mark.parametrize(("precision", "most"), [("float32", 83), ("bfloat16", 89)])
def test_a_step_has_few_operations(learn, precision, most):
    """Of a task with columns, at depth 3: five convolutions. Each operation is a kernel or two."""
    counts = Counts()
    learn("columns", counts, precision=precision)
    assert 60 < counts.count <= most


def test_weights_and_features_that_are_rounded_ahead_are_those_that_each_layer_would_round(
        learn, monkeypatch):
    """All weights of a shape are rounded by one operation; pooling needs no other."""
    ahead = learn("columns", precision="bfloat16")
    monkeypatch.setattr(Head, "rounds", False)
    assert outcome(ahead) == outcome(learn("columns", precision="bfloat16"))


def test_a_step_in_the_layout_of_a_gpu_has_the_same_gradients(learn, tasks, monkeypatch):
    """But for the order of sums, which bfloat16 rounds."""
    strategy = learn("columns", stop=6, precision="bfloat16").strategy.train()
    strategy.add_task(2)
    strategy.begin(2)
    batch = (tasks[2].train.gather(torch.arange(8), torch.zeros(8).long()),
             torch.arange(8) % 2, 1.0, ())
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for module in ("columns", "head"):
            monkeypatch.setattr(f"partialhn.networks.{module}.kernel_layout",
                                lambda device, layout=layout: layout)
        strategy.zero_grad()
        loss, _ = Objective(strategy, 2, 0.1)(*batch)
        loss.backward()
        found.append([loss, *(value.grad for value in strategy.parameters()
                              if value.grad is not None)])
    assert len(found[0]) > 10
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() <= 0.1 * mine.norm()


def moved(objective, mode):
    """An objective's parameters and buffers as on a GPU, and what else its modules hold moved too.

    Fake tensors have a device and no numbers: an operation on two devices fails.
    """
    def there(tree):
        return pytree.tree_map_only(torch.Tensor, lambda x: mode.from_tensor(x).to("cuda"), tree)

    for module in objective.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_skeleton") and any(
                    isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
                vars(module)[name] = there(value)
    return there(dict([*objective.named_parameters(), *objective.named_buffers()]))


@pytest.mark.parametrize("kind", sorted(RECORDED))
def test_nothing_of_a_step_lies_on_the_host(learn, tasks, kind):
    strategy = learn(kind, stop=6).strategy
    strategy.add_task(2)
    strategy.begin(2)
    objective = Objective(strategy.train(), 2, 0.1)
    objective(tasks[2].train.gather(torch.arange(8), torch.zeros(8).long()),
              torch.zeros(8).long(), 1.0, ())
    with FakeTensorMode() as mode:
        state = moved(objective, mode)
        batch = (torch.empty(8, *tasks[2].train.shape_CHW, device="cuda"),
                 torch.zeros(8, dtype=torch.int64, device="cuda"), 1.0, ())
        loss, terms = torch.func.functional_call(objective, state, batch)
        assert {each.device.type for each in (loss, *terms)} == {"cuda"}
        if kind == "columns":  # and it would be seen
            vars(strategy)["_inherited"] = tuple(x.cpu() for x in strategy._inherited)
            with pytest.raises(RuntimeError, match=r"cpu.*cuda|cuda.*cpu|same device"):
                torch.func.functional_call(objective, state, batch)


def test_what_is_read_from_a_map_or_shared_is_not_recorded(learn, monkeypatch):
    tapes = Tapes()
    learn("columns", tapes, workers=Workers(0, 2))
    monkeypatch.setattr("partialhn.training.answers.RESIDENT_BYTES", 0)
    assert outcome(learn("columns", tapes)) == outcome(learn("columns"))
    assert (tapes.prepared, tapes.recorded) == (0, 0)


def test_only_a_gpu_has_a_recorder():
    assert recorder_for(torch.device("cpu"), True) is None
    assert recorder_for(torch.device("cuda"), True) is not None
    assert recorder_for(torch.device("cuda"), False) is None


@pytest.mark.parametrize("workers", [Workers(), Workers(1, 2)])
def test_resident_batches_are_those_of_the_epoch(tasks, workers):
    features = tasks[0].train.to(torch.device("cpu"))
    read = ResidentBatches(features, 16, workers)
    for epoch in (1, 2):
        read.begin((0, 3, epoch))
        for wanted in epoch_batches(features, 16, (0, 3, epoch), workers):
            found = read()
            assert len(found.y_B) == read.batch
            assert torch.equal(found.z_BCHW, wanted.z_BCHW)
            assert torch.equal(found.y_B, wanted.y_B)
            assert (found.loss_scale, found.seed) == (wanted.loss_scale, wanted.seed)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_rises_and_then_follows_its_schedule(schedule):
    factors = rate_factors(schedule, 1000)
    assert factors[0] == pytest.approx(1 / 40)
    assert factors[39] == pytest.approx(1, abs=0.01)
    assert factors[-1] == (1 if schedule == "constant" else pytest.approx(0, abs=1e-5))
    assert len(factors) == 1000
    assert rate_factors(schedule, 1) == [1]


@pytest.mark.parametrize(("steps", "wanted"), [(20, 1e-3), (30, 1e-3), (45, 1.5e-3), (60, 2e-3),
                                               (700, 2e-3)])
def test_a_group_may_learn_faster_in_a_long_experience(steps, wanted):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "peak": 1e-3, "long_peak": peak}
              for peak in (1e-3, 2e-3)]
    rates_SG = learning_rates(torch.optim.Adam(groups), "constant", steps)
    assert rates_SG.shape == (steps, 2)
    assert rates_SG[-1].tolist() == pytest.approx([1e-3, wanted])


def test_bfloat16_is_for_learning_and_answers_are_float32(learn, tasks):
    """The weights stay float32 and near; what is asked of the learned head does not change."""
    exact, short = learn("columns"), learn("columns", precision="bfloat16")
    assert outcome(exact) != outcome(short)
    for record, other in zip(exact.epochs, short.epochs, strict=True):
        assert other.loss == pytest.approx(record.loss, abs=0.05)
    z_BCHW = tasks[0].test.gather(torch.arange(8), torch.zeros(8, dtype=torch.int64))
    strategy = short.strategy.eval()
    answers_BK = strategy(z_BCHW, 0)
    assert answers_BK.dtype == torch.float32
    strategy.head.precision = "float32"
    assert torch.equal(strategy(z_BCHW, 0), answers_BK)
