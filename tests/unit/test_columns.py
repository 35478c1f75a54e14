"""Signs: rounding to them, its straight-through gradient, eight in a byte."""

import functools

import pytest
import torch

from partialhn.networks.columns import (
    Columns,
    pack_signs,
    packed_bytes,
    signs,
    unpack_signs,
)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 1000])
@pytest.mark.parametrize("width", [1, 3])
def test_packed_signs_come_back(rows, width):
    drawn = signs(torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)))
    packed = pack_signs(drawn)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-rows * width // 8)
    assert torch.equal(unpack_signs(packed, (rows, width)), drawn)


def test_every_byte_stands_for_its_own_signs():
    everything = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8)
    assert sorted(pack_signs(everything).tolist()) == list(range(256))


def rounded(x_Nd):
    """The second factor of what is generated, where the first one selects its columns."""
    own = Columns([(x_Nd.shape[1], len(x_Nd))], x_Nd.shape[1])
    with torch.no_grad():
        own.A[0].copy_(x_Nd)
        own.v[0].copy_(2 * torch.eye(x_Nd.shape[1]) - 1)  # two such products differ in one column
        ones = torch.ones(x_Nd.shape[1])
        plain = own.generate(own.stacked([torch.zeros(x_Nd.shape[1], len(x_Nd))]), ones)[0]
        own.v[0].fill_(-1)
        return (plain - own.generate(
            own.stacked([torch.zeros(x_Nd.shape[1], len(x_Nd))]), ones)[0]).T / 2


def test_rounding_is_the_nearest_that_signs_and_a_scale_can_come():
    x_Nd = torch.randn(999, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 7.0]) + 0.3
    found_Nd = rounded(x_Nd)
    torch.testing.assert_close(found_Nd.abs().amax(0), found_Nd.abs().amin(0))
    error_d = (found_Nd - x_Nd).square().sum(0)
    for scale in (0.99, 1.01):
        assert ((scale * found_Nd - x_Nd).square().sum(0) > error_d).all()
    for row in range(0, 999, 97):
        turned_Nd = found_Nd.clone()
        turned_Nd[row] *= -1
        assert ((turned_Nd - x_Nd).square().sum(0) > error_d).all()


def test_columns_of_zeros_add_nothing_and_learn_at_once():
    torch.manual_seed(0)
    shapes = [(6, 36), (5, 4), (6, 36)]
    own = Columns(shapes, 3)
    start = [torch.randn(*shape) for shape in shapes]
    code = torch.ones(9, requires_grad=True)
    made = own.generate(own.stacked(start), code)
    for found_CD, before_CD in zip(made, start, strict=True):
        assert torch.equal(found_CD, before_CD)
    sum(found_CD.sum() for found_CD in made).backward()
    assert all(value.grad.any() for value in own.A)
    assert not any(value.grad.any() for value in (*own.v, code))


SHAPES = [(6, 36), (5, 4), (6, 18), (6, 36), (5, 4), (6, 36)]


def test_all_tensors_together_are_those_of_one_after_the_other():
    """And their gradients, whatever the order of the shapes; a zero counts as positive."""
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    own, code = Columns(SHAPES, 3), torch.randn(3 * len(SHAPES), requires_grad=True)
    for A_Dd in own.A:
        A_Dd.data.normal_()
    own.A[0].data[0, 0] = own.v[1].data[0, 0] = 0.0
    start, upstream = ([torch.randn(*shape) for shape in SHAPES] for _ in range(2))
    made = own.generate(own.stacked(start), code)
    sum((each * up).sum() for each, up in zip(made, upstream, strict=True)).backward()
    for index, (before_CD, up_CD) in enumerate(zip(start, upstream, strict=True)):
        v_Cd, A_Dd = own.v[index], own.A[index]
        x_d = code.view(-1, 3)[index].detach()
        s_Cd, s_Dd = signs(v_Cd.detach()), signs(A_Dd.detach()) * A_Dd.detach().abs().mean(0)
        close(made[index], torch.addmm(before_CD, s_Cd * x_d, s_Dd.T))
        to_Cd = up_CD @ s_Dd
        close(v_Cd.grad, to_Cd * x_d)
        close(A_Dd.grad, up_CD.T @ (s_Cd * x_d))
        close(code.grad.view(-1, 3)[index], (to_Cd * s_Cd).sum(0))


def test_bytes_are_those_of_the_buffers():
    shapes = [(6, 36), (5, 4)]
    own = Columns(shapes, 3)
    own.pack()
    assert packed_bytes(shapes, 3) == sum(value.nbytes for value in own.buffers())
    assert not list(own.parameters())
