"Perturbation of residual codes and of continuous latents: rates, places, the order of effects on a trained quantizer."
import pytest, torch, torch.nn.functional as F
from scipy.stats import binom, kstest
from sklearn.datasets import load_digits
from tokpost.perturbation import (PerturbationSchedule, draw_kept_levels, draw_level_ranks, draw_ranks, lookup_levels,
                                  neighbour_table, noise_scale, perturb_in_loop, perturb_latents, perturb_levels, replace_tokens)
from tokpost.quantizer import VectorQuantizer, straight_through
from tokpost.residual import ResidualQuantizer, level_ids

SIDES = [1, 2, 3, 4, 6, 8]
IDS = level_ids(SIDES)

def rng(seed=0): return torch.Generator().manual_seed(seed)

def within_binomial_bounds(count, n, p): return binom.ppf(5e-7, n, p) <= count <= binom.isf(5e-7, n, p)

@pytest.fixture(scope='module')
def latents():
    scans = torch.tensor(load_digits().images[:300], dtype=torch.float32)[:, None]/8 - 1
    return F.pixel_unshuffle(F.interpolate(scans, scale_factor=2, mode='bilinear'), 2) # (300, 4, 8, 8)

def trained(latents, sides):
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(VectorQuantizer(64, 4, normalize=False, initialize='data'), sides)
    optimizer = torch.optim.Adam(quantizer.parameters(), 2e-2)
    for step in range(80):
        loss = sum(quantizer(latents[torch.randint(len(latents), (16,))])[2].values())
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return quantizer.eval().requires_grad_(False)

@pytest.fixture(scope='module')
def quantizer(latents): return trained(latents, SIDES)

@pytest.fixture(scope='module')
def tokens(quantizer, latents): return quantizer.assign(latents)

def error(quantizer, latents, tokens, levels=None):
    z_q = quantizer.lookup(tokens, levels).transpose(1, 2).reshape(latents.shape)
    return ((z_q-latents).square().mean()/latents.var()).item()

@pytest.mark.parametrize('alpha', [.3, [1., .9, .5, .2, .05, 0.], torch.tensor([.1, .2, .3, .4, .5, .6])])
@pytest.mark.parametrize('beta, delta', [(1., 50), (.3, 2)])
def test_rates_are_binomial_per_level(alpha, beta, delta):
    ranks = torch.cat([draw_level_ranks(64, SIDES, alpha, beta, delta, generator=rng(s)) for s in range(40)]) > 0
    rates = [alpha]*6 if isinstance(alpha, float) else [float(a) for a in alpha]
    images = draw_images(beta, delta)
    assert within_binomial_bounds(images.sum().item(), len(images), beta)
    for level, side in enumerate(SIDES):
        assert not ranks[~images][:, IDS == level].any()
        n = int(images.sum())*side*side
        assert within_binomial_bounds(ranks[images][:, IDS == level].sum().item(), n, rates[level]*(1-1/delta))

def draw_images(beta, delta):
    "Which images are perturbed: the same draws at rate 1, with so many neighbours that each change shows."
    return torch.cat([(draw_level_ranks(64, SIDES, 1., beta, 10**9, generator=rng(s)) > 0).any(1) for s in range(40)])

def test_exact_counts_are_exact_in_every_level():
    alpha = [1., .5, .4, .1, .25, .5]
    expected = [round(a*side*side) for a, side in zip(alpha, SIDES)]
    for seed in range(5):
        ranks = draw_level_ranks(20, SIDES, alpha, .35, 10**9, counts='exact', generator=rng(seed)) > 0
        perturbed = ranks.any(1)
        assert perturbed.sum() == 7
        for level, count in enumerate(expected): assert (ranks[perturbed][:, IDS == level].sum(1) == count).all()

def test_one_level_is_the_plain_perturbation():
    for counts in ('bernoulli', 'exact'):
        a = draw_level_ranks(12, [5], .4, .5, 9, counts=counts, generator=rng(1))
        assert torch.equal(a, draw_ranks((12, 25), .4, .5, 9, counts=counts, generator=rng(1)))

@pytest.mark.parametrize('levels', [[0], [2, 4], [5], []])
def test_nothing_changes_outside_the_chosen_levels(quantizer, tokens, levels):
    chosen = torch.tensor([level in levels for level in range(6)])[IDS]
    new = perturb_levels(tokens, quantizer.codebook, SIDES, 1., 1., 16, levels, generator=rng())
    assert torch.equal(new[:, ~chosen], tokens[:, ~chosen])
    assert all((new != tokens)[:, IDS == level].any() for level in levels)
    every = draw_level_ranks(300, SIDES, 1., 1., 16, generator=rng())
    assert torch.equal(new, replace_tokens(tokens, every*chosen, quantizer.codebook)) # the same draws as with all

def test_neighbours_are_those_of_the_summed_codes(quantizer, tokens):
    table = neighbour_table(quantizer.codebook, 8)
    ranks = draw_level_ranks(300, SIDES, .5, .8, 8, generator=rng(2))
    expected = table[tokens, ranks]
    assert torch.equal(perturb_levels(tokens, quantizer.codebook, SIDES, .5, .8, 8, generator=rng(2)), expected)
    assert torch.equal(perturb_levels(tokens, quantizer.codebook, SIDES, .5, .8, 8, table=table, generator=rng(2)), expected)

def test_in_the_loop_equals_a_loop_written_out(quantizer, latents):
    ranks = draw_level_ranks(300, SIDES, .3, .7, 8, generator=rng(3))
    got = quantizer.assign(latents, perturb=perturb_in_loop(ranks, quantizer.codebook, SIDES))
    table, residual, expected = neighbour_table(quantizer.codebook, 8), latents, []
    for level, side in enumerate(SIDES):
        small = F.interpolate(residual, size=(side, side), mode='area') if side < 8 else residual
        rows = small.flatten(2).transpose(1, 2)
        nearest = torch.cdist(rows.double(), quantizer.codebook.double().expand(len(rows), -1, -1)).argmin(-1)
        swapped = table[nearest, ranks[:, IDS == level]]
        codes = quantizer.codebook[swapped].transpose(1, 2).unflatten(2, (side, side))
        residual = residual - (F.interpolate(codes, size=(8, 8), mode='bicubic', align_corners=False) if side < 8 else codes)
        expected.append(swapped)
    assert (got == torch.cat(expected, 1)).float().mean() > .999 # ties of rounding apart
    z_q, indices, losses = quantizer(latents, perturb=perturb_in_loop(ranks, quantizer.codebook, SIDES))
    assert torch.equal(indices, got) and torch.equal(z_q, quantizer.lookup(got))
    assert all(value.isfinite() for value in losses.values())

def test_in_the_loop_is_milder_than_after_the_fact(quantizer, latents, tokens):
    clean = error(quantizer, latents, tokens)
    for levels in ('all', [0], [1], [2], [3], [4], [5]):
        ranks = draw_level_ranks(300, SIDES, .2, 1., 16, levels, generator=rng(4))
        after = error(quantizer, latents, replace_tokens(tokens, ranks, quantizer.codebook))
        within = error(quantizer, latents, quantizer.assign(latents, perturb=perturb_in_loop(ranks, quantizer.codebook, SIDES)))
        assert after > clean
        if levels == [5]: assert within == after # no level is left to compensate
        else: assert within < after

def test_stronger_is_worse(quantizer, latents, tokens):
    def after(alpha, delta):
        return error(quantizer, latents, perturb_levels(tokens, quantizer.codebook, SIDES, alpha, 1., delta, generator=rng(5)))
    assert after(.1, 8) < after(.3, 8) < after(1., 8) < after(1., 64) and after(.1, 8) < after(.1, 64)

def test_unperturbed_images_are_left_alone_in_the_loop(quantizer, latents, tokens):
    ranks = draw_level_ranks(300, SIDES, 1., .5, 16, generator=rng(6))
    new = quantizer.assign(latents, perturb=perturb_in_loop(ranks, quantizer.codebook, SIDES))
    still = (ranks == 0).all(1)
    assert 100 < still.sum() < 200 and torch.equal(new[still], tokens[still])

@pytest.mark.parametrize('batch_size', [1, 7, 100])
def test_given_ranks_the_batch_does_not_matter(quantizer, latents, tokens, batch_size):
    ranks = draw_level_ranks(60, SIDES, .5, .7, 16, generator=rng(7))
    whole = quantizer.assign(latents[:60], perturb=perturb_in_loop(ranks, quantizer.codebook, SIDES))
    parts = [quantizer.assign(z, perturb=perturb_in_loop(r, quantizer.codebook, SIDES))
             for z, r in zip(latents[:60].split(batch_size), ranks.split(batch_size))]
    assert torch.equal(torch.cat(parts), whole)
    after = [replace_tokens(t, r, quantizer.codebook) for t, r in zip(tokens[:60].split(batch_size), ranks.split(batch_size))]
    assert torch.equal(torch.cat(after), replace_tokens(tokens[:60], ranks, quantizer.codebook))

def test_same_seed_same_codes(quantizer, tokens):
    a, b, c = (perturb_levels(tokens, quantizer.codebook, SIDES, .5, .5, 8, generator=rng(s)) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)

def test_schedule_gives_the_arguments():
    settings = PerturbationSchedule(delta=8)(.4)
    ranks = draw_level_ranks(500, SIDES, **settings, generator=rng())
    assert within_binomial_bounds((ranks > 0).any(1).sum().item(), 500, .1) and ranks.max() == settings['delta']-1

def test_levels_left_out_are_lookup_of_the_first(quantizer, tokens):
    kept = draw_kept_levels(300, 6, beta=.8, generator=rng())
    z_q = lookup_levels(quantizer, tokens, kept)
    assert z_q.shape == (300, 64, 4) and len(kept.unique()) == 6
    for b in range(0, 300, 7): assert torch.equal(z_q[b], quantizer.lookup(tokens[b:b+1], kept[b].item())[0])
    for k in range(1, 7): assert torch.equal(lookup_levels(quantizer, tokens, torch.full((300,), k)), quantizer.lookup(tokens, k))

def test_fewer_levels_are_worse(quantizer, latents, tokens):
    curve = [error(quantizer, latents, tokens, k) for k in range(1, 7)]
    assert curve == sorted(curve, reverse=True)

def test_levels_left_out_pass_the_gradient(quantizer, latents):
    z = latents[:20].clone().requires_grad_()
    z_q, indices, _ = quantizer(z)
    short = straight_through(z_q, lookup_levels(quantizer, indices, draw_kept_levels(20, 6, 1., rng())))
    assert not torch.equal(short, z_q)
    weights = torch.randn(short.shape, generator=rng(1))
    gradient, = torch.autograd.grad((weights*short).sum(), z)
    torch.testing.assert_close(gradient.flatten(2).transpose(1, 2), weights)

def test_kept_levels_are_uniform_over_a_share_of_images():
    kept = draw_kept_levels(60_000, 6, beta=.6, generator=rng())
    for k in range(1, 7): assert within_binomial_bounds((kept == k).sum().item(), 60_000, .1 + .4*(k == 6))
    assert (draw_kept_levels(50, 6, 0., rng()) == 6).all() and (draw_kept_levels(50, 1, 1., rng()) == 1).all()

@pytest.mark.parametrize('shape', [(2000, 4, 4, 4), (2000, 16, 3)])
def test_noise_of_latents(shape):
    z, tau, beta = torch.randn(shape, generator=rng(1)), .8, .4
    noise = (perturb_latents(z, tau, beta, rng())-z).flatten(1)
    perturbed = noise.abs().sum(1) > 0
    assert within_binomial_bounds(perturbed.sum().item(), 2000, beta)
    scales = noise[perturbed].square().mean(1).sqrt()
    assert scales.max() < tau*1.5 and kstest((scales/tau).tolist(), 'uniform').statistic < .08
    again = perturb_latents(z, tau, beta, rng())
    assert torch.equal(again-z, perturb_latents(z, tau, beta, rng())-z) and not torch.equal(again, perturb_latents(z, tau, beta, rng(9)))
    assert torch.equal(perturb_latents(z, 0., 1.), z) and torch.equal(perturb_latents(z, tau, 0.), z)
    assert perturb_latents(z.bfloat16(), tau).dtype == torch.bfloat16

def test_noise_passes_the_gradient():
    z = torch.randn(5, 4, 2, 2, generator=rng()).requires_grad_()
    gradient, = torch.autograd.grad((2*perturb_latents(z, .5, .5, rng())).sum(), z)
    assert torch.equal(gradient, torch.full_like(z, 2.))

def test_noise_scale_is_that_of_the_path():
    z, noise = torch.randn(2, 1000, generator=rng()).double()
    for t in (0., .1, .5, .9): torch.testing.assert_close(((1-t)*z + t*noise)/(1-t), z + noise_scale(t)*noise)

@pytest.mark.parametrize('change, message', [
    (dict(alpha=1.5), r'alpha must be in \[0, 1\], got 1.5'), (dict(alpha=[0., .1, .2, .3, .4, -1.]), r'alpha must be in \[0, 1\], got -1'),
    (dict(alpha=[.1, .2]), r'one for each of 6 levels, got \[0.1, 0.2\]'), (dict(beta=2), r'beta must be in \[0, 1\], got 2'),
    (dict(delta=0), r'delta must be an integer in \[1, 64\], got 0'), (dict(delta=65), r'delta .* got 65'),
    (dict(levels=[6]), r"levels must be 'all' or a list of some in \[0, 6\), got \[6\]"), (dict(levels=[-1]), 'levels must be'),
    (dict(levels='some'), "got 'some'"), (dict(levels=2), 'levels must be .*, got 2'), (dict(counts='all'), "counts must be one of .*got 'all'"),
    (dict(sides=[1, 2, 3, 4, 8]), r'indices must be \(B, 94\), the tokens of levels \[1, 2, 3, 4, 8\], got \(300, 130\)'),
    (dict(sides=[]), 'sides must be'), (dict(sides=[0, 8]), 'sides must be'), (dict(indices=torch.full((2, 130), 64)), r'indices must be in \[0, 64\)'),
    (dict(indices=torch.zeros(130, dtype=torch.long)), r'indices must be \(B, N\)')])
def test_bad_input_is_named(quantizer, tokens, change, message):
    settings = dict(indices=tokens, codebook=quantizer.codebook, sides=SIDES, alpha=.5, beta=1., delta=8)
    with pytest.raises(ValueError, match=message): perturb_levels(**(settings | change))

def test_bad_ranks_levels_and_noise_are_named(quantizer, latents, tokens):
    with pytest.raises(ValueError, match=r'\(B, 130\), the tokens of levels'): perturb_in_loop(torch.zeros(4, 129), quantizer.codebook, SIDES)
    few = perturb_in_loop(draw_level_ranks(4, SIDES, 1., 1., 8), quantizer.codebook, SIDES)
    with pytest.raises(ValueError, match=r'ranks must be \(5, 1\) as indices, got \(4, 1\)'): quantizer.assign(latents[:5], perturb=few)
    with pytest.raises(ValueError, match=r'levels must be in \[1, 6\], got 0'): lookup_levels(quantizer, tokens, torch.zeros(300).long())
    with pytest.raises(ValueError, match=r'kept must be \(300,\)'): lookup_levels(quantizer, tokens, torch.ones(3).long())
    with pytest.raises(ValueError, match='levels must be at least 1, got 0'): draw_kept_levels(4, 0, .5)
    with pytest.raises(ValueError, match=r'beta must be in \[0, 1\], got -1'): draw_kept_levels(4, 6, -1)
    for tau in (-.1, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='tau must be at least 0'): perturb_latents(latents, tau)
    for t in (1., -.1, float('nan')):
        with pytest.raises(ValueError, match=r't must be in \[0, 1\)'): noise_scale(t)
