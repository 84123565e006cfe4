"The diffusion generator against diffusers' DiT, scipy's solvers, closed forms of Gaussian data and an undisturbed run."
import math
import numpy as np
import pytest, torch, torch.nn.functional as F
from scipy.integrate import solve_ivp
from scipy.stats import binom, kstest, norm
from torch import nn
from tokpost.data import draw_rows, make_latent_store
from tokpost.diffusion import (SiT, draw_times, euler, euler_maruyama, flow_loss, guided_velocity, heun, interpolate,
                               place_features, sample_latents, time_features, time_grid, train_diffusion)
from tokpost.run import Processes, fold

SIZES = dict(latent_shape=(2, 4, 4), num_classes=5, width=16, depth=2, heads=2, patch_size=2)
MU, S = 2., .5
ODES = [euler, heun]
samplers = pytest.mark.parametrize('sampler', ['euler', 'heun', 'sde'])


def rng(seed=0): return torch.Generator().manual_seed(seed)

def random_model(seed=0, **options):
    "Every weight random, since a fresh model answers with zeros."
    model = SiT(**SIZES | options).eval().requires_grad_(False)
    for p in model.parameters(): nn.init.normal_(p, std=.2, generator=rng(seed))
    return model

def gaussian(x, t, mu=MU, s=S):
    "Exact velocity of data N(mu, s^2): E[noise - data | x], from the joint Gaussian of the three."
    variance, covariance = ((1-t)*s)**2 + t**2, t - (1-t)*s**2
    return -mu + covariance/variance*(x - (1-t)*mu)

def gaussian_model(mu=MU, s=S):
    "A generator whose network is exact."
    model = SiT((1, 1, 1), num_classes=3, width=4, depth=0, heads=1, patch_size=1)
    model.forward = lambda x, t, labels: gaussian(x, t.view(-1, 1, 1, 1), mu, s)
    return model

@pytest.fixture
def latents(): return torch.randn(6, 2, 4, 4, generator=rng(1))

@pytest.fixture
def labels(): return torch.tensor([0, 1, 2, 3, 4, 2])


# the network

PUBLISHED = {'S/2': (384, 12, 6, 33), 'B/2': (768, 12, 12, 130), 'L/2': (1024, 24, 16, 458), 'XL/2': (1152, 28, 16, 675)}

@pytest.mark.parametrize('learn_sigma', [False, True])
@pytest.mark.parametrize('name', PUBLISHED)
def test_parameter_counts_of_the_paper(name, learn_sigma):
    width, depth, heads, published = PUBLISHED[name]
    with torch.device('meta'): model = SiT((4, 32, 32), 1000, width, depth, heads, 2, learn_sigma=learn_sigma)
    count = sum(p.numel() for p in model.parameters())
    assert round(count/1e6) == published
    norms, outputs = 4*width*depth, 16*(1+learn_sigma)   # the norms' scales and shifts are ours
    linear = lambda inputs, outputs: (inputs+1)*outputs
    block = linear(width, 6*width) + linear(width, 3*width) + linear(width, width) + 8*width**2 + 5*width
    assert count - norms == (depth*block + linear(16, width) + linear(256, width) + linear(width, width)
                             + 1001*width + linear(width, 2*width) + linear(width, outputs))
    if name == 'XL/2' and learn_sigma: # the released network counts its fixed table of places as well
        assert count - norms + model.places.numel() == 675_129_632

def test_features_equal_those_of_diffusers():
    embeddings = pytest.importorskip('diffusers.models.embeddings')
    t = torch.rand(7, generator=rng())
    expected = embeddings.get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(time_features(t), expected, atol=1e-6, rtol=0)
    expected = embeddings.get_2d_sincos_pos_embed(32, 6, base_size=6, output_type='pt').float()
    torch.testing.assert_close(place_features(6, 6, 32), expected, atol=1e-5, rtol=0)

def test_places_of_a_rectangle_are_those_of_a_square_cut():
    square = place_features(6, 6, 32).view(6, 6, 32)
    torch.testing.assert_close(place_features(3, 5, 32), square[:3, :5].flatten(0, 1))

def dit_of(model):
    "diffusers' DiT with the weights of `model`, of which it computes the same function."
    from diffusers import DiTTransformer2DModel
    C, H, _ = model.latent_shape
    p, heads, W = model.patch_size, model.blocks[0].attention.heads, model.patches.out_features
    dit = DiTTransformer2DModel(heads, W//heads, C, C, len(model.blocks), sample_size=H, patch_size=p, norm_eps=1e-6,
                                num_embeds_ada_norm=model.num_classes, activation_fn='gelu').eval()
    def copy(ours, theirs):
        theirs.weight.data, theirs.bias.data = ours.weight.data.view(theirs.weight.shape), ours.bias.data
    copy(model.patches, dit.pos_embed.proj)
    for block, theirs in zip(model.blocks, dit.transformer_blocks):
        emb = theirs.norm1.emb
        emb.time_proj.downscale_freq_shift = 0      # diffusers' default is not DiT's
        emb.class_embedder.embedding_table.weight.data = model.condition.classes.weight.data
        copy(model.condition.time[0], emb.timestep_embedder.linear_1)
        copy(model.condition.time[2], emb.timestep_embedder.linear_2)
        copy(block.modulation, theirs.norm1.linear)
        attention = theirs.attn1
        for name, rows in zip('qkv', block.attention.qkv.weight.data.chunk(3)):
            getattr(attention, f'to_{name}').weight.data = rows
        for name, rows in zip('qkv', block.attention.qkv.bias.data.chunk(3)):
            getattr(attention, f'to_{name}').bias.data = rows
        copy(block.attention.projection, attention.to_out[0])
        copy(block.mlp[0], theirs.ff.net[0].proj)
        copy(block.mlp[3], theirs.ff.net[2])
    copy(model.final.modulation, dit.proj_out_1)
    last = dit.proj_out_2                           # (p, p, C) there, (C, p, p) here
    last.weight.data = model.final.linear.weight.data.view(C, p*p, W).transpose(0, 1).reshape(-1, W)
    last.bias.data = model.final.linear.bias.data.view(C, p*p).T.flatten()
    return dit

@pytest.mark.parametrize('patch_size, time_scale', [(1, 1.), (2, 1000.)])
def test_network_equals_dit_of_diffusers(latents, labels, patch_size, time_scale):
    pytest.importorskip('diffusers')
    model = random_model(patch_size=patch_size, time_scale=time_scale)
    for block in model.blocks: # what DiT's norms do not have
        for layer in (block.norm1, block.norm2):
            nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    t, labels = torch.rand(6, generator=rng(2)), torch.cat([labels[:5], torch.tensor([5])])
    with torch.no_grad(): expected = dit_of(model)(latents, time_scale*t, labels).sample
    assert expected.std() > .1
    torch.testing.assert_close(model(latents, t, labels), expected, atol=2e-5, rtol=1e-4)

def test_new_network_is_zero_and_its_blocks_are_the_identity(latents, labels):
    model = SiT(**SIZES)
    assert not model(latents, torch.rand(6), labels).any()
    x, c = torch.randn(6, 4, 16), model.condition(torch.rand(6), labels)
    assert torch.equal(model.blocks[0](x, model.blocks[0].modulation(c)), x)
    bound = math.sqrt(6/(16+64))
    assert .8*bound < model.blocks[0].mlp[0].weight.abs().max() <= bound

def test_second_half_of_learn_sigma_is_never_used(latents, labels):
    model, t = random_model(learn_sigma=True), torch.rand(6, generator=rng())
    before = model(latents, t, labels)
    model.final.linear.weight[8:] = 100.
    assert before.shape == latents.shape and torch.equal(model(latents, t, labels), before)

def test_rectangular_latents(labels):
    model = random_model(latent_shape=(3, 2, 6))
    drawn = model.sample(labels, generator=rng(), steps=2)
    assert drawn.shape == (6, 3, 2, 6) and drawn.isfinite().all()

@pytest.mark.parametrize('patch_size', [0, 3, 8])
def test_patch_size_must_divide(patch_size):
    with pytest.raises(ValueError, match=f"patch_size must divide the latent's sides 4 and 4, got {patch_size}"):
        SiT(**SIZES | dict(patch_size=patch_size))

def test_width_must_be_a_multiple_of_four_and_of_heads():
    with pytest.raises(ValueError, match='width must be a multiple of 4, got 18'): SiT(**SIZES | dict(width=18))
    with pytest.raises(ValueError, match='width must be a multiple of heads=3, got 16'): SiT(**SIZES | dict(heads=3))

def test_bfloat16_changes_little_and_returns_float32(latents, labels):
    model, t = random_model(), torch.rand(6, generator=rng())
    with Processes('bf16').autocast(): rough = model(latents, t, labels)
    exact = model(latents, t, labels)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough-exact).abs().max() < .05*exact.abs().max()


# path, loss and times

def test_interpolate_ends_exactly_and_follows_the_line(latents):
    noise, t = torch.randn(latents.shape, generator=rng(2)), torch.tensor([0., 1., .5, .25, .1, .9])
    assert torch.equal(interpolate(latents, noise, 0.), latents) and torch.equal(interpolate(latents, noise, 1.), noise)
    path = interpolate(latents, noise, t)
    for i in range(6): torch.testing.assert_close(path[i], latents[i] + t[i]*(noise[i]-latents[i]))

@pytest.mark.parametrize('t', [.1, .5, .9])
def test_exact_velocity_is_the_best_affine_answer(t):
    "Least squares of noise - data on the path's points finds it; and its loss is s^2 over the path's variance."
    n = 200_000
    data, noise = MU + S*torch.randn(n, generator=rng(1)).double(), torch.randn(n, generator=rng(2)).double()
    x = interpolate(data, noise, t)
    design = torch.stack([torch.ones(n).double(), x], 1)
    fitted = torch.linalg.lstsq(design, (noise-data)[:, None]).solution[:, 0]
    intercept = gaussian(torch.zeros(()), t)
    torch.testing.assert_close(fitted, torch.stack([intercept, gaussian(torch.ones(()), t) - intercept]).double(),
                               atol=.02, rtol=0)
    shaped = lambda v: v.view(-1, 1, 1, 1)
    loss = flow_loss(lambda x, t, labels: gaussian(x, shaped(t)), shaped(data), None, torch.full((n,), t).double(),
                     shaped(noise))
    rest = S**2/((S*(1-t))**2 + t**2)
    assert abs(loss.item() - rest) < 5*rest*math.sqrt(2/n)

def test_loss_equals_an_explicit_loop(latents, labels):
    model, t, noise = random_model(), torch.rand(6, generator=rng(3)), torch.randn(latents.shape, generator=rng(4))
    loss = sum(((model((1-t[i])*latents[i:i+1] + t[i]*noise[i:i+1], t[i:i+1], labels[i:i+1])
                 - noise[i] + latents[i])**2).sum() for i in range(6))/latents.numel()
    torch.testing.assert_close(flow_loss(model, latents, labels, t, noise), loss)

def test_times_have_their_distributions():
    assert kstest(draw_times(20_000, generator=rng()), 'uniform').pvalue > 1e-4
    normal = draw_times(20_000, 'logit-normal', rng()).double().logit()
    assert kstest(normal, norm.cdf).pvalue > 1e-4
    with pytest.raises(ValueError, match="times must be 'uniform' or 'logit-normal', got 'cosine'"):
        draw_times(1, 'cosine')


# samplers

def order(errors): return math.log2(errors[-2]/errors[-1])

def test_ode_samplers_carry_one_gaussian_to_the_other_with_their_order():
    z = torch.linspace(-3, 3, 31, dtype=torch.float64)
    for sampler, expected in ((euler, 1), (heun, 2)):
        errors = [(sampler(gaussian, z, time_grid(n)) - (MU + S*z)).abs().max().item() for n in (128, 256)]
        assert abs(order(errors) - expected) < .05
        assert errors[-1] < (.02 if expected == 1 else 2e-5)

@pytest.mark.parametrize('start', [1., .37])
def test_ode_samplers_approach_scipys_solution_of_a_random_network(start):
    model, labels = random_model(time_scale=1.), torch.tensor([1, 3])
    x = torch.randn(2, 2, 4, 4, generator=rng(5), dtype=torch.float64)
    velocity = lambda x, t: model(x.float(), torch.full((2,), t), labels).double()
    flat = lambda t, x: velocity(torch.from_numpy(x).view(2, 2, 4, 4), t).flatten().numpy()
    exact = torch.from_numpy(solve_ivp(flat, (start, 0.), x.flatten().numpy(), rtol=1e-5, atol=1e-7).y[:, -1]).view_as(x)
    moved = (exact-x).abs().max()
    coarse, fine = ([(f(velocity, x, time_grid(n, start)) - exact).abs().max()/moved for f in ODES] for n in (16, 64))
    assert moved > .1 and fine[0] < .35*coarse[0] and fine[0] < .05
    assert fine[1] < 2e-3 and fine[1] < fine[0]

def exact_moments(mean, variance, times, diffusion):
    "Mean and variance that Euler-Maruyama has on a Gaussian, step by step."
    for t, end in zip(times[:-1], times[1:]):
        slope = (gaussian(1., t) - gaussian(0., t))
        drift = lambda x: gaussian(x, t) + diffusion/2*(x + (1-t)*gaussian(x, t)) # v - w/2 score, w = diffusion t
        factor = 1 + (end-t)*(slope + diffusion/2*(1 + (1-t)*slope))
        mean, variance = mean + (end-t)*drift(mean), factor**2*variance + (diffusion*t*(t-end) if end > 0 else 0)
    return mean, variance

@pytest.mark.parametrize('diffusion', [.5, 1., 2.])
def test_sde_has_the_moments_of_its_recursion_and_in_the_limit_of_the_data(diffusion):
    n, times = 100_000, time_grid(20, last_step=.04).tolist()
    x = euler_maruyama(gaussian, torch.randn(n, generator=rng(), dtype=torch.float64), torch.tensor(times), diffusion, rng(1))
    mean, variance = exact_moments(0., 1., times, diffusion)
    assert abs(x.mean() - mean) < 5*math.sqrt(variance/n)
    assert abs(x.var() - variance) < 5*variance*math.sqrt(2/n)
    limits = [exact_moments(0., 1., time_grid(n, last_step=1/n).tolist(), diffusion) for n in (1000, 2000)]
    (mean, _), (_, coarse), (_, fine) = limits[1], *limits
    assert abs(mean - MU) < 1e-9 # straight for every step
    assert abs(math.log2((coarse - S**2)/(fine - S**2)) - 1) < .1 and abs(fine - S**2) < 1e-3

def test_sde_without_diffusion_is_euler_and_refuses_less():
    z, times = torch.randn(50, generator=rng()).double(), time_grid(9, last_step=.04)
    torch.testing.assert_close(euler_maruyama(gaussian, z, times, 0., rng()), euler(gaussian, z, times))
    with pytest.raises(ValueError, match='diffusion must be at least 0, got -1'): euler_maruyama(gaussian, z, times, -1)

def test_sde_takes_the_mean_at_the_end():
    z, times = torch.randn(50, generator=rng()).double(), torch.tensor([.04, 0.])
    torch.testing.assert_close(*(euler_maruyama(gaussian, z, times, 2., rng(seed)) for seed in (0, 1)), atol=0, rtol=0)
    score = -(z - .96*MU)/((.96*S)**2 + .04**2) # of the Gaussian at t = .04
    expected = z - .04*(gaussian(z, .04) - .04*score)
    torch.testing.assert_close(euler_maruyama(gaussian, z, times, 2.), expected, atol=1e-7, rtol=0)

@pytest.mark.parametrize('steps', [2, 3, 10, 25, 250])
@pytest.mark.parametrize('start', [1., .999, .7, 1-.9, .1, .04, .01, 1e-9])
@pytest.mark.parametrize('last_step', [0., .04, .3])
def test_grid_takes_as_few_steps_as_keep_their_length(steps, start, last_step):
    times = time_grid(steps, start, last_step)
    lengths, longest = -times.diff(), (1-last_step)/(steps - bool(last_step))
    assert times[0] == start and times[-1] == 0 and (lengths > 0).all()
    body = lengths if not last_step else lengths[:-1]
    if start <= last_step: assert len(lengths) == 1
    else:
        assert (body <= longest + 1e-5).all() and (len(body) == 1 or (len(body)-1)*longest < body.sum())
        torch.testing.assert_close(body, body.mean().expand_as(body), atol=1e-12, rtol=0)
        if last_step: assert math.isclose(lengths[-1], last_step)
    if start == 1: assert len(lengths) == steps

def test_grid_of_the_sde_is_the_official_one():
    torch.testing.assert_close(time_grid(250, last_step=.04)[:-1], torch.linspace(1, .04, 250, dtype=torch.float64))

def test_grid_refuses():
    assert time_grid(5, 0.).tolist() == [0.]
    for steps in (0, -3):
        with pytest.raises(ValueError, match=f'steps must be at least 1, got {steps}'): time_grid(steps)
    with pytest.raises(ValueError, match='steps must be at least 2, got 1'): time_grid(1, last_step=.04)
    with pytest.raises(ValueError, match=r'start must be in \[0, 1\], got 1.2'): time_grid(4, 1.2)
    with pytest.raises(ValueError, match=r'last_step must be in \[0, 1\), got 1'): time_grid(4, last_step=1.)


# guidance

def test_guidance_equals_its_formula(latents, labels):
    model, scale, times = random_model(), 3., torch.full((6,), .3)
    velocity = guided_velocity(model, labels, scale, (.2, .6))
    with_class, without = model(latents, times, labels), model(latents, times, torch.full((6,), 5))
    torch.testing.assert_close(velocity(latents, .3), without + scale*(with_class-without), atol=1e-5, rtol=1e-5)
    assert (with_class-without).abs().max() > 1e-3
    torch.testing.assert_close(guided_velocity(model, labels, 0.)(latents, .3), without, atol=1e-6, rtol=1e-5)

@pytest.mark.parametrize('t, rows', [(.1, 6), (.2, 12), (.5, 12), (.6, 12), (.61, 6)])
def test_null_class_is_computed_inside_the_interval_only(latents, labels, t, rows):
    seen = []
    def model(x, times, labels): return seen.append((len(x), labels.tolist())) or x
    model.num_classes = 5
    guided_velocity(model, labels, 2., (.2, .6))(latents, t)
    guided_velocity(model, labels, 1., (.2, .6))(latents, t)
    assert seen == [(rows, (labels.tolist() + 6*[5])[:rows]), (6, labels.tolist())]

@pytest.mark.parametrize('interval', [(.6, .2), (-.1, 1), (0, 1.1)])
def test_interval_must_lie_on_the_path(labels, interval):
    with pytest.raises(ValueError, match=r'guidance_interval must be two times in \[0, 1\]'):
        random_model().sample(labels, guidance_scale=2., guidance_interval=interval)


# sampling

@samplers
def test_both_ends_of_sigma(latents, labels, sampler):
    model, options = random_model(), dict(sampler=sampler, steps=5, guidance_scale=2.)
    kept = model.sample(labels, latents, 1., rng(), **options)
    assert torch.equal(kept, latents) and kept.data_ptr() != latents.data_ptr()
    free = model.sample(labels, generator=rng(), **options)
    assert torch.equal(model.sample(labels, latents, 0., rng(), **options), free)
    assert (free-latents).abs().min() > 0

@samplers
def test_same_seed_same_latents(latents, labels, sampler):
    model, options = random_model(), dict(sampler=sampler, steps=4)
    draw = lambda seed: model.sample(labels, latents, .5, rng(seed), **options)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    torch.manual_seed(3)
    first = model.sample(labels, **options)
    torch.manual_seed(3)
    assert torch.equal(model.sample(labels, **options), first)

def test_noise_is_the_same_for_every_sigma_and_sampler(latents, labels):
    model, starts = SiT(**SIZES), {} # a new network's velocity is 0: what is returned is the start
    for sigma in (0., .25, .5, .9):
        for sampler in ('euler', 'heun'):
            x = model.sample(labels, latents, sigma, rng(), sampler=sampler, steps=3)
            starts[sigma, sampler] = (x - sigma*latents)/(1-sigma)
    for start in starts.values(): torch.testing.assert_close(start, starts[0., 'euler'], atol=1e-5, rtol=1e-5)
    drift = model.sample(labels, generator=rng(), sampler='sde', diffusion=0., steps=3)
    torch.testing.assert_close(drift, starts[0., 'euler'])
    assert abs(starts[0., 'euler'].std() - 1) < .3

@pytest.mark.parametrize('sampler, sigma, evaluations', [
    ('euler', 0., 10), ('heun', 0., 20), ('sde', 0., 10), ('euler', .9, 1), ('heun', .7, 6), ('euler', .65, 4),
    ('sde', .96, 1), ('sde', .9, 2), ('euler', .999, 1), ('euler', 1., 0), ('heun', 1., 0)])
def test_partial_paths_cost_their_share_of_the_steps(latents, labels, sampler, sigma, evaluations):
    model, calls = random_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.sample(labels, latents, sigma, rng(), sampler=sampler, steps=10)
    assert len(calls) == evaluations

@samplers
@pytest.mark.parametrize('sigma', [0., .3, .6, .9])
def test_edited_gaussian_data_stay_the_same_gaussian(sampler, sigma):
    n, model = 40_000, gaussian_model()
    data = MU + S*torch.randn(n, 1, 1, 1, generator=rng(7))
    x = model.sample(torch.zeros(n).long(), data, sigma, rng(), steps=200, sampler=sampler, last_step=.005)
    assert abs(x.mean() - MU) < .02 and abs(x.std() - S) < .02

@pytest.mark.parametrize('sigma', [.1, .5, .9, .99])
def test_edited_point_has_the_moments_of_the_closed_form(sigma):
    n, t, point, model = 40_000, 1-sigma, 3., gaussian_model()
    x = model.sample(torch.zeros(n).long(), torch.full((n, 1, 1, 1), point), sigma, rng(), steps=50)
    root = math.hypot(sigma*S, t)
    std = S*t/root
    assert abs(x.mean() - (MU + S*sigma*(point-MU)/root)) < 5*std/math.sqrt(n) + 1e-3
    assert abs(x.std() - std) < 5*std/math.sqrt(2*n) + 1e-3

def test_model_keeps_its_mode_and_no_gradient_is_kept(latents, labels):
    model = SiT(**SIZES).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    drawn = model.sample(labels, latents, .5, steps=2)
    assert [module.training for module in model.modules()] == modes and not drawn.requires_grad

@pytest.mark.parametrize('options, message', [
    (dict(steps=0), 'steps must be at least 1, got 0'),
    (dict(steps=1, sampler='sde'), 'steps must be at least 2, got 1'),
    (dict(sigma=-.1), r'sigma must be in \[0, 1\], got -0.1'),
    (dict(sigma=1.01), r'sigma must be in \[0, 1\], got 1.01'),
    (dict(sigma=float('nan')), r'sigma must be in \[0, 1\], got nan'),
    (dict(sigma=.5, latents=None), 'latents must be given when sigma > 0, got None with sigma=0.5'),
    (dict(latents=torch.zeros(6, 3, 4, 4)), r'latents must be \(6, 2, 4, 4\), got \(6, 3, 4, 4\)'),
    (dict(latents=torch.zeros(5, 2, 4, 4)), r'latents must be \(6, 2, 4, 4\), got \(5, 2, 4, 4\)'),
    (dict(latents=torch.zeros(6, 2, 4, 4).long().flatten(1)), r'latents must be \(6, 2, 4, 4\), got \(6, 32\)'),
    (dict(labels=torch.tensor([0, 1, 2, 3, 4, 5])), r'labels must be \(B,\) in \[0, 5\), got \(6,\) with \[0, 5\]'),
    (dict(labels=torch.tensor([-1, 1, 2, 3, 4, 2])), r'labels must be \(B,\) in \[0, 5\), got \(6,\) with \[-1, 4\]'),
    (dict(sampler='dopri5'), "sampler must be 'euler', 'heun' or 'sde', got 'dopri5'"),
    (dict(sampler='sde', diffusion=-1.), 'diffusion must be at least 0, got -1.0'),
    (dict(sampler='sde', last_step=1.), r'last_step must be in \[0, 1\), got 1.0')])
def test_bad_input_is_refused(latents, labels, options, message):
    with pytest.raises(ValueError, match=message):
        sample_latents(random_model(), **dict(dict(labels=labels, latents=latents), **options))


# training

TRAINING = dict(steps=6, batch_size=4, lr=1e-3, warmup=2, precision='fp32')

def fresh(seed=0):
    torch.manual_seed(seed)
    return SiT(**SIZES)

def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

def test_same_seed_same_weights_from_memory_or_store(latents, labels, tmp_path):
    store = make_latent_store(tmp_path/'latents', lambda rows: latents[rows], labels, (2, 4, 4), dict(made='here'))
    trained = []
    for source, seed in ((store, 0), ((latents, labels), 0), (store, 1)):
        model = fresh()
        train_diffusion(model, source, seed=seed, **TRAINING)
        trained.append(weights(model))
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])
    assert not torch.equal(trained[0], weights(fresh()))

def test_resumed_run_equals_an_undisturbed_one(latents, labels, tmp_path):
    whole, broken = fresh(), fresh()
    rows = train_diffusion(whole, (latents, labels), **TRAINING)
    calls = []
    def fail(*_):
        calls.append(1)
        if len(calls) == 5: raise KeyboardInterrupt
    hook = broken.register_forward_pre_hook(fail)
    options = dict(TRAINING, folder=tmp_path, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt): train_diffusion(broken, (latents, labels), **options)
    hook.remove()
    assert not torch.equal(weights(broken), weights(whole))
    resumed = fresh(9)
    assert train_diffusion(resumed, (latents, labels), **options) == rows
    assert torch.equal(weights(resumed), weights(whole))
    finished = fresh(9)
    train_diffusion(finished, (latents, labels), **options)
    assert torch.equal(weights(finished), weights(whole)) and not finished.training

@pytest.mark.parametrize('change', [dict(times='logit-normal'), dict(lr=2e-3), dict(seed=1), dict(ema_horizon=.5)])
def test_checkpoint_of_another_run_is_refused(latents, labels, tmp_path, change):
    train_diffusion(fresh(), (latents, labels), folder=tmp_path, **TRAINING)
    with pytest.raises(ValueError, match=list(change)[0]):
        train_diffusion(fresh(), (latents, labels), folder=tmp_path, **dict(TRAINING, **change))

def test_training_is_adamw_with_averaged_weights(latents, labels):
    "Against a plain loop over what the model was called with."
    seen, model, plain = [], fresh(), fresh()
    model.register_forward_pre_hook(lambda _, inputs: seen.append([x.clone() for x in inputs]))
    rows = train_diffusion(model, (latents, labels), ema_horizon=.5, **TRAINING)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(.9, .999), weight_decay=0.)
    batches, average, decay = draw_rows(6, 4, fold(0, 'latents')), None, 1 - 1/3
    for (x, t, classes), (step, _, chosen) in zip(seen, batches):
        data, wide = latents[chosen], t.view(-1, 1, 1, 1)
        noise = (x - (1-wide)*data)/wide
        loss = F.mse_loss(plain(x, t, classes), noise-data)
        assert math.isclose(loss.item(), rows[step]['loss'], rel_tol=1e-3)
        assert ((classes == labels[chosen]) | (classes == 5)).all()
        for group in optimizer.param_groups: group['lr'] = 1e-3*min(1, (step+1)/2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average = weights(plain) if average is None else decay*average + (1-decay)*weights(plain)
    assert len(seen) == 6
    torch.testing.assert_close(weights(model), average, atol=2e-5, rtol=1e-4)

def test_classes_are_dropped_at_their_rate(latents, labels):
    model, seen = fresh(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2].clone()))
    train_diffusion(model, (latents, labels), **dict(TRAINING, steps=40, batch_size=50))
    dropped = (torch.cat(seen) == 5).sum().item()
    assert binom.ppf(5e-7, 2000, .1) <= dropped <= binom.isf(5e-7, 2000, .1)

@pytest.mark.parametrize('source, message', [
    ((torch.zeros(6, 2, 4, 2), torch.zeros(6)), r'latents must be \(4, 2, 4, 4\), got \(4, 2, 4, 2\)'),
    ((torch.zeros(6, 2, 4, 4), torch.full((6,), 5)), r'labels must be \(B,\) in \[0, 5\)'),
    ((torch.zeros(6, 2, 4, 4), torch.zeros(5)), 'labels must be 6, one per row, got 5')])
def test_training_refuses_what_does_not_fit(source, message):
    with pytest.raises(ValueError, match=message): train_diffusion(fresh(), source, **TRAINING)

def test_latents_that_are_not_finite_stop_the_training(latents, labels):
    with pytest.raises(FloatingPointError, match='the loss is not finite at step'):
        train_diffusion(fresh(), (latents.fill_(float('nan')), labels), **TRAINING)

def test_trained_network_draws_the_gaussians_it_has_seen():
    "End to end: two classes with a mean and a deviation of their own."
    labels = torch.arange(4000) % 2
    data = torch.where(labels == 1, 1., -1.) + torch.where(labels == 1, .3, .8)*torch.randn(4000, generator=rng())
    torch.manual_seed(0)
    model = SiT((1, 1, 1), num_classes=2, width=32, depth=1, heads=2, patch_size=1)
    train_diffusion(model, (data.view(-1, 1, 1, 1), labels), steps=300, batch_size=256, lr=4e-3, warmup=20)
    for sampler in ('heun', 'sde'):
        x = model.sample(labels, generator=rng(), sampler=sampler, steps=30).flatten()
        moments = [f(x[labels == c]).item() for c in (0, 1) for f in (torch.mean, torch.std)]
        assert np.allclose(moments, [-1, .8, 1, .3], atol=.1), moments
