"Latent perturbation against explicit loops, binomial bounds and the formula of its gradient."
import pytest, torch, torch.nn.functional as F
from scipy.stats import binom
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tokpost.perturbation import (PerturbationSchedule, anneal, draw_ranks, neighbour_table,
                                  perturb_quantized, perturb_tokens, replace_tokens)

def rng(seed=0): return torch.Generator().manual_seed(seed)

def within_binomial_bounds(count, n, p):
    return binom.ppf(5e-7, n, p) <= count <= binom.isf(5e-7, n, p)

def nearest_by_loop(vector, codebook, first=None):
    "Codes by distance to a vector, one at a time, in float64; `first` is put in front."
    distances = [float(((vector.double()-code.double())**2).sum()) for code in codebook]
    order = sorted(range(len(codebook)), key=lambda k: (k != first, distances[k]))
    return torch.tensor(order)

@pytest.fixture
def codebook(): return torch.randn(48, 6, generator=rng(1))

@pytest.mark.parametrize('normalize', [False, True])
def test_table_equals_loop(codebook, normalize):
    codes = F.normalize(codebook.double(), dim=1) if normalize else codebook
    expected = torch.stack([nearest_by_loop(codes[k], codes, first=k)[:9] for k in range(48)])
    assert torch.equal(neighbour_table(codebook, 9, normalize=normalize), expected)

def test_table_prefix_is_the_smaller_table(codebook):
    assert torch.equal(neighbour_table(codebook, 48)[:, :7], neighbour_table(codebook, 7))

@pytest.mark.parametrize('chunk', [1, 48, 100, 481, 10**6])
def test_table_does_not_depend_on_chunk(codebook, chunk):
    assert torch.equal(neighbour_table(codebook, 5, chunk=chunk), neighbour_table(codebook, 5))

def test_table_puts_self_first_among_duplicates(codebook):
    twice = torch.cat([codebook]*4)
    table = neighbour_table(twice, 3)
    assert torch.equal(table[:, 0], torch.arange(192))
    assert torch.equal(table % 48, (torch.arange(192) % 48)[:, None].expand(-1, 3))
    assert all(len(set(row)) == 3 for row in table.tolist())
    assert all(len(set(row)) == 192 for row in neighbour_table(twice, 192).tolist())

class Largest(TorchDispatchMode):
    "Remembers the number of elements of the largest tensor made."
    size = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return out

def test_large_codebook_needs_bounded_memory():
    K, chunk = 2**14, 2**21
    codebook = torch.rand(K, 2, generator=rng())
    with Largest() as largest: table = neighbour_table(codebook, 2, chunk=chunk)
    assert largest.size <= chunk < K*K/100
    some = torch.randint(K, (50,), generator=rng()).tolist()
    for k in some: assert torch.equal(table[k], nearest_by_tensor(codebook, k, 2))

def nearest_by_tensor(codebook, k, delta):
    return (codebook.double()-codebook[k].double()).square().sum(1).argsort()[:delta]

def test_codebook_of_2_to_the_16_without_a_table():
    K = 2**16
    codebook, indices = torch.rand(K, 2, generator=rng()), torch.randint(K, (8, 64), generator=rng())
    with Largest() as largest: new = perturb_tokens(indices, codebook, 1., 1., 4, generator=rng())
    assert largest.size <= 2**24 < 512*K
    ranks = draw_ranks((8, 64), 1., 1., 4, generator=rng())
    for b, n in ((0, 0), (3, 17), (7, 63)):
        assert new[b, n] == nearest_by_tensor(codebook, indices[b, n], 4)[ranks[b, n]]

@pytest.mark.parametrize('alpha, beta, delta', [(1., 1., 100), (.5, 1., 50), (.7, .1, 2), (.3, .9, 1), (0., 1., 9), (1., 0., 9)])
def test_rates_are_binomial(alpha, beta, delta):
    B, N, seeds = 64, 32, range(40)
    ranks = torch.stack([draw_ranks((B, N), alpha, beta, delta, generator=rng(s)) for s in seeds]) > 0
    share = alpha*(1-1/delta)
    images = ranks.any(-1)
    assert within_binomial_bounds(images.sum().item(), images.numel(), beta*(1-(1-share)**N))
    assert within_binomial_bounds(ranks[images].sum().item(), images.sum().item()*N, share) or share == 0
    if beta == 1: assert within_binomial_bounds(ranks.sum().item(), ranks.numel(), share)

def test_ranks_are_uniform():
    ranks = draw_ranks((500, 200), 1., 1., 5, generator=rng())
    for count in ranks.flatten().bincount(minlength=5): assert within_binomial_bounds(count.item(), 100_000, .2)
    assert ranks.min() == 0 and ranks.max() == 4

def test_every_place_is_perturbed_alike():
    ranks = torch.stack([draw_ranks((8, 6), .5, .5, 10**6, counts=c, generator=rng(s))
                         for s in range(2000) for c in ('exact', 'bernoulli')]) > 0
    for count in ranks.sum(0).flatten(): assert within_binomial_bounds(count.item(), 4000, .25)

@pytest.mark.parametrize('B, N, alpha, beta, images, tokens', [
    (128, 256, 1., .1, 13, 256), (10, 16, .3, .5, 5, 5), (4, 16, 1., .1, 0, 0), (7, 9, 0., 1., 0, 0), (3, 5, .5, 1., 3, 2)])
def test_exact_counts_are_exact(B, N, alpha, beta, images, tokens):
    for seed in range(5):
        per_image = (draw_ranks((B, N), alpha, beta, 10**9, counts='exact', generator=rng(seed)) > 0).sum(1)
        assert sorted(per_image.tolist()) == [0]*(B-images) + [tokens]*images

@pytest.mark.parametrize('B, images', [(4, 0), (9, 0), (10, 1), (19, 1), (128, 12)])
def test_first_images(B, images):
    perturbed = (draw_ranks((B, 8), 1., .1, 10**9, images='first', generator=rng()) > 0).any(1)
    assert perturbed.tolist() == [True]*images + [False]*(B-images)

def test_same_seed_same_draws(codebook):
    indices = torch.randint(48, (16, 20), generator=rng())
    a, b, c = (perturb_tokens(indices, codebook, .5, .5, 8, generator=rng(s)) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(3); a = perturb_tokens(indices, codebook, .5, .5, 8)
    torch.manual_seed(3); b = perturb_tokens(indices, codebook, .5, .5, 8)
    assert torch.equal(a, b)

@pytest.mark.parametrize('counts', ['bernoulli', 'exact'])
@pytest.mark.parametrize('normalize', [False, True])
def test_tokens_equal_loop(codebook, counts, normalize):
    indices = torch.randint(48, (12, 10), generator=rng(5))
    ranks = draw_ranks((12, 10), .6, .7, 11, counts=counts, generator=rng(6))
    codes, expected = F.normalize(codebook.double(), dim=1) if normalize else codebook, indices.clone()
    for b in range(12):
        for n in range(10):
            k = int(indices[b, n])
            expected[b, n] = nearest_by_loop(codes[k], codes, first=k)[ranks[b, n]]
    arguments = dict(counts=counts, normalize=normalize)
    got = perturb_tokens(indices, codebook, .6, .7, 11, generator=rng(6), **arguments)
    assert torch.equal(got, expected) and not torch.equal(got, indices)
    table = neighbour_table(codebook, 20, normalize=normalize)
    assert torch.equal(perturb_tokens(indices, codebook, .6, .7, 11, table=table, generator=rng(6), **arguments), expected)
    assert torch.equal(replace_tokens(indices, ranks, codebook, table, normalize), expected)

@pytest.mark.parametrize('dtype', [torch.int32, torch.int64, torch.int16])
def test_type_of_indices_is_kept_and_input_unchanged(codebook, dtype):
    indices = torch.randint(48, (4, 9), generator=rng()).to(dtype)
    before = indices.clone()
    new = perturb_tokens(indices, codebook, 1., 1., 8, generator=rng())
    assert new.dtype == dtype and torch.equal(indices, before) and not torch.equal(new, before)

def quantized(codebook, shape, seed=0):
    "Features with straight-through z_q by loops: (z, z_q, indices)."
    z = torch.randn(shape, generator=rng(seed)).requires_grad_()
    rows = z.detach().flatten(2).transpose(1, 2) if len(shape) == 4 else z.detach()
    indices = torch.tensor([[nearest_by_loop(v, codebook)[0] for v in image] for image in rows])
    codes = codebook[indices]
    if len(shape) == 4: codes = codes.transpose(1, 2).reshape(shape)
    return z, z + (codes-z).detach(), indices

def reference(z, z_q, codebook, ranks, around):
    "Explicit loops over tokens; `around` gives the codes by rank for a feature."
    B, N = ranks.shape
    rows = lambda x: [[x[b].flatten(1)[:, n] if x.dim() == 4 else x[b, n] for n in range(N)] for b in range(B)]
    z, z_q, out = rows(z), rows(z_q), []
    for b in range(B):
        for n in range(N):
            feature = z[b][n]
            new = codebook[around(feature.detach())[ranks[b, n]]]
            out.append(feature + (new-feature).detach() if ranks[b, n] > 0 else z_q[b][n])
    return torch.stack(out).view(B, N, -1)

def around_code(codebook):
    def order(feature):
        k = int(nearest_by_loop(feature, codebook)[0])
        return nearest_by_loop(codebook[k], codebook, first=k)
    return order

def around_feature(codebook): return lambda feature: nearest_by_loop(feature, codebook)

@pytest.mark.parametrize('shape', [(6, 6, 3, 4), (6, 12, 6)])
@pytest.mark.parametrize('neighbours, images', [('code', 'random'), ('feature', 'first'), ('code', 'first'), ('feature', 'random')])
def test_quantized_equals_loop_with_gradient(codebook, shape, neighbours, images):
    z, z_q, indices = quantized(codebook, shape)
    ranks = draw_ranks((6, 12), .7, .5, 10, images=images, generator=rng(2))
    around = dict(code=around_code, feature=around_feature)[neighbours](codebook)
    expected = reference(z, z_q, codebook, ranks, around)
    out = perturb_quantized(z, z_q, codebook, .7, .5, 10, neighbours=neighbours, images=images, generator=rng(2))
    assert out.shape == z_q.shape and out.dtype == z_q.dtype
    rows = out.flatten(2).transpose(1, 2) if out.dim() == 4 else out
    torch.testing.assert_close(rows, expected)
    untouched = (ranks == 0)
    before = z_q.flatten(2).transpose(1, 2) if out.dim() == 4 else z_q
    assert torch.equal(rows[untouched], before[untouched]) and not torch.equal(rows, before)
    weights = torch.randn(out.shape, generator=rng(3))
    gradient, = torch.autograd.grad((weights*out).sum(), z)
    torch.testing.assert_close(gradient, weights) # identity at perturbed and untouched tokens

def test_feature_and_code_differ(codebook):
    z, z_q, _ = quantized(codebook, (6, 6, 3, 4))
    a, b = (perturb_quantized(z, z_q, codebook, 1., 1., 10, neighbours=n, generator=rng()) for n in ('code', 'feature'))
    assert not torch.equal(a, b)

def test_given_indices_and_table_change_nothing(codebook):
    z, z_q, indices = quantized(codebook, (6, 6, 3, 4))
    plain = perturb_quantized(z, z_q, codebook, .7, .5, 10, generator=rng())
    for extra in (dict(indices=indices), dict(table=neighbour_table(codebook, 12)),
                  dict(indices=indices, table=neighbour_table(codebook, 10))):
        assert torch.equal(perturb_quantized(z, z_q, codebook, .7, .5, 10, generator=rng(), **extra), plain)

def test_memory_format_and_type_of_indices_change_nothing(codebook):
    z, z_q, indices = quantized(codebook, (6, 6, 3, 4))
    plain = perturb_quantized(z, z_q, codebook, .7, .5, 10, generator=rng())
    last = dict(memory_format=torch.channels_last)
    assert torch.equal(perturb_quantized(z.contiguous(**last), z_q.contiguous(**last), codebook, .7, .5, 10, generator=rng()), plain)
    assert torch.equal(perturb_quantized(z, z_q, codebook, .7, .5, 10, indices=indices.short(), generator=rng()), plain)

def test_given_indices_are_used(codebook):
    z, z_q, indices = quantized(codebook, (6, 12, 6))
    other = (indices+1) % 48
    out = perturb_quantized(z, z_q, codebook, 1., 1., 5, indices=other, generator=rng())
    new = perturb_tokens(other, codebook, 1., 1., 5, generator=rng())
    changed = new != other
    torch.testing.assert_close(out[changed], codebook[new][changed])

def test_normalize_equals_unit_inputs(codebook):
    unit = F.normalize(codebook, dim=1)
    z = torch.randn(6, 12, 6, generator=rng()).requires_grad_()
    direction = F.normalize(z, dim=-1)
    chosen = unit[torch.cdist(direction.detach(), unit).argmin(-1)]
    z_q = direction + (chosen-direction).detach()
    a = perturb_quantized(z, z_q, 3*codebook, .7, .5, 10, normalize=True, generator=rng())
    b = perturb_quantized(direction, z_q, unit, .7, .5, 10, generator=rng())
    torch.testing.assert_close(a, b)
    weights = torch.randn(a.shape, generator=rng(3))
    ga, gb = (torch.autograd.grad((weights*x).sum(), z, retain_graph=True)[0] for x in (a, b))
    torch.testing.assert_close(ga, gb)

def test_no_gradient_reaches_the_codebook_and_no_graph_through_the_search(codebook):
    codes = codebook.clone().requires_grad_()
    z, z_q, _ = quantized(codebook, (6, 12, 6))
    perturb_quantized(z, z_q, codes, 1., 1., 10, generator=rng()).sum().backward()
    assert codes.grad is None

def test_half_precision_z_q_keeps_its_type(codebook):
    z, z_q, _ = quantized(codebook, (6, 12, 6))
    out = perturb_quantized(z, z_q.bfloat16(), codebook, 1., 1., 10, generator=rng())
    assert out.dtype == torch.bfloat16

def test_nothing_to_perturb(codebook):
    z, z_q, indices = quantized(codebook, (6, 12, 6))
    for alpha, beta, delta in ((0., 1., 5), (1., 0., 5), (1., 1., 1)):
        assert torch.equal(perturb_quantized(z, z_q, codebook, alpha, beta, delta), z_q)
        assert torch.equal(perturb_tokens(indices, codebook, alpha, beta, delta), indices)

def test_anneal_is_the_line_of_the_paper():
    for epoch in range(201):
        expected = 1. if epoch < 40 else .5 if epoch > 120 else 1 - .5*(epoch-40)/80
        assert anneal(epoch/200) == pytest.approx(expected)
    assert anneal(.4, final=0.) == pytest.approx(.5) and anneal(1., final=0.) == 0. and anneal(.4, final=1.) == 1.

def test_schedule():
    schedule = PerturbationSchedule(alpha=.8, beta=.2, delta=5, final=0.)
    assert schedule(0.) == dict(alpha=.8, beta=.2, delta=5)
    assert schedule(.3) == dict(alpha=pytest.approx(.6), beta=.2, delta=4)
    assert schedule(1.) == dict(alpha=0., beta=.2, delta=1)
    with pytest.raises(AttributeError): schedule.alpha = 1.

@pytest.mark.parametrize('arguments, message', [
    (dict(alpha=1.1), r'alpha must be in \[0, 1\], got 1.1'), (dict(alpha=-.1), 'alpha must be'),
    (dict(beta=2), r'beta must be in \[0, 1\], got 2'), (dict(beta=float('nan')), 'beta must be'),
    (dict(delta=0), r'delta must be an integer in \[1, 48\], got 0'), (dict(delta=49), r'delta .* \[1, 48\], got 49'),
    (dict(delta=2.5), 'delta must be an integer'), (dict(counts='all'), "counts must be one of .*got 'all'")])
def test_bad_rates_are_named(codebook, arguments, message):
    indices, settings = torch.zeros(2, 3, dtype=torch.long), dict(alpha=.5, beta=.5, delta=5)
    with pytest.raises(ValueError, match=message): perturb_tokens(indices, codebook, **(settings | arguments))
    z, z_q, _ = quantized(codebook, (2, 3, 6))
    with pytest.raises(ValueError, match=message): perturb_quantized(z, z_q, codebook, **(settings | arguments))

@pytest.mark.parametrize('indices, message', [
    (torch.tensor([[0, 48]]), r'indices must be in \[0, 48\), got \[0, 48\]'),
    (torch.tensor([[-1, 3]]), r'indices must be in \[0, 48\), got \[-1, 3\]'),
    (torch.tensor([0, 1]), r'indices must be \(B, N\)'), (torch.zeros(2, 2), r'indices must be \(B, N\)')])
def test_bad_indices_are_named(codebook, indices, message):
    with pytest.raises(ValueError, match=message): perturb_tokens(indices, codebook, 1., 1., 4)

@pytest.mark.parametrize('change, message', [
    (dict(neighbours='z'), "neighbours must be one of .*got 'z'"), (dict(images='last'), "images must be one of .*got 'last'"),
    (dict(z=torch.zeros(2, 6)), r'z and z_q must have one shape'), (dict(z_q=torch.zeros(2, 4, 6)), r'z and z_q must have one shape'),
    (dict(codebook=torch.zeros(48, 5)), r'codebook must be \(K, 6\) to match z, got \(48, 5\)'),
    (dict(indices=torch.zeros(2, 4, dtype=torch.long)), r'indices must be \(2, 3\) to match z, got \(2, 4\)'),
    (dict(indices=torch.full((2, 3), 48)), r'indices must be in \[0, 48\)'),
    (dict(table=torch.zeros(48, 4, dtype=torch.long)), r'delta must be an integer in \[1, 4\], got 5')])
def test_bad_quantized_input_is_named(codebook, change, message):
    z, z_q, _ = quantized(codebook, (2, 3, 6))
    with pytest.raises(ValueError, match=message):
        perturb_quantized(**(dict(z=z, z_q=z_q, codebook=codebook, alpha=1., beta=1., delta=5, generator=rng()) | change))

@pytest.mark.parametrize('arguments', [dict(start=.6, stop=.2), dict(start=-.1), dict(stop=1.1), dict(final=2.), dict(delta=0), dict(beta=-1)])
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))): PerturbationSchedule(**arguments)
