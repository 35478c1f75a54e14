"""The closed-form regulariser against the direct sum, and the columns of the bilinear generator."""

import copy

import pytest
import torch

from partialhn.config import HypernetConfig
from partialhn.hypernet import (
    AdditiveGenerator,
    BilinearGenerator,
    GeneratedTensor,
    build_generator,
)

LAYERS = (GeneratedTensor("first", (6, 4, 3, 3)), GeneratedTensor("second", (5, 6, 3, 3)),
          GeneratedTensor("shortcut", (5, 4, 1, 1)))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def generator(kind, residual, dtype=torch.float64, seed=0):
    """With every shared value random, as after some training."""
    torch.manual_seed(seed)
    made = (BilinearGenerator(LAYERS, 7, 0, residual=residual) if kind == "bilinear"
            else AdditiveGenerator(LAYERS, 9, (6, 5), 4, residual=residual))
    for task in range(2):
        made.add_task(task)
    for parameter in made.parameters():
        parameter.data.normal_().mul_(0.3)
    return made.to(dtype)


def random_codes(made, earlier, dtype):
    """Whole codes of earlier tasks, as `whole_code` gives them."""
    shape = (len(LAYERS), 7) if isinstance(made, BilinearGenerator) else (1, 9)
    return torch.randn(earlier, *shape, dtype=dtype)


def shared(made):
    return [value for name, value in made.named_parameters() if not name.startswith("base.")]


def drifted(kind, residual, earlier, drift, dtype):
    made = generator(kind, residual, dtype)
    made.drifts = True
    made.snapshot()
    star = copy.deepcopy(made)
    with torch.no_grad():
        for value in shared(made):
            value.add_(drift * torch.randn_like(value))
    return made, star, random_codes(made, earlier, dtype)


def direct(made, star, codes):
    """Every earlier weight generated twice, in float64."""
    total = 0.0
    for code in codes.double():
        new, old = made.double()(code.flatten()), star.double()(code.flatten())
        total = total + sum((new[name] - old[name].detach()).square().sum() for name in new)
    return total / len(codes)


def relative(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("drift", [0.3, 1e-4, 1e-6])
@pytest.mark.parametrize("earlier", [1, 7])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["bilinear", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form_equals_the_direct_sum(dtype, kind, residual, earlier, drift):
    made, star, codes = drifted(kind, residual, earlier, drift, dtype)
    found = made.regulariser(codes)
    found_gradients = torch.autograd.grad(found, shared(made))
    oracle = copy.deepcopy(made)
    wanted = direct(oracle, star, codes)
    wanted_gradients = torch.autograd.grad(wanted, shared(oracle))
    assert found.dtype == dtype
    assert relative(found, wanted) < TOLERANCE[dtype]
    for mine, theirs in zip(found_gradients, wanted_gradients, strict=True):
        assert relative(mine, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["bilinear", "additive"])
def test_the_difference_of_large_numbers_would_fail_the_same_test(kind):
    """The test above can tell: the naive form in float32 is wrong where drift is tiny."""
    made, star, codes = drifted(kind, False, 7, 1e-6, torch.float32)
    naive = sum((made(code.flatten())[name] - star(code.flatten())[name]).square().sum()
                for code in codes
                for name in ("first", "second", "shortcut")) / len(codes)
    assert relative(naive, direct(made, star, codes)) > 1e-4


@pytest.mark.parametrize("kind", ["bilinear", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_with_zero_gradient_right_after_the_snapshot(kind, dtype):
    made, _, codes = drifted(kind, True, 3, 0.0, dtype)
    value = made.regulariser(codes)
    assert value.item() == 0.0
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, shared(made)))


@pytest.mark.parametrize("kind", ["bilinear", "additive"])
def test_snapshot_survives_its_own_round_trip(kind):
    made, _, codes = drifted(kind, True, 3, 0.1, torch.float64)
    other = copy.deepcopy(made)
    other.restore_snapshot(made.star())
    assert torch.equal(other.regulariser(codes), made.regulariser(codes))
    assert made.regulariser(codes).item() > 0


def test_bilinear_weights_are_the_published_product():
    made = generator("bilinear", True)
    code = torch.randn(3 * 7, dtype=torch.float64)
    for index, tensor in enumerate(LAYERS):
        x = code.view(3, 7)[index]
        A_Dd, v_Cd = made.columns(index)
        wanted = made.base[index] + v_Cd @ torch.diag(x) @ A_Dd.T + made.b[index]
        torch.testing.assert_close(made(code)[tensor.name], wanted.view(tensor.shape))


def test_additive_task_part_is_one_vector_for_every_channel():
    made = generator("additive", False)
    one, two = (made(torch.randn(9, dtype=torch.float64))["first"] for _ in range(2))
    change = (one - two).flatten(1)
    torch.testing.assert_close(change, change[:1].expand_as(change))
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["bilinear", "additive"])
def test_first_weights_have_the_spread_of_a_fresh_convolution(kind):
    torch.manual_seed(0)
    layer = GeneratedTensor("w", (64, 32, 3, 3))
    config = HypernetConfig(generator=kind, residual=False, fresh_columns=0, code_dim=64)
    made = build_generator(config, [layer])
    made.add_task(0)
    weights = made(made.next_code(None, 0))["w"]
    wanted = (2 / (64 * 9)) ** 0.5
    assert 0.5 * wanted < weights.std().item() < 2 * wanted


@pytest.mark.parametrize("kind", ["bilinear", "additive"])
def test_residual_starts_at_the_given_weights(kind):
    torch.manual_seed(0)
    made = build_generator(HypernetConfig(generator=kind, code_dim=8, fresh_columns=2), LAYERS)
    weights = [torch.randn(layer.shape) for layer in LAYERS]
    made.set_base(weights)
    whole = None
    for task in range(3):
        made.add_task(task)
        code = made.next_code(whole, task)
        made.begin(task)
        inherited = made.inherit(whole, task) if made.inherits(task) else None
        for layer, weight in zip(LAYERS, weights, strict=True):
            assert torch.equal(made(code, inherited)[layer.name], weight)
        whole = made.whole_code(code, whole if made.inherits(task) else None, task)


def bilinear(fresh, columns=6, tasks=6):
    torch.manual_seed(0)
    made = BilinearGenerator(LAYERS, columns, fresh, residual=True)
    for task in range(tasks):
        made.add_task(task)
    return made


def widths(made):
    return [[block.shape[1] for block in blocks] for blocks in made.A]


def test_columns_open_task_by_task_until_none_is_left():
    made = bilinear(fresh=2, columns=5)
    assert [made.open_columns(task) for task in range(6)] == [0, 2, 4, 5, 5, 5]
    assert [made.own_columns(task) for task in range(6)] == [(0, 0), (0, 2), (2, 4), (4, 5),
                                                             (0, 5), (0, 5)]
    assert widths(made) == [[2, 2, 1]] * 3
    drifts = []
    for task in range(6):
        made.begin(task)
        drifts.append(made.drifts)
    assert drifts == [False, False, False, False, True, True]
    assert made.star().keys() == {f"{name}.{index}" for name in "Abv" for index in range(3)}


def test_columns_are_made_when_a_task_opens_them():
    """What tasks to come may need takes no memory, no checkpoint and no step."""
    made = bilinear(fresh=2, columns=1000, tasks=3)
    assert widths(made) == [[2, 2]] * 3
    assert [made.task_bytes(task) for task in range(3)] == [
        0, 4 * 2 * sum(t.rows + t.row_length for t in LAYERS),
        4 * 2 * sum(t.rows + t.row_length for t in LAYERS)]


def test_a_whole_code_is_what_was_inherited_and_then_the_own():
    made, whole = bilinear(fresh=2), None
    for task in range(4):
        code = 3.0 ** task * made.next_code(whole, task)
        whole = made.whole_code(code, whole if made.inherits(task) else None, task)
        assert whole.shape == (3, 2 * task)
    assert whole[0].tolist() == [3, 3, 9, 9, 27, 27]
    assert torch.equal(made.next_code(whole, 4), whole.flatten())
    early = made.whole_code(made.next_code(None, 1), None, 1)
    again = made.whole_code(made.next_code(early, 3), early, 3)  # task 3 refreshes task 1
    assert again[0].tolist() == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("task", [2, 3])
def test_inherited_columns_are_generated_once_and_give_the_same_weights(task):
    made = bilinear(fresh=2).double()
    for parameter in made.parameters():
        parameter.data.normal_()
    before = torch.randn(3, 2 * task - 2, dtype=torch.float64)
    code = torch.randn(3 * 2, dtype=torch.float64)
    whole = made.whole_code(code, before, task)
    found = made(code, made.inherit(before, task))
    for index, layer in enumerate(LAYERS):
        A_Dd, v_Cd = (shared[:, :2 * task] for shared in made.columns(index))
        wanted = made.base[index] + made.b[index] + (v_Cd * whole[index]) @ A_Dd.T
        torch.testing.assert_close(found[layer.name], wanted.view(layer.shape))


def test_only_opened_columns_take_a_gradient():
    made = bilinear(fresh=2, tasks=3)
    for blocks in made.A:
        for block in blocks:
            block.data.normal_()
    code = torch.ones(3 * 2).requires_grad_()
    made.begin(2)
    inherited = made.inherit(torch.ones(3, 2), 2)
    loss = sum(weight.square().sum() for weight in made(code, inherited).values())
    loss.backward()
    for index in range(3):
        for blocks in (made.A[index], made.v[index]):
            assert blocks[0].grad is None
            assert blocks[1].grad.abs().min() > 0
        assert made.b[index].grad is None
        assert made.base[index].grad is None
    assert code.grad.abs().min() > 0


def test_first_task_trains_the_base_alone():
    made = bilinear(fresh=2)
    made.begin(0)
    assert {name for name, value in made.named_parameters() if value.requires_grad} == {
        "base.0", "base.1", "base.2"}
    made.begin(1)
    assert not any(value.requires_grad for value in made.base)
