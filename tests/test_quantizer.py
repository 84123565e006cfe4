"Vector quantization against explicit loops, gradients by hand and vector-quantize-pytorch."
import math
import pytest, torch, torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tokpost.metrics import codebook_usage, perplexity
from tokpost.quantizer import VectorQuantizer, code_counts, nearest_codes, straight_through

def rng(seed=0): return torch.Generator().manual_seed(seed)

def quantizer_of(codebook, **options):
    "A quantizer with these codes."
    quantizer = VectorQuantizer(*codebook.shape, **options)
    quantizer.embedding.data.copy_(codebook)
    quantizer.mean_sums.copy_(codebook)
    return quantizer

@pytest.fixture
def z(): return torch.randn(3, 10, 6, generator=rng(2))                      # (B, N, D)

@pytest.fixture
def codebook(): return torch.randn(32, 6, generator=rng(1))

# The nearest code

def test_nearest_codes_equal_loop(z, codebook):
    features = z.flatten(0, 1)
    expected = [sorted(range(32), key=lambda k: sum((a-b)**2 for a, b in zip(f, codebook[k].tolist())))[:5]
                for f in features.tolist()]
    assert nearest_codes(features, codebook, 5).tolist() == expected
    assert nearest_codes(features, codebook).tolist() == [row[:1] for row in expected]

@pytest.mark.parametrize('count', [1, 4, 32])
@pytest.mark.parametrize('chunk', [1, 32, 33, 100, 10**9])
def test_nearest_codes_do_not_depend_on_chunk(z, codebook, chunk, count):
    features = z.flatten(0, 1)
    found = nearest_codes(features, codebook, count, chunk)
    assert torch.equal(found, nearest_codes(features, codebook, count))

def test_nearest_codes_of_nothing(codebook):
    assert nearest_codes(torch.empty(0, 6), codebook, 2).shape == (0, 2)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_search_is_in_float32_under_autocast(dtype):
    "Codes a thousandth apart, which bfloat16 takes for one."
    codebook = torch.ones(64, 8) + torch.arange(64)[:, None]/1000
    with torch.autocast('cpu', torch.bfloat16):
        found = nearest_codes(codebook.to(dtype), codebook)
        quantizer = quantizer_of(codebook, normalize=False)
        z_q, indices, losses = quantizer(codebook[None])
    double = codebook.double()
    expected = torch.stack([(double-f.double()).square().sum(1).argmin() for f in codebook.to(dtype)])
    assert torch.equal(found[:, 0], expected)
    assert torch.equal(indices[0], torch.arange(64))
    assert {z_q.dtype, *(loss.dtype for loss in losses.values())} == {torch.float32}

class Largest(TorchDispatchMode):
    "Remembers the number of elements of the largest tensor made."
    size = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out

def test_a_quarter_of_a_million_codes_fit_in_memory():
    K, M, chunk = 2**18, 100, 2**21
    codebook = torch.rand(K, 3, generator=rng())
    features = codebook[torch.randint(K, (M,), generator=rng())]
    with Largest() as largest: found = nearest_codes(features, codebook, chunk=chunk)
    assert largest.size <= chunk < K*M/10
    assert torch.equal(codebook[found[:, 0]], features)
    with Largest() as largest: indices = VectorQuantizer(K, 3).assign(features[None])
    assert largest.size <= 2**24 < K*M and indices.shape == (1, M)

@pytest.mark.parametrize('count, width, message', [(0, 6, r'count must be in \[1, 32\], got 0'),
                                                   (33, 6, r'count must be in \[1, 32\], got 33'),
                                                   (1, 5, "codebook's 6 channels, got 5")])
def test_bad_searches_are_refused(codebook, count, width, message):
    with pytest.raises(ValueError, match=message): nearest_codes(torch.zeros(4, width), codebook, count)

def test_same_indices_as_vector_quantize_pytorch(z, codebook):
    from vector_quantize_pytorch import VectorQuantize
    for cosine in (False, True):
        codes = F.normalize(codebook, dim=1) if cosine else codebook
        theirs = VectorQuantize(dim=6, codebook_size=32, use_cosine_sim=cosine, rotation_trick=False).eval()
        theirs._codebook.embed.data.copy_(codes[None])
        z_q, indices, _ = theirs(z)
        ours_z_q, ours, _ = quantizer_of(codes, normalize=cosine).eval()(z)
        assert torch.equal(ours, indices)
        assert torch.allclose(ours_z_q, z_q, atol=1e-6)

# Gradients

def test_straight_through_passes_value_and_gradient(z):
    z, codes = z.requires_grad_(), torch.randn(z.shape, generator=rng(3)).requires_grad_()
    weight = torch.randn(z.shape, generator=rng(4))
    out = straight_through(z, codes)
    (out*weight).sum().backward()
    assert torch.allclose(out, codes, atol=1e-6)
    assert torch.equal(z.grad, weight) and codes.grad is None

def unnormalize(vectors, gradient):
    "Gradient before F.normalize from the gradient after it: its part along the vector is lost."
    length = vectors.norm(dim=-1, keepdim=True)
    unit = vectors/length
    return (gradient - unit*(unit*gradient).sum(-1, keepdim=True))/length

@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('ema_decay', [0., .9])
def test_gradients_equal_formulas(z, codebook, normalize, ema_decay):
    "Of a linear loss on z_q, the commitment loss and the codebook loss."
    quantizer = quantizer_of(codebook, normalize=normalize, ema_decay=ema_decay, commitment_cost=.7).eval()
    weight = torch.randn(z.shape, generator=rng(5))
    z_q, indices, losses = quantizer(z.requires_grad_())
    ((z_q*weight).sum() + sum(losses.values())).backward()

    unit = (lambda x: x/x.norm(dim=-1, keepdim=True)) if normalize else (lambda x: x)
    rows, codes = unit(z.detach()), unit(codebook)[indices]
    expected = weight + .7*2*(rows-codes)/z.numel()
    assert torch.allclose(z.grad, unnormalize(z.detach(), expected) if normalize else expected, atol=1e-6)
    assert losses['commitment_loss'].item() == pytest.approx(.7*(rows-codes).square().mean().item(), rel=1e-5)
    if ema_decay:
        assert set(losses) == {'commitment_loss'} and quantizer.embedding.grad is None
        return
    expected = torch.zeros_like(codebook)
    for row, code, k in zip(rows.flatten(0, 1), codes.flatten(0, 1), indices.flatten().tolist()):
        expected[k] += 2*(code-row)/z.numel()
    expected = unnormalize(codebook, expected) if normalize else expected
    assert torch.allclose(quantizer.embedding.grad, expected, atol=1e-6)

# Codebooks that learn

def test_features_may_be_maps_or_rows(z, codebook):
    maps = z.transpose(1, 2).unflatten(2, (2, 5))                            # (B, D, 2, 5)
    quantizer = quantizer_of(codebook).eval()
    for a, b in zip(quantizer(maps)[:2], quantizer(z)[:2]): assert torch.equal(a, b)
    assert torch.equal(quantizer.assign(maps), quantizer(z)[1])
    with pytest.raises(ValueError, match="codebook's 6 channels, got 5"): quantizer(maps[:, :5])

@pytest.mark.parametrize('normalize', [False, True])
def test_running_means_equal_loop(codebook, normalize):
    quantizer, decay = quantizer_of(codebook, normalize=normalize, ema_decay=.8), .8
    counts, sums = [1.]*32, [code.double() for code in codebook]
    for step in range(4):
        z = torch.randn(3, 10, 6, generator=rng(step))
        codes = torch.stack([s/c for s, c in zip(sums, counts)])
        rows = z.flatten(0, 1).double()
        if normalize: codes, rows = F.normalize(codes, dim=1), F.normalize(rows, dim=1)
        chosen = [min(range(32), key=lambda k: float((codes[k]-row).square().sum())) for row in rows]
        assert quantizer(z)[1].flatten().tolist() == chosen
        for k in range(32):
            mine = [row for row, c in zip(rows, chosen) if c == k]
            counts[k] = decay*counts[k] + (1-decay)*len(mine)
            sums[k] = decay*sums[k] + (1-decay)*sum(mine, torch.zeros(6).double())
    expected = torch.stack([s/c for s, c in zip(sums, counts)])
    assert torch.allclose(quantizer.embedding.double(), expected, atol=1e-5)

@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('ema_decay', [0., .9])
def test_dead_codes_restart_on_features(z, normalize, ema_decay):
    "Half of the codes lie where no feature is; the others keep their place or learn as ever."
    z = F.normalize(z.abs(), dim=2).requires_grad_()
    codebook = torch.cat([z.detach().flatten(0, 1)[:8], -50.*torch.ones(8, 6)])
    options = dict(normalize=normalize, ema_decay=ema_decay)
    quantizer, usual = (quantizer_of(codebook, restart=restart, **options) for restart in (.5, 0.))
    for each in (quantizer, usual):
        each.mean_counts.copy_(torch.tensor([4.]*8 + [1e-3]*8))
        each.mean_sums.copy_(codebook*each.mean_counts[:, None])
    results = [each(z) for each in (quantizer, usual)]
    assert torch.equal(quantizer.embedding[:8], usual.embedding[:8])
    distances = torch.cdist(quantizer.embedding[8:], z.flatten(0, 1)).amin(1)
    left = torch.cdist(usual.embedding[8:], z.flatten(0, 1)).amin(1)
    assert (distances < .1).all() and (left > 1).sum() > 4
    assert (quantizer.assign(z) >= 8).any()
    gradients = []
    for z_q, _, losses in results:
        z.grad = None
        (z_q.cos().sum() + sum(losses.values())).backward()  # the codes have moved since
        gradients.append(z.grad)
    assert torch.equal(*gradients)
    if not ema_decay: assert torch.allclose(quantizer.embedding.grad, usual.embedding.grad)

def test_restarts_revive_a_collapsed_codebook():
    features = torch.randn(64, 16, 4, generator=rng())
    usages = []
    for restart in (0., .2):
        codebook = torch.full((64, 4), 9.) + torch.eye(64)[:, :4]
        quantizer = quantizer_of(codebook, normalize=False, ema_decay=.9, restart=restart)
        for _ in range(30): indices = quantizer(features)[1]
        usages.append(codebook_usage(code_counts(indices, 64)))
    assert usages[0] < .3 and usages[1] > .9

@pytest.mark.parametrize('normalize', [False, True])
def test_data_dependent_start(z, normalize):
    quantizer = VectorQuantizer(16, 6, normalize=normalize, initialize='data', ema_decay=.9)
    uniform = quantizer.embedding.clone()
    quantizer.eval()(z)
    assert torch.equal(quantizer.embedding, uniform) and not quantizer.started
    quantizer.train()(z + 5)
    rows = F.normalize(z + 5, dim=2) if normalize else z + 5
    assert quantizer.started and torch.cdist(quantizer.embedding, rows.flatten(0, 1)).amin(1).max() < .5
    again = VectorQuantizer(16, 6, normalize=normalize, initialize='data', ema_decay=.9)
    again.load_state_dict(quantizer.state_dict())
    again(z)                                                                 # would start again at z
    quantizer(z)
    assert torch.equal(again.embedding, quantizer.embedding)

def test_evaluation_changes_nothing(z, codebook):
    quantizer = quantizer_of(codebook, ema_decay=.5, restart=.9).eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(z)
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())

@pytest.mark.parametrize('options, message', [
    (dict(codebook_size=1), 'codebook_size must be at least 2, got 1'),
    (dict(ema_decay=1.), r'ema_decay must be in \[0, 1\), got 1'),
    (dict(restart=-.1), r'restart must be in \[0, 1\), got -0.1'),
    (dict(initialize='kmeans'), "'uniform' or 'data', got 'kmeans'")])
def test_bad_quantizers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**dict(codebook_size=8, code_dim=2) | options)

def test_uniform_start_is_the_papers():
    embedding = VectorQuantizer(1000, 8).embedding
    assert embedding.abs().max() <= 1/1000
    assert embedding.std().item() == pytest.approx(2e-3/math.sqrt(12), rel=.05)

# Usage

@pytest.mark.parametrize('counts, usage, effective', [
    ([5.]*8, 1., 8.), ([0., 9., 0., 0.], .25, 1.), ([1., 1., 0., 0.], .5, 2.),
    ([3., 1.], 1., 4/3**.75), ([2., 1., 1.], 1., 2**1.5)])
def test_usage_and_perplexity_closed_forms(counts, usage, effective):
    counts = torch.tensor(counts)
    assert codebook_usage(counts) == pytest.approx(usage)
    assert perplexity(counts) == pytest.approx(effective) == pytest.approx(perplexity(counts*1000))

def test_counts_equal_loop():
    indices = torch.randint(20, (7, 5), generator=rng())
    assert code_counts(indices, 25).tolist() == [indices.flatten().tolist().count(k) for k in range(25)]
    assert code_counts(indices[:0], 4).tolist() == [0]*4

@pytest.mark.parametrize('wrong', [-1, 32])
def test_indices_out_of_range_are_refused(codebook, wrong):
    indices, quantizer = torch.tensor([[0, wrong]]), quantizer_of(codebook)
    with pytest.raises(ValueError, match=r'indices must be in \[0, 32\), got'): quantizer.lookup(indices)
    with pytest.raises(ValueError, match=r'indices must be in \[0, 32\), got'): code_counts(indices, 32)

@pytest.mark.parametrize('normalize', [False, True])
def test_lookup_gives_what_the_decoder_saw(z, codebook, normalize):
    quantizer = quantizer_of(codebook, normalize=normalize)
    z_q, indices, _ = quantizer(z)
    assert torch.allclose(quantizer.lookup(indices), z_q, atol=1e-6)
    assert torch.equal(quantizer.assign(quantizer.lookup(indices)), indices)
