"Two routes agree; nothing is lost; solids are where they are."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from posefree_kit.core import InputError
from posefree_kit.rendering import alpha_from_density, coarse_depths, composite, fine_depths, interval_weights, march, render_rays, softplus_density, weights_from_alpha, weights_from_density


@settings(deadline=None)
@given(st.integers(2, 24), st.floats(.1, 200.), st.integers(0, 10 ** 6))
def test_routes_agree_and_nothing_is_lost(n, scale, seed):
    g = torch.Generator().manual_seed(seed)
    sigma, delta = torch.rand(3, n, generator=g, dtype=torch.float64) * scale, torch.rand(3, n, generator=g, dtype=torch.float64) * .1
    a, b = weights_from_alpha(alpha_from_density(sigma, delta)), weights_from_density(sigma, delta)
    assert torch.allclose(a, b, atol=1e-10) and (a >= 0).all()
    assert torch.allclose(a.sum(-1) + torch.exp(-(sigma * delta).sum(-1)), torch.ones(3, dtype=torch.float64))


def test_march_is_the_midpoint_rule():
    "weights averaged over samples = samples averaged over intervals"
    g = torch.Generator().manual_seed(0)
    raw, c, t = torch.randn(2, 5, 9, generator=g), torch.rand(2, 5, 9, 3, generator=g), torch.rand(2, 5, 9, generator=g).sort(-1).values + 2
    w = interval_weights(raw, t, softplus_density(20.))
    plain = composite(w, (c[..., 1:, :] + c[..., :-1, :]) / 2)
    mid = (w * (t[..., 1:] + t[..., :-1]) / 2).sum(-1) / w.sum(-1)
    out = march(raw, c, t, softplus_density(20.))
    assert torch.allclose(out.values, plain, atol=1e-6) and torch.allclose(out.depth, mid, atol=1e-5)


@pytest.mark.parametrize("n,m", [(64, 0), (24, 24)])
def test_a_wall_is_where_it_is(n, m):
    o, d = torch.zeros(1, 7, 3), torch.tensor([0., 0, 1]).expand(1, 7, 3)
    for z in (2.31, 2.5, 2.777, 3.0):
        out = render_rays(lambda x: (1e5 * (x[..., 2] - z), x), o, d, 2.25, 3.15, n, m)
        assert (out.depth - z).abs().max() < .9 / (n - 1) and (out.weight - 1).abs().max() < 1e-4


def test_jitter_stays_in_order_and_is_seeded():
    like = torch.zeros(2, 3, 3)
    a, b = (coarse_depths(1., 2., 8, like, 1., torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b) and (a.diff(dim=-1) > 0).all() and not torch.equal(a, coarse_depths(1., 2., 8, like))


def test_fine_depths_without_weight_are_uniform():
    t = torch.linspace(0, 1, 11).expand(1, 1, 11)
    f = fine_depths(t, torch.zeros(1, 1, 10), 20)
    assert torch.allclose(f.diff(dim=-1), torch.full((1, 1, 19), .05), atol=1e-4)


def test_gradients_in_double_precision():
    t = torch.linspace(0, 1, 6, dtype=torch.float64).expand(1, 2, 6)
    raw, c = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True), torch.rand(1, 2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, v: march(r, v, t, softplus_density(5.))[0], (raw, c))
    assert torch.autograd.gradcheck(lambda r: march(r, c.detach(), t, softplus_density(5.))[1], (raw,))


def test_near_must_be_nearer():
    with pytest.raises(InputError): render_rays(lambda x: (x[..., 0], x), torch.zeros(1, 1, 3), torch.ones(1, 1, 3), 2., 2., 4)
