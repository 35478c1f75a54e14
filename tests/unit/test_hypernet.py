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
    for parameter in made.parameters():
        parameter.data.normal_().mul_(0.3)
    return made.to(dtype)


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
    return made, star, torch.randn(earlier, made.code_length, dtype=dtype)


def direct(made, star, codes):
    """Every earlier weight generated twice, in float64."""
    total = 0.0
    for code in codes.double():
        new, old = made.double()(code), star.double()(code)
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
    naive = sum((made(code)[name] - star(code)[name]).square().sum() for code in codes
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
    code = torch.randn(made.code_length, dtype=torch.float64)
    for index, tensor in enumerate(LAYERS):
        x = code.view(3, 7)[index]
        wanted = made.base[index] + made.v[index] @ torch.diag(x) @ made.A[index].T + made.b[index]
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
    config = HypernetConfig(generator=kind, residual=False, fresh_columns=0)
    made = build_generator(config, [layer])
    weights = made(made.next_code(None, 0))["w"]
    wanted = (2 / (64 * 9)) ** 0.5
    assert 0.5 * wanted < weights.std().item() < 2 * wanted


@pytest.mark.parametrize("kind", ["bilinear", "additive"])
def test_residual_starts_at_the_given_weights(kind):
    torch.manual_seed(0)
    made = build_generator(HypernetConfig(generator=kind, code_dim=8, fresh_columns=2), LAYERS)
    weights = [torch.randn(layer.shape) for layer in LAYERS]
    made.set_base(weights)
    code = made.next_code(None, 0)
    for task in range(3):
        made.begin(task)
        for layer, weight in zip(LAYERS, weights, strict=True):
            assert torch.equal(made(code)[layer.name], weight)
        code = made.next_code(code, task + 1)


def bilinear(fresh, columns=6):
    torch.manual_seed(0)
    return BilinearGenerator(LAYERS, columns, fresh, residual=True)


def test_columns_open_task_by_task_until_none_is_left():
    made = bilinear(fresh=2)
    assert [made.open_columns(task) for task in range(6)] == [0, 2, 4, 6, 6, 6]
    drifts = []
    for task in range(6):
        made.begin(task)
        drifts.append(made.drifts)
    assert drifts == [False, False, False, False, True, True]
    assert made.star().keys() == {name for name, _ in made.named_parameters()
                                  if not name.startswith("base.")}


def test_codes_are_zero_at_columns_opened_later_and_carry_over_before():
    made, code = bilinear(fresh=2), None
    for task in range(4):
        code = made.next_code(code, task)
        code_Ld = code.view(3, 6)
        assert not code_Ld[:, 2 * task:].any()
        assert code_Ld[:, 2 * max(0, task - 1):2 * task].eq(1).all()
        code = code * 3
    assert made.next_code(code, 4).view(3, 6)[0].tolist() == [27, 27, 9, 9, 3, 3]


def test_only_opened_columns_take_a_gradient():
    made = bilinear(fresh=2)
    with torch.no_grad():
        for value in made.A:
            value.normal_()
    code = torch.ones(made.code_length)
    made.begin(2)
    loss = sum(weight.square().sum() for weight in made(code.requires_grad_()).values())
    loss.backward()
    for index in range(3):
        for gradient in (made.A[index].grad, made.v[index].grad):
            assert not gradient[:, :2].any()
            assert gradient[:, 2:4].abs().min() > 0
            assert not gradient[:, 4:].any()
        assert made.b[index].grad is None
        assert made.base[index].grad is None
    assert code.grad.view(3, 6)[:, :4].abs().min() > 0


def test_first_task_trains_the_base_alone():
    made = bilinear(fresh=2)
    made.begin(0)
    assert {name for name, value in made.named_parameters() if value.requires_grad} == {
        "base.0", "base.1", "base.2"}
    made.begin(1)
    assert not any(value.requires_grad for value in made.base)
