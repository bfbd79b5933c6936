"Solids are where they are, and gradients are right. (What holds for any field: test_invariants.py.)"
import pytest
import torch
from posefree_kit.core import InputError
from posefree_kit.rendering import coarse_depths, composite, fine_depths, interval_weights, march, render_rays, softplus_density


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
