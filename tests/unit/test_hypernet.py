"""The closed-form regulariser against the direct sum; columns of a task's own."""

import copy

import pytest
import torch

from partialhn.config import HypernetConfig
from partialhn.errors import InputError
from partialhn.networks.hypernet import ColumnGenerator, GeneratedTensor
from partialhn.networks.shared_generators import AdditiveGenerator, BilinearGenerator
from partialhn.strategies.partial_hn import build_generator

LAYERS = (GeneratedTensor("first", (6, 4, 3, 3)), GeneratedTensor("second", (5, 6, 3, 3)),
          GeneratedTensor("shortcut", (5, 4, 1, 1)))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def generator(kind, residual, dtype=torch.float64, seed=0):
    """With every shared value random, as after some training."""
    torch.manual_seed(seed)
    made = (BilinearGenerator(LAYERS, 7, residual=residual) if kind == "bilinear"
            else AdditiveGenerator(LAYERS, 9, (6, 5), 4, residual=residual))
    for parameter in made.parameters():
        parameter.data.normal_().mul_(0.3)
    return made.to(dtype)


def random_codes(made, earlier, dtype):
    length = 7 * len(LAYERS) if isinstance(made, BilinearGenerator) else 9
    return torch.randn(earlier, length, dtype=dtype)


def shared(made):
    return [value for name, value in made.named_parameters() if not name.startswith("base.")]


def drifted(kind, residual, earlier, drift, dtype):
    made = generator(kind, residual, dtype)
    made.shares_parameters = True
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
        new, old = made.double()(1, code), star.double()(1, code)
        total = total + sum((mine - theirs.detach()).square().sum()
                            for mine, theirs in zip(new, old, strict=True))
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
    naive = sum((mine - theirs).square().sum() for code in codes
                for mine, theirs in zip(made(1, code), star(1, code), strict=True)) / len(codes)
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
        wanted = (made.base[index] + made.v[index] @ torch.diag(x) @ made.A[index].T
                  + made.b[index])
        torch.testing.assert_close(made(1, code)[index], wanted)
        assert wanted.shape == (tensor.rows, tensor.row_length)


def test_additive_task_part_is_one_vector_for_every_channel():
    made = generator("additive", False)
    one, two = (made(1, torch.randn(9, dtype=torch.float64))[0] for _ in range(2))
    change = one - two
    torch.testing.assert_close(change, change[:1].expand_as(change))
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["bilinear", "additive"])
def test_first_weights_have_the_spread_of_a_fresh_convolution(kind):
    torch.manual_seed(0)
    layer = GeneratedTensor("w", (64, 32, 3, 3))
    made = build_generator(HypernetConfig(generator=kind, residual=False), [layer])
    made.add_task(0)
    weights, = made(0, made.next_code(None, 0))
    wanted = (2 / (64 * 9)) ** 0.5
    assert 0.5 * wanted < weights.std().item() < 2 * wanted


@pytest.mark.parametrize("kind", ["columns", "bilinear", "additive"])
def test_residual_starts_at_the_given_weights(kind):
    torch.manual_seed(0)
    made = build_generator(HypernetConfig(generator=kind, code_dim=8, fresh_columns=2), LAYERS)
    weights = [torch.randn(layer.shape) for layer in LAYERS]
    made.set_base(weights)
    code, rows = None, None
    for task in range(3):
        made.add_task(task)
        code = made.next_code(code, task)
        made.begin(task)
        rows = made(task, code, rows if made.inherits(task) else None)
        for row_CD, weight in zip(rows, weights, strict=True):
            assert torch.equal(row_CD, weight.flatten(1))


@pytest.mark.parametrize("task", [1, 5])
def test_a_first_task_of_shared_columns_leaves_the_next_a_code_that_learns(task):
    """Zero columns under a zero code would never get a gradient."""
    made = BilinearGenerator(LAYERS, 4, residual=True)
    first = made.next_code(None, 0)
    assert not first.any()
    code = made.next_code(first, task).requires_grad_()
    made.begin(task)
    sum(rows.sum() for rows in made(task, code)).backward()
    assert all(A.grad.any() for A in made.A)


def columns(tasks=3, width=2):
    torch.manual_seed(0)
    made = ColumnGenerator(LAYERS, width)
    for base in made.base:
        base.data.normal_()
    for task in range(tasks):
        made.add_task(task)
    for value in made.columns.parameters():
        value.data.normal_()
    return made


def binary(x_Nd):
    """Signs times the mean size of the column."""
    return x_Nd.sign() * x_Nd.abs().sum(0) / len(x_Nd)


@pytest.mark.parametrize("packed", [False, True])
def test_columns_add_their_binary_product_to_what_is_inherited(packed):
    made, code = columns(), torch.randn(len(LAYERS) * 2)
    inherited = tuple(torch.randn(t.rows, t.row_length) for t in LAYERS)
    own = made.columns[1]
    wanted = [before + own.v[index].detach().sign() @ torch.diag(code.view(-1, 2)[index])
              @ binary(own.A[index].detach()).T for index, before in enumerate(inherited)]
    if packed:
        code = code * made.finish(2)
        assert not list(own.parameters())
        assert {value.dtype for value in own.buffers()} == {torch.uint8}
    for found, expected in zip(made(2, code, inherited), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_the_columns_of_the_running_task_take_a_gradient():
    made, code = columns(), torch.ones(len(LAYERS) * 2).requires_grad_()
    made.begin(2)
    rows = made(2, code, tuple(made.base))
    sum(each.square().sum() for each in rows).backward()
    assert all(value.grad is None for value in made.base)
    assert all(value.grad is None for value in made.columns[0].parameters())
    assert all(value.grad.abs().min() > 0 for value in made.columns[1].parameters())
    assert code.grad.abs().min() > 0


def test_a_gradient_passes_the_rounding_as_if_it_were_not_there():
    made, code = columns(), torch.randn(len(LAYERS) * 2)
    upstream = [torch.randn(t.rows, t.row_length) for t in LAYERS]
    rows = made(2, code, tuple(base.detach() for base in made.base))
    sum((each * up).sum() for each, up in zip(rows, upstream, strict=True)).backward()
    for index, up in enumerate(upstream):
        x_d, own = code.view(-1, 2)[index], made.columns[1]
        torch.testing.assert_close(own.v[index].grad,
                                   up @ binary(own.A[index].detach()) * x_d)
        torch.testing.assert_close(own.A[index].grad,
                                   up.T @ (own.v[index].detach().sign() * x_d))


def test_first_task_trains_the_base_alone():
    made = columns()
    made.begin(0)
    assert {name for name, value in made.named_parameters() if value.requires_grad} == {
        "base.0", "base.1", "base.2"}
    made.begin(1)
    assert {name.split(".")[:2] == ["columns", "0"] for name, value in made.named_parameters()
            if value.requires_grad} == {True}


def test_what_columns_do_not_keep_is_refused():
    with pytest.raises(InputError, match="which ColumnGenerator does not use"):
        columns().restore_snapshot({"A.0": torch.zeros(1)})
