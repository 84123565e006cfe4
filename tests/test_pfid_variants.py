"pFID of residual codes and of continuous latents, against a straightforward form and against pFID itself."
import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
from tokpost.data import to_images, to_pixels
from tokpost.metrics import FeatureNetwork, FrechetStatistics, frechet_distance
from tokpost.perturbation import neighbour_table
from tokpost.pfid import (LATENT_PFID_TIMES, PFID_ALPHAS, _image_generators, _image_noise, _noisy_ranks, latent_pfid, pfid,
                          pfid_deltas, residual_pfid)
from tokpost.quantizer import VectorQuantizer
from tokpost.residual import ResidualQuantizer, level_ids

def rng(seed=0): return torch.Generator().manual_seed(seed)

class Residual:
    "Residual codes for 2x2 patches of 8-px images; counts its calls."
    def __init__(self, sides=(1, 2, 4), codebook_size=200):
        self.quantizer = ResidualQuantizer(VectorQuantizer(codebook_size, 12, normalize=False), list(sides))
        self.quantizer.quantizer.embedding.data = torch.randn(codebook_size, 12, generator=rng(1))*.5
        self.sides, self.codebook = list(sides), self.quantizer.codebook.detach()
        self.encoded = self.decoded = 0
        self.quantizer.requires_grad_(False)
    def encode(self, images):
        self.encoded += len(images)
        return self.quantizer.assign(F.pixel_unshuffle(images, 2))
    def decode(self, indices, levels=None):
        self.decoded += 1
        return F.pixel_shuffle(self.quantizer.lookup(indices, levels).transpose(1, 2).unflatten(2, (4, 4)), 2)

class Continuous(nn.Module):
    "An orthogonal map of 2x2 patches; counts its decodings."
    def __init__(self, scale=1.):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(12, 12, generator=rng(3)))[0])
        self.scale, self.decoded = scale, 0
        self.eval()
    def encode(self, images): return self.scale*torch.einsum('bchw,cd->bdhw', F.pixel_unshuffle(images, 2), self.weight)
    def decode(self, z):
        self.decoded += 1
        return F.pixel_shuffle(torch.einsum('bdhw,cd->bchw', z/self.scale, self.weight), 2)

@pytest.fixture
def images():
    smooth = F.interpolate(torch.rand(90, 3, 3, 3, generator=rng(2)), size=8, mode='bilinear')
    return to_images((smooth*255).byte())

@pytest.fixture
def network():
    torch.manual_seed(0)
    return FeatureNetwork(nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 'conv', 6)

def run(fn, tokenizer, images, network, batch_size=30, **settings):
    return fn(tokenizer, images.split(batch_size), network, **(dict(rfid=True, progress=False) | settings))

def distance(network, decoded, images):
    return frechet_distance(FrechetStatistics(6).update(network(to_images(to_pixels(decoded)))), FrechetStatistics(6).update(network(images)))

def test_residual_equals_the_straightforward_form(images, network):
    tokenizer, seed = Residual(), 7
    result = run(residual_pfid, tokenizer, images, network, seed=seed)
    indices, ids, deltas = tokenizer.encode(images), level_ids([1, 2, 4]), pfid_deltas(200)
    noise, table = _image_noise(images, 21, seed), neighbour_table(tokenizer.codebook, deltas[-1])
    expected = []
    for level, settings in [('all', [(a, d) for a in PFID_ALPHAS for d in deltas]), *((l, [(.7, deltas[1])]) for l in range(3))]:
        for alpha, delta in settings:
            new = table[indices, _noisy_ranks(noise, alpha, delta)]
            if level != 'all': new = torch.where(ids == level, new, indices)
            expected.append((level, 3, alpha, delta, distance(network, tokenizer.decode(new), images)))
    expected += [(None, k, 0., 1, distance(network, tokenizer.decode(indices, k), images)) for k in (1, 2)]
    assert [tuple(cell.values())[:4] for cell in result.cells] == [row[:4] for row in expected]
    np.testing.assert_allclose([cell['fd'] for cell in result.cells], [row[4] for row in expected], rtol=1e-4)
    assert result.residual_pfid == pytest.approx(np.mean([row[4] for row in expected[:15]]), rel=1e-4)
    assert result.rfid == pytest.approx(distance(network, tokenizer.decode(indices), images), rel=1e-4)
    assert (result.network, result.n, result.codebook_size, result.sides, result.seed) == ('conv', 90, 200, [1, 2, 4], 7)
    assert [set(row) for row in result.to_rows()] == [{'level', 'kept', 'alpha', 'delta', 'fd', 'codebook_size', 'n', 'network', 'seed'}]*20

def test_latent_equals_the_straightforward_form(images, network):
    tokenizer, seed = Continuous(), 5
    result = run(latent_pfid, tokenizer, images, network, seed=seed)
    z = tokenizer.encode(images)
    noise = torch.stack([torch.randn(12, 4, 4, generator=g) for g in _image_generators(images, seed)])
    with torch.no_grad(): expected = [distance(network, tokenizer.decode(((1-t)*z + t*noise)/(1-t)), images) for t in LATENT_PFID_TIMES]
    np.testing.assert_allclose([cell['fd'] for cell in result.cells], expected, rtol=1e-3)
    assert [(cell['t'], cell['tau']) for cell in result.cells] == [(t, t/(1-t)) for t in LATENT_PFID_TIMES]
    assert result.latent_pfid == pytest.approx(np.mean(expected), rel=1e-3) and (result.n, result.seed, result.latent_std) == (90, 5, 1.)
    assert all(set(row) == {'t', 'tau', 'fd', 'latent_std', 'n', 'network', 'seed'} for row in result.to_rows())

def test_one_level_is_pfid_to_the_last_digit(images, network):
    a = run(pfid, Residual([4]), images, network)
    b = run(residual_pfid, Residual([4]), images, network)
    assert (b.residual_pfid, b.rfid) == (a.pfid, a.rfid)
    assert [cell['fd'] for cell in b.cells[:15]] == [cell['fd'] for cell in a.cells]
    assert b.cells[15] == dict(b.cells[7], level=0) # the one level alone

@pytest.mark.parametrize('fn, make', [(residual_pfid, Residual), (latent_pfid, Continuous)])
@pytest.mark.parametrize('batch_size', [1, 7, 90])
def test_does_not_depend_on_batch_size_or_order(images, network, fn, make, batch_size):
    a = run(fn, make(), images, network)
    b = run(fn, make(), images[torch.randperm(90, generator=rng(3))], network, batch_size)
    np.testing.assert_allclose([c['fd'] for c in b.cells], [c['fd'] for c in a.cells], rtol=1e-5)
    assert b.rfid == pytest.approx(a.rfid, rel=1e-5) and b.n == a.n

@pytest.mark.parametrize('fn, make', [(residual_pfid, Residual), (latent_pfid, Continuous)])
def test_same_seed_same_result(images, network, fn, make):
    a, b, c = (run(fn, make(), images, network, seed=s) for s in (0, 0, 1))
    assert a == b and a.cells != c.cells and a.rfid == c.rfid

def test_truncation_gets_worse_with_every_level_left_out(images, network):
    result = run(residual_pfid, Residual(), images, network)
    short = [cell['fd'] for cell in result.cells if cell['level'] is None]
    assert len(short) == 2 and short[0] > short[1] > result.rfid

def test_noise_gets_worse_with_time_and_none_is_rfid(images, network):
    result = run(latent_pfid, Continuous(), images, network, times=(0., .05, .1, .2, .4))
    curve = [cell['fd'] for cell in result.cells]
    assert curve[0] == result.rfid and curve == sorted(curve) and curve[1] > curve[0]

def test_unit_of_the_latent(images, network):
    a = run(latent_pfid, Continuous(), images, network)
    b = run(latent_pfid, Continuous(.2), images, network, latent_std=.2)
    c = run(latent_pfid, Continuous(.2), images, network)
    np.testing.assert_allclose([cell['fd'] for cell in b.cells], [cell['fd'] for cell in a.cells], rtol=1e-2)
    assert c.latent_pfid > a.latent_pfid

def test_encodes_once_and_rows_can_be_left_out(images, network):
    for settings, ways in ((dict(), 21), (dict(rfid=False), 20), (dict(single=False, truncation=False), 16)):
        tokenizer = Residual(codebook_size=1024)
        run(residual_pfid, tokenizer, images, network, **settings)
        assert (tokenizer.encoded, tokenizer.decoded) == (90, 3*ways)
    tokenizer = Continuous()
    assert run(latent_pfid, tokenizer, images, network, rfid=False).rfid is None and tokenizer.decoded == 3*5

@pytest.mark.parametrize('fn, make', [(residual_pfid, Residual), (latent_pfid, Continuous)])
def test_known_reference(images, network, fn, make):
    a = run(fn, make(), images, network)
    b = run(fn, make(), images, network, reference=FrechetStatistics(6).update(network(images)))
    np.testing.assert_allclose([c['fd'] for c in b.cells], [c['fd'] for c in a.cells], rtol=1e-6)
    with pytest.raises(ValueError, match='reference must be of the same 90 images, got 60'):
        run(fn, make(), images, network, reference=FrechetStatistics(6).update(network(images[:60])))

def changed(tokenizer, **changes):
    for name, value in changes.items(): setattr(tokenizer, name, value)
    return tokenizer

class Plain:
    "Tokens without levels."
    codebook = torch.randn(20, 4)
    def encode(self, images): return torch.zeros(len(images), 16).long()
    def decode(self, indices): return torch.zeros(len(indices), 3, 8, 8)

@pytest.mark.parametrize('fn, tokenizer, message', [
    (pfid, Continuous(), 'Continuous has no codebook; continuous latents are for latent_pfid'),
    (residual_pfid, Continuous(), 'Continuous has no codebook, sides; continuous latents are for latent_pfid'),
    (residual_pfid, Plain(), 'Plain has no sides'),
    (latent_pfid, Residual(), 'Residual has a codebook; its tokens are for pfid or residual_pfid'),
    (latent_pfid, Plain(), 'Plain has a codebook'), (latent_pfid, nn.Linear(2, 2), 'Linear has no encode, decode'),
    (latent_pfid, Continuous().train(), 'call tokenizer.eval'),
    (latent_pfid, changed(Continuous(), encode=lambda images: torch.zeros(len(images), 4).long()), r'must return 30 finite latents, got \(30, 4\) torch.int64'),
    (latent_pfid, changed(Continuous(), encode=lambda images: torch.full((len(images), 4), float('nan'))), 'must return 30 finite latents'),
    (latent_pfid, changed(Continuous(), decode=lambda z: torch.full((len(z), 3, 8, 8), float('inf'))), 'decode must return finite images'),
    (residual_pfid, changed(Residual(), sides=[1, 4]), r'indices must be \(B, 17\), the tokens of levels \[1, 4\], got \(30, 21\)'),
    (residual_pfid, changed(Residual(), sides=[]), 'sides must be'),
    (residual_pfid, changed(Residual(), decode=lambda indices: torch.zeros(len(indices), 3, 8, 8)), 'decode must take levels')])
def test_wrong_kinds_are_told_where_they_belong(images, network, fn, tokenizer, message):
    with pytest.raises(ValueError, match=message): run(fn, tokenizer, images, network)

def test_without_truncation_decode_needs_no_levels(images, network):
    tokenizer = Residual()
    decode = tokenizer.decode
    result = run(residual_pfid, changed(tokenizer, decode=lambda indices: decode(indices)), images, network, truncation=False)
    assert result.residual_pfid == run(residual_pfid, Residual(), images, network).residual_pfid

@pytest.mark.parametrize('fn, make, settings, message', [
    (residual_pfid, Residual, dict(alphas=(1.5,)), r'alphas must be in \[0, 1\], got 1.5'), (residual_pfid, Residual, dict(deltas=(201,)), 'deltas must be integers'),
    (latent_pfid, Continuous, dict(times=(.5, 1.)), r'times must be in \[0, 1\), got 1.0'), (latent_pfid, Continuous, dict(times=(-.1,)), 'times must be'),
    (latent_pfid, Continuous, dict(times=()), 'times must not be empty'), (latent_pfid, Continuous, dict(latent_std=0.), 'latent_std must be above 0, got 0')])
def test_bad_settings_are_named(images, network, fn, make, settings, message):
    with pytest.raises(ValueError, match=message): run(fn, make(), images, network, **settings)

@pytest.mark.parametrize('fn, make', [(residual_pfid, Residual), (latent_pfid, Continuous)])
def test_too_few_images_are_refused(images, network, fn, make):
    with pytest.raises(ValueError, match='at least 2 images in all, got 1'): fn(make(), [images[:1]], network, progress=False)
