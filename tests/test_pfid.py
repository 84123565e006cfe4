"pFID against a straightforward form that keeps everything in memory; correlations against SciPy."
import json, os, subprocess, sys
from itertools import permutations
from pathlib import Path
import numpy as np, pytest, scipy.linalg, scipy.stats, torch, torch.nn as nn, torch.nn.functional as F
from tokpost.data import to_images, to_pixels
from tokpost.metrics import FeatureNetwork, FrechetStatistics
from tokpost.paper import paper_table
from tokpost.pfid import (PFID_ALPHAS, PFIDResult, _image_noise, _noisy_ranks, correlation,
                          correlation_gain, pfid, pfid_deltas)
from tokpost.perturbation import neighbour_table, replace_tokens

def rng(seed=0): return torch.Generator().manual_seed(seed)

class Tokenizer:
    "Random codes for 2x2 patches of 8-px images; counts its calls."
    def __init__(self, codebook_size=40, order=None):
        self.patches = torch.rand(codebook_size, 12, generator=rng(1))*2 - 1
        self.codebook = self.patches if order is None else self.patches[order]
        self.encoded = self.decoded = 0
    def encode(self, images):
        self.encoded += len(images)
        rows = F.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)                # (B, 16, 12)
        return torch.cdist(rows, self.patches.expand(len(rows), -1, -1)).argmin(-1)
    def decode(self, indices):
        self.decoded += 1
        return F.pixel_shuffle(self.patches[indices].transpose(1, 2).unflatten(2, (4, 4)), 2)

def make_images(): return to_images((torch.rand(90, 3, 8, 8, generator=rng(2))*255).byte())

def make_network():
    torch.manual_seed(0)
    return FeatureNetwork(nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 'conv', 6)

@pytest.fixture
def images(): return make_images()

@pytest.fixture
def network(): return make_network()

def run(tokenizer, images, network, batch_size=30, **settings):
    return pfid(tokenizer, images.split(batch_size), network, **(dict(rfid=True, progress=False) | settings))

@pytest.mark.parametrize('K, deltas', [(16384, (200, 280, 360)), (8192, (100, 140, 180)), (4096, (50, 70, 90)), (1024, (10, 15, 20)),
                                       (2**18, (3200, 4480, 5760)), (2048, (25, 35, 45)), (512, (6, 9, 11)), (64, (2, 2, 2)), (2, (2, 2, 2))])
def test_deltas(K, deltas): assert pfid_deltas(K) == deltas

def test_deltas_never_exceed_the_codebook():
    assert all(2 <= delta <= K for K in range(2, 3000) for delta in pfid_deltas(K))
    with pytest.raises(ValueError, match='codebook_size must be at least 2, got 1'): pfid_deltas(1)

def frechet(a, b):
    "In numpy, from all features, with SciPy's matrix root."
    a, b = a.double().numpy(), b.double().numpy()
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0)-b.mean(0))**2).sum() + np.trace(ca + cb - 2*scipy.linalg.sqrtm(ca @ cb).real)

@pytest.mark.parametrize('normalize', [False, True])
def test_equals_the_straightforward_form(images, network, normalize):
    tokenizer, deltas, seed = Tokenizer(), (2, 5, 9), 7
    result = run(tokenizer, images, network, deltas=deltas, seed=seed, normalize=normalize)
    indices, noise = tokenizer.encode(images), _image_noise(images, 16, seed)
    features = lambda indices: network(to_images(to_pixels(tokenizer.decode(indices))))
    expected = []
    for alpha in PFID_ALPHAS:
        for delta in deltas:
            ranks = _noisy_ranks(noise, alpha, delta)
            perturbed = replace_tokens(indices, ranks, tokenizer.codebook, normalize=normalize)
            expected.append(frechet(features(perturbed), network(images)))
    assert [(c['alpha'], c['delta']) for c in result.cells] == [(a, d) for a in PFID_ALPHAS for d in deltas]
    np.testing.assert_allclose([c['fd'] for c in result.cells], expected, rtol=1e-4)
    assert result.pfid == pytest.approx(np.mean(expected), rel=1e-4)
    assert result.rfid == pytest.approx(frechet(features(indices), network(images)), rel=1e-4)
    assert (result.network, result.n, result.codebook_size, result.seed) == ('conv', 90, 40, 7)

@pytest.mark.parametrize('alpha, delta', [(.9, 2), (.5, 20), (1., 7), (0., 5), (.6, 1)])
def test_noise_has_the_rates_of_the_perturbation(images, alpha, delta):
    ranks = _noisy_ranks(_image_noise(images, 500, seed=0), alpha, delta)
    low, high = (f(5e-7, ranks.numel(), alpha*(1-1/delta)) for f in (scipy.stats.binom.ppf, scipy.stats.binom.isf))
    assert low <= (ranks > 0).sum() <= high
    for count in ranks.flatten().bincount(minlength=delta)[1:]:
        low, high = (f(5e-7, ranks.numel(), alpha/delta) for f in (scipy.stats.binom.ppf, scipy.stats.binom.isf))
        assert low <= count <= high
    assert ranks.max() < delta

def test_images_differ_in_their_noise(images):
    noise = _image_noise(images, 16, seed=0)
    assert len(noise.flatten(1).unique(dim=0)) == len(images)
    assert not torch.equal(noise, _image_noise(images, 16, seed=1))

@pytest.mark.parametrize('batch_size', [1, 7, 90])
def test_does_not_depend_on_batch_size_or_order(images, network, batch_size):
    a = run(Tokenizer(), images, network)
    b = run(Tokenizer(), images[torch.randperm(90, generator=rng(3))], network, batch_size)
    np.testing.assert_allclose([c['fd'] for c in b.cells], [c['fd'] for c in a.cells], rtol=1e-6)
    assert b.rfid == pytest.approx(a.rfid, rel=1e-6) and b.n == a.n

def test_two_processes_give_the_result_of_one(images, network, tmp_path):
    script = tmp_path/'ranks.py'
    script.write_text(f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_pfid import Tokenizer, make_images, make_network, pfid
from tokpost.run import Processes
here = Processes('fp32')
batches = make_images().split(20)[here.rank::here.world] # ranks hold 50 and 40 images
result = pfid(Tokenizer(), batches, make_network(), rfid=True, progress=False)
if here.is_main: json.dump([here.world, result.n, result.rfid, [c['fd'] for c in result.cells]], open({str(tmp_path/'out.json')!r}, 'w'))
""")
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script)]
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(Path(__file__).parents[1]))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    world, n, rfid, cells = json.loads((tmp_path/'out.json').read_text())
    alone = run(Tokenizer(), images, network)
    assert (world, n) == (2, 90)
    np.testing.assert_allclose([rfid, *cells], [alone.rfid, *(c['fd'] for c in alone.cells)], rtol=1e-6)

def test_same_seed_same_result(images, network):
    a, b, c = (run(Tokenizer(), images, network, seed=s) for s in (0, 0, 1))
    assert a == b and a.pfid != c.pfid and a.rfid == c.rfid

def test_no_perturbation_is_rfid(images, network):
    result = run(Tokenizer(), images, network, alphas=(0.,), deltas=(5,))
    assert result.pfid == result.rfid
    result = run(Tokenizer(), images, network, alphas=(1.,), deltas=(1,))
    assert result.pfid == result.rfid
    small = run(Tokenizer(), images, network, alphas=(.01, .1, .9), deltas=(20,))
    distances = [abs(cell['fd']-small.rfid) for cell in small.cells]
    assert distances == sorted(distances)

def test_grows_with_rate_and_strength(images, network):
    class Exact(Tokenizer): # four grey levels, code = level: every step away is seen
        codebook = torch.linspace(-1, 1, 64)[:, None]
        def __init__(self): pass
        def encode(self, images): return ((images[:, 0, ::2, ::2]+1)/2*63).round().long().flatten(1)
        def decode(self, indices): return self.codebook[indices].view(-1, 1, 4, 4).expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    flat = images[:, :1, ::2, ::2].expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3)*.3 - .7
    result = run(Exact(), flat, network, alphas=(.2, .4, .6, .8, 1.), deltas=(8, 24, 64))
    cells = np.array([c['fd'] for c in result.cells]).reshape(5, 3)
    assert (np.diff(cells, axis=0) > 0).all() and (np.diff(cells, axis=1) > 0).all()
    assert result.rfid < cells.min()

def test_codebook_geometry_counts(images, network):
    order = torch.randperm(40, generator=rng(4))
    a, b = run(Tokenizer(), images, network), run(Tokenizer(order=order), images, network)
    assert a.rfid == b.rfid and a.pfid != b.pfid

@pytest.mark.parametrize('rfid, decodes', [(True, 16), (False, 15)])
def test_encodes_once_and_decodes_fifteen_times(images, network, rfid, decodes):
    seen, tokenizer = [], Tokenizer(1024)
    class Once:
        def __iter__(self):
            assert not seen
            for batch in images.split(30): seen.append(len(batch)); yield batch, torch.zeros(len(batch))
    result = pfid(tokenizer, Once(), network, rfid=rfid, progress=False)
    assert tokenizer.encoded == 90 and tokenizer.decoded == 3*decodes and sum(seen) == 90
    assert (result.rfid is not None) == rfid

def test_equal_settings_are_decoded_once(images, network):
    tokenizer = Tokenizer(40)
    result = run(tokenizer, images, network, rfid=False) # all three strengths are 2
    assert tokenizer.decoded == 3*5 and len(result.cells) == 15

def test_known_reference(images, network):
    reference = FrechetStatistics(6).update(network(images))
    a, b = run(Tokenizer(), images, network), run(Tokenizer(), images, network, reference=reference)
    np.testing.assert_allclose([c['fd'] for c in b.cells], [c['fd'] for c in a.cells], rtol=1e-6)
    with pytest.raises(ValueError, match='reference must be of the same 90 images, got 60'):
        run(Tokenizer(), images, network, reference=FrechetStatistics(6).update(network(images[:60])))

def test_rows(images, network):
    rows = run(Tokenizer(), images, network).to_rows()
    assert len(rows) == 15
    assert all(set(row) == {'alpha', 'delta', 'fd', 'codebook_size', 'n', 'network', 'seed'} for row in rows)

def broken(**changes):
    tokenizer = Tokenizer()
    for name, value in changes.items(): setattr(tokenizer, name, value)
    return tokenizer

@pytest.mark.parametrize('tokenizer, message', [
    (nn.Linear(2, 2), 'Linear has no encode, decode, codebook'), (broken(codebook=nn.Embedding(4, 2)), r'codebook must be a \(K, D\) tensor, got Embedding'),
    (broken(codebook=torch.zeros(4)), r'codebook must be a \(K, D\) tensor, got'), (broken(training=True), 'call tokenizer.eval'),
    (broken(encode=lambda images: torch.full((len(images), 16), 40)), r'indices must be in \[0, 40\), got \[40, 40\]'),
    (broken(encode=lambda images: torch.full((len(images), 16), -1)), r'indices must be in \[0, 40\), got \[-1, -1\]'),
    (broken(encode=lambda images: torch.zeros(len(images), 4, 4).long()), r'encode must return \(30, N\) integers, got \(30, 4, 4\)'),
    (broken(encode=lambda images: torch.zeros(len(images), 16)), r'encode must return \(30, N\) integers'),
    (broken(decode=lambda indices: torch.full((len(indices), 3, 8, 8), float('nan'))), 'decode must return finite images')])
def test_bad_tokenizers_are_named(images, network, tokenizer, message):
    with pytest.raises(ValueError, match=message): run(tokenizer, images, network)

@pytest.mark.parametrize('settings, message', [
    (dict(alphas=(.5, 1.5)), r'alphas must be in \[0, 1\], got 1.5'), (dict(deltas=(41,)), r'deltas must be integers in \[1, 40\], got 41'),
    (dict(deltas=(0,)), 'deltas must be integers'), (dict(deltas=(2.5,)), 'deltas must be integers'), (dict(alphas=()), 'must not be empty')])
def test_bad_settings_are_named(images, network, settings, message):
    with pytest.raises(ValueError, match=message): run(Tokenizer(), images, network, **settings)

@pytest.mark.parametrize('count', [0, 1])
def test_too_few_images_are_refused(images, network, count):
    with pytest.raises(ValueError, match=f'at least 2 images in all, got {count}'):
        pfid(Tokenizer(), [images[:count]]*(count > 0), network, progress=False)

def test_images_out_of_range_are_refused(images, network):
    with pytest.raises(ValueError, match=r'\[-1, 1\]'): run(Tokenizer(), images*255, network)

@pytest.fixture
def columns():
    draw = np.random.default_rng(0)
    y = draw.standard_normal(11)
    return y + .5*draw.standard_normal(11), y + 2*draw.standard_normal(11), y

def test_correlation_equals_scipy(columns):
    x, _, y = columns
    rows = {row['coefficient']: row for row in correlation(x, y)}
    assert rows['Pearson']['value'] == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert rows['Spearman']['value'] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    theirs = scipy.stats.pearsonr(x, y).confidence_interval()
    assert rows['Pearson']['low'] == pytest.approx(theirs.low, abs=.2)
    assert rows['Pearson']['high'] == pytest.approx(theirs.high, abs=.1)
    for row in rows.values(): assert -1 <= row['low'] < row['value'] < row['high'] <= 1 and row['n'] == 11

def test_permutation_p_is_exact_for_few(columns):
    x, _, y = (c[:6] for c in columns)
    value, every = np.corrcoef(x, y)[0, 1], np.array([np.corrcoef(p, y)[0, 1] for p in permutations(x)])
    one_sided = min((every >= value - 1e-12).mean(), (every <= value + 1e-12).mean())
    assert correlation(x, y)[0]['p'] == pytest.approx(min(1, 2*one_sided))

def test_gain_is_antisymmetric(columns):
    a, b, y = columns
    one, other = correlation_gain(a, b, y)[0], correlation_gain(b, a, y)[0]
    assert one['value'] == pytest.approx(np.corrcoef(a, y)[0, 1] - np.corrcoef(b, y)[0, 1])
    assert (one['value'], one['low'], one['high']) == pytest.approx((-other['value'], -other['high'], -other['low']))

def test_intervals_cover():
    draw, inside = np.random.default_rng(1), 0
    for _ in range(100):
        x, noise = draw.standard_normal((2, 12))
        row = correlation_gain(x, noise, .7*x + .51**.5*draw.standard_normal(12), resamples=400)[0]
        inside += row['low'] <= .7 <= row['high']
    assert inside >= scipy.stats.binom.ppf(1e-4, 100, .9)

def test_complete_agreement_of_ranks_has_no_interval():
    row = correlation(range(6), [0, 1, 4, 9, 16, 25])[1]
    assert row['value'] == 1 and np.isnan(row['low']) and row['p'] == pytest.approx(2/720)

def test_within_groups_is_the_correlation_of_deviations(columns):
    x, baseline, y = columns
    groups = np.array(list('aaaabbbbccc'))
    def apart(column): return column - np.array([column[groups == group].mean() for group in groups])
    rows = {row['coefficient']: row for row in correlation(x, y, groups=groups)}
    assert rows['Pearson']['value'] == pytest.approx(scipy.stats.pearsonr(apart(x), apart(y)).statistic)
    assert rows['Spearman']['value'] == pytest.approx(scipy.stats.spearmanr(apart(x), apart(y)).statistic)
    shift = np.array([dict(a=0., b=5., c=-9.)[group] for group in groups])
    moved = correlation(x + shift, y - shift, groups=groups)[0]
    assert [moved[key] for key in ('value', 'low', 'high', 'p')] == pytest.approx([rows['Pearson'][key] for key in ("value", "low", "high", "p")], rel=1e-4)
    gain = correlation_gain(x, baseline, y, groups=groups)[0]
    assert gain['value'] == pytest.approx(rows['Pearson']['value'] - correlation(baseline, y, groups=groups)[0]['value'])

def test_interval_within_groups_covers():
    draw, inside, groups = np.random.default_rng(2), 0, np.repeat([0, 1, 2], 7)
    for _ in range(100):
        x = draw.standard_normal(21)
        y, far = .7*x + .51**.5*draw.standard_normal(21), 10*groups
        row = correlation(x + far, y - far, resamples=400, groups=groups)[0]
        inside += row['low'] <= .7 <= row['high']
    assert inside >= scipy.stats.binom.ppf(1e-4, 100, .9)

@pytest.mark.parametrize('groups', [[1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6], [1, 1, 1]])
def test_groups_that_say_nothing_are_named(columns, groups):
    with pytest.raises(ValueError, match='groups must name one group for each of 11 tokenizers, 3 in some group'):
        correlation(columns[0], columns[2], groups=groups)

@pytest.mark.parametrize('n', [4, 5])
def test_few_points_still_have_an_interval(n):
    x, y = np.array([0., 1, 2, 3, 4])[:n], np.array([0., 2, 1, 4, 3])[:n]
    assert all(np.isfinite([row['low'], row['high']]).all() for row in correlation(x, y))

@pytest.mark.parametrize('x, y, message', [([1, 2, 3], [1, 2, 3], 'at least 4'), ([1, 2, 3, 4], [1, 2, 3], 'equally many'),
                                           ([1, 1, 1, 1], [1, 2, 3, 4], 'x must vary'), ([1, 2, 3, np.nan], [1, 2, 3, 4], 'x must be finite')])
def test_bad_columns_are_named(x, y, message):
    with pytest.raises(ValueError, match=message): correlation(x, y)

def test_benchmark_of_the_paper():
    "The data file is complete, and its correlations are those computed from another transcript of the tables."
    rows = paper_table('robustok_benchmark').to_dict('records')
    assert len(rows) == 11*6 and sum(row['flag'] != '' for row in rows) == 6
    value = {(row['row'], row['metric'], row['generator']): row['value'] for row in rows}
    assert len(value) == 66
    names = sorted({row['row'] for row in rows})
    column = lambda metric, generator='': [value[name, metric, generator] for name in names]
    for metric, generator, rfid, pfid_ in (('gfid', 'LlamaGen-B', .628, .680), ('gfid_cfg', 'LlamaGen-B', .662, .756),
                                          ('gfid', 'LlamaGen-L', .445, .556), ('gfid_cfg', 'LlamaGen-L', .636, .783)):
        found = [np.corrcoef(column(m), column(metric, generator))[0, 1] for m in ('rfid', 'pfid')]
        assert found == pytest.approx([rfid, pfid_], abs=6e-4)
