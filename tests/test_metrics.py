"Metrics against independent references: scipy, torch-fidelity, explicit loops and closed forms."
import math, os, urllib.error
from pathlib import Path
import numpy as np, pytest, scipy.linalg, torch, torch_fidelity
from sklearn.datasets import load_digits
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from tokpost.metrics import *

def generator(seed=0): return torch.Generator().manual_seed(seed)

def features_of(n, dim, seed=0, spread=2.):
    "Correlated features whose deviations span `spread` orders of magnitude."
    mixing = torch.eye(dim).double() + .3*torch.randn(dim, dim, generator=generator(7)).double()/dim**.5
    deviations = torch.logspace(0, -spread, dim).double()
    return torch.randn(n, dim, generator=generator(seed)).double() @ mixing * deviations + .1*seed

def gather(features, batch_size=1000):
    statistics = FrechetStatistics(features.shape[1])
    for batch in features.split(batch_size): statistics.update(batch)
    return statistics

def fidelity_fid(a, b):
    statistics = (fid_features_to_statistics(x) for x in (a, b))
    return fid_statistics_to_metric(*statistics, verbose=False)['frechet_inception_distance']

def relative(a, b): return ((a-b).abs().max()/b.abs().max()).item()

def random_images(n, size=16, seed=0):
    "Images of eight bits, in [-1, 1]."
    return torch.randint(256, (n, 3, size, size), generator=generator(seed))/127.5 - 1

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Work this small is slower on several."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture(scope='module')
def digits():
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    x = torch.tensor(data.images[order], dtype=torch.float32)[:, None]/8 - 1
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat(1, 3, 1, 1), torch.tensor(data.target[order])

@pytest.fixture(scope='module')
def classifier(digits): return train_classifier(digits[0][:800], digits[1][:800], 10, epochs=4, width=16)

# Statistics

@pytest.mark.parametrize('batch_size', [1, 2, 7, 64, 500])
def test_statistics_are_those_of_numpy_whatever_the_batch(batch_size):
    x = features_of(500, 24) + 1000. # far from 0, where raw sums of squares lose their digits
    statistics = gather(x, batch_size)
    assert statistics.count == 500
    assert relative(statistics.mean, torch.tensor(np.mean(x.numpy(), 0))) < 1e-12
    assert relative(statistics.covariance, torch.tensor(np.cov(x.numpy(), rowvar=False))) < 1e-10

def test_merging_in_any_order_equals_one_stream():
    x = features_of(600, 16)
    whole, parts = gather(x), x.split([1, 99, 200, 300])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        merged = FrechetStatistics(16)
        for i in order: merged.merge(gather(parts[i], 50))
        assert merged.count == 600
        assert relative(merged.mean, whole.mean) < 1e-10
        assert relative(merged.covariance, whole.covariance) < 1e-10

def test_two_half_streams_and_their_states():
    x = features_of(400, 16)
    even, odd = gather(x[::2]), gather(x[1::2])
    tensors = {name: value.clone() for name, value in odd.state().items()}
    merged = FrechetStatistics.from_state(even.state()).merge(FrechetStatistics.from_state(tensors))
    assert relative(merged.covariance, gather(x).covariance) < 1e-10
    for name, value in odd.state().items(): assert torch.equal(value, tensors[name]) # merge leaves `other`
    assert even.count == 200

def test_empty_statistics_and_batches_change_nothing():
    full = gather(features_of(50, 8))
    before = full.covariance
    full.merge(FrechetStatistics(8)).update(torch.zeros(0, 8))
    assert torch.equal(full.covariance, before) and full.count == 50
    assert FrechetStatistics(8).merge(FrechetStatistics(8)).count == 0

def test_statistics_refuse():
    statistics = FrechetStatistics(8)
    with pytest.raises(ValueError, match=r'features must be \(B, 8\), got \(4, 9\)'): statistics.update(torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r'got \(8,\)'): statistics.update(torch.zeros(8))
    with pytest.raises(ValueError, match='finite'): statistics.update(torch.full((2, 8), math.nan))
    assert statistics.count == 0
    with pytest.raises(ValueError, match='at least 2 samples, got 0'): statistics.covariance
    with pytest.raises(ValueError, match='at least 2 samples, got 1'):
        frechet_distance(gather(torch.zeros(9, 8)), gather(torch.zeros(1, 8)))
    with pytest.raises(ValueError, match='dim must be 8, got 9'): statistics.merge(FrechetStatistics(9))
    with pytest.raises(ValueError, match='same dim, got 8 and 9'): frechet_distance(statistics, FrechetStatistics(9))
    with pytest.raises(ValueError, match='dim must be at least 1, got 0'): FrechetStatistics(0)
    with pytest.raises(ValueError, match='state must hold'):
        FrechetStatistics.from_state(statistics.state() | {'mean': torch.zeros(3)})

# Fréchet distance

@pytest.mark.parametrize('n, dim, spread', [(400, 8, 0.), (2000, 64, 2.), (1500, 256, 4.)])
def test_frechet_distance_is_torch_fidelitys(n, dim, spread):
    a, b = features_of(n, dim, 0, spread), features_of(n + 100, dim, 1, spread)**2
    theirs = fidelity_fid(a, b)
    assert frechet_distance(gather(a), gather(b)) == pytest.approx(theirs, rel=1e-6)
    assert frechet_distance(gather(b), gather(a)) == pytest.approx(theirs, rel=1e-6)

def test_frechet_distance_is_scipys():
    a, b = features_of(2000, 32), features_of(2000, 32, 1)**2
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0)-b.mean(0))**2).sum().item() + np.trace(cov_a + cov_b - 2*root)
    assert frechet_distance(gather(a), gather(b)) == pytest.approx(expected, rel=1e-8)

@pytest.mark.parametrize('n_a, n_b', [(40, 60), (40, 1000), (1000, 40), (2, 3)])
def test_fewer_samples_than_features(n_a, n_b):
    a, b = features_of(n_a, 128), features_of(n_b, 128, 1)
    ours = frechet_distance(gather(a), gather(b))
    # the trace is also the nuclear norm of the centred samples' product, whose size is n_a by n_b
    centred = [(x-x.mean(0))/(len(x)-1)**.5 for x in (a, b)]
    nuclear = np.linalg.norm((centred[0] @ centred[1].T).numpy(), 'nuc')
    expected = ((a.mean(0)-b.mean(0))**2).sum() + sum(x.square().sum() for x in centred) - 2*nuclear
    assert ours == pytest.approx(expected.item(), rel=1e-9)
    assert ours == pytest.approx(fidelity_fid(a, b), rel=1e-6)
    assert 0 <= frechet_distance(gather(a), gather(a)) < 1e-9

def test_constant_features_have_distance_of_means():
    a, b = FrechetStatistics(3).update(torch.zeros(5, 3)), FrechetStatistics(3).update(torch.full((5, 3), 2.))
    assert frechet_distance(a, b) == 12.

# Images

@pytest.mark.parametrize('bad, message', [
    (torch.zeros(2, 1, 8, 8), r'got torch.float32 of shape \(2, 1, 8, 8\)'),
    (torch.zeros(3, 8, 8), r'shape \(3, 8, 8\)'),
    (torch.zeros(0, 3, 8, 8), r'B >= 1'),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 'torch.uint8'),
    (torch.full((2, 3, 8, 8), 1.5), r'must lie in \[-1, 1\], got values from 1.5 to 1.5'),
    (torch.full((2, 3, 8, 8), math.nan), r'must lie in \[-1, 1\], got values from nan')])
def test_bad_images_are_refused(bad, message, classifier):
    network = ClassifierFeatures(classifier, 'test')
    for use in (network, to_uint8, lambda x: psnr(x, x), lambda x: ssim(x, x),
                lambda x: fidelity_metrics(x, x, network)):
        with pytest.raises(ValueError, match=message): use(bad)

def test_to_uint8_is_the_stated_formula():
    x = torch.linspace(-1, 1, 3*40*40).reshape(1, 3, 40, 40)
    expected = [min(max(math.floor(127.5*v + 128), 0), 255) for v in x.double().flatten().tolist()]
    assert (to_uint8(x).flatten().int() - torch.tensor(expected)).abs().max() <= 1 # float32 at the borders
    assert (to_uint8(x).flatten().int() == torch.tensor(expected)).float().mean() > .999

# Feature networks

def test_fingerprint_follows_the_weights(classifier):
    first, again = ClassifierFeatures(classifier, 'a'), ClassifierFeatures(classifier, 'b')
    assert first.fingerprint == again.fingerprint
    with torch.no_grad(): again.network.stem[0][0].weight[0, 0, 0, 0] += 1e-3
    assert ClassifierFeatures(again.network, 'a').fingerprint != first.fingerprint
    assert ClassifierFeatures(classifier, 'a').fingerprint == first.fingerprint # it had copied

def test_features_are_float32_without_gradient_and_ignore_autocast(classifier, digits):
    network, x = ClassifierFeatures(classifier, 'test'), digits[0][:8]
    plain = network(x)
    with torch.autocast('cpu', torch.bfloat16): mixed = network(x.clone().requires_grad_())
    assert torch.equal(plain, mixed) and mixed.dtype == torch.float32 and not mixed.requires_grad
    assert torch.equal(network(x.bfloat16().float()), network(x.bfloat16()))

def test_network_of_another_dim_is_refused():
    network = FeatureNetwork(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 'mean', dim=4)
    with pytest.raises(ValueError, match=r'features of mean must be \(2, 4\), got \(2, 3\)'): network(random_images(2))

def test_missing_and_unknown_networks(tmp_path):
    with pytest.raises(FileNotFoundError, match='Put there a TorchScript file'): load_feature_network(tmp_path/'features.pt')
    with pytest.raises(ValueError, match="must be 'inception' or the path of a"): load_feature_network('resnet')

@pytest.mark.filterwarnings('ignore:`torch.jit')
def test_torchscript_file(tmp_path, monkeypatch):
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    (tmp_path/'small-net').mkdir()
    torch.jit.script(module).save(tmp_path/'small-net'/'features.pt') # saved in training mode
    monkeypatch.setenv('SOMEWHERE', str(tmp_path))
    network, x = load_feature_network('$SOMEWHERE/small-net/features.pt'), random_images(4)
    assert (network.name, network.dim, network.head) == ('small-net', 5, None)
    torch.testing.assert_close(network(x), module.eval()(x).detach())

@pytest.mark.skipif('TOKPOST_DATA' not in os.environ, reason='TOKPOST_DATA, the folder with mobilenet-v2, is not set')
def test_mobilenet_features():
    network = load_feature_network('$TOKPOST_DATA/mobilenet-v2/features.pt')
    assert (network.name, network.dim) == ('mobilenet-v2', 1280)
    x = random_images(2, size=64)
    features = network(x)
    assert features.shape == (2, 1280) and features.dtype == torch.float32
    torch.testing.assert_close(network(x[:1]), features[:1], rtol=1e-3, atol=1e-4)
    assert features.std(0).max() > 0

@pytest.fixture
def offline(tmp_path, monkeypatch):
    "An empty cache, and a download that fails as it does without a connection."
    def fail(url, *args, **kwargs):
        raise urllib.error.URLError(OSError(-2, 'Name or service not known'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    monkeypatch.setattr(torch.hub, 'urlopen', fail)
    return tmp_path

def test_offline_inception_says_what_to_fetch(offline):
    with pytest.raises(FileNotFoundError) as error: load_feature_network('inception')
    url = ('https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/'
           'weights-inception-2015-12-05-6726825d.pth')
    path = offline/'hub'/'checkpoints'/'weights-inception-2015-12-05-6726825d.pth'
    assert f'Fetch {url} where there is a connection and save it as {path}' in str(error.value)
    assert 'Name or service not known' in str(error.value)
    assert not path.exists()

def test_damaged_inception_says_what_to_fetch(offline):
    path = offline/'hub'/'checkpoints'/'weights-inception-2015-12-05-6726825d.pth'
    path.parent.mkdir(parents=True)
    path.write_bytes(b'half a file')
    with pytest.raises(FileNotFoundError, match='cannot download or read the weights of inception'):
        load_feature_network('inception')

@pytest.mark.parametrize('net, file', [('vgg', 'vgg16-397923af.pth'), ('alex', 'alexnet-owt-7be5be79.pth'),
                                       ('squeeze', 'squeezenet1_1-b8a52dc0.pth')])
def test_offline_lpips_says_what_to_fetch(net, file, offline):
    with pytest.raises(FileNotFoundError) as error: load_lpips(net)
    assert f'https://download.pytorch.org/models/{file}' in str(error.value)
    assert str(offline/'hub'/'checkpoints'/file) in str(error.value)

def test_inception_sees_what_torch_fidelity_sees(monkeypatch):
    "With random weights, since the real ones need a download: resizing, eight bits, layer and logits."
    monkeypatch.setattr('torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url', lambda *a, **k: {})
    monkeypatch.setattr(FeatureExtractorInceptionV3, 'load_state_dict', lambda self, state: None)
    network, x = load_feature_network('inception'), random_images(1, size=32)
    assert (network.name, network.dim) == ('inception', 2048)
    network.network.features_list = ['2048', 'logits_unbiased']
    pooled, logits = network.network((x*127.5 + 127.5).round().to(torch.uint8))
    network.network.features_list = ['2048']
    features = network(x)
    assert torch.equal(features, pooled) and features.std() > 0
    torch.testing.assert_close(network.head(features), logits)

# The classifier

def test_classifier_learns_digits(classifier, digits):
    x, y = digits
    assert (classifier(x[1400:]).argmax(1) == y[1400:]).float().mean() > .9
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())

def test_training_is_a_function_of_the_seed(digits):
    x, y = digits[0][:128], digits[1][:128]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = train_classifier(x, y, 10, seed=3, epochs=1, width=8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (train_classifier(x, y, 10, seed=seed, epochs=1, width=8) for seed in (3, 4))
    weights = lambda model: torch.cat([p.flatten() for p in model.state_dict().values()])
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))

def test_uint8_images_train_as_their_floats(digits):
    x, y = to_uint8(digits[0][:128]), digits[1][:128]
    a, b = (train_classifier(images, y, 10, epochs=1, width=8) for images in (x, x/127.5 - 1))
    torch.testing.assert_close(a.head.weight, b.head.weight)

def test_labels_are_checked(digits):
    x, y = digits
    with pytest.raises(ValueError, match=r'labels must be in \[0, 5\)'): train_classifier(x[:64], y[:64], 5)
    with pytest.raises(ValueError, match='got 63 for 64'): train_classifier(x[:64], y[:63], 10)

@pytest.mark.parametrize('size', [8, 28, 33])
def test_classifier_takes_sizes(size):
    model = Classifier(4, width=8).eval()
    assert [m.shape[1] for m in model.feature_maps(random_images(2, size))] == [8, 8, 16, 32]
    assert model.features(random_images(2, size)).shape == (2, 32) and model(random_images(2, size)).shape == (2, 4)

# Pairs

def test_psnr_is_its_formula(digits):
    x = digits[0][:6]
    y = (x + .3*torch.randn(x.shape, generator=generator())).clamp(-1, 1)
    for i, value in enumerate(psnr(y, x).tolist()):
        mse = ((x[i].double() - y[i].double())/2).square().mean().item()
        assert value == pytest.approx(-10*math.log10(mse), abs=1e-3)
    assert torch.isinf(psnr(x, x)).all()

def test_ssim_is_its_formula_on_constant_images():
    a, b = torch.full((2, 3, 16, 16), -.5), torch.full((2, 3, 16, 16), .2)
    x, y, c = .25, .6, .01**2
    torch.testing.assert_close(ssim(a, b), torch.full((2,), (2*x*y + c)/(x*x + y*y + c)), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r'at least 6 px, got \(5, 16\)'): ssim(a[..., :5, :], b[..., :5, :])
    with pytest.raises(ValueError, match='reference must have the shape of images'): ssim(a, b[:1])

def test_ssim_is_its_formula_on_windows(digits):
    x = digits[0][:1]
    y = (x + .3*torch.randn(x.shape, generator=generator())).clamp(-1, 1)
    bell = np.exp(-.5*(np.arange(-5, 6)/1.5)**2)
    window, values = np.outer(bell, bell)/bell.sum()**2, []
    for a, b in zip((x[0].double().numpy()+1)/2, (y[0].double().numpy()+1)/2):  # one channel
        a, b = (np.pad(z, 5, mode='reflect') for z in (a, b))
        for i, j in np.ndindex(16, 16):
            p, q = a[i:i+11, j:j+11], b[i:i+11, j:j+11]
            mp, mq = (window*p).sum(), (window*q).sum()
            vp, vq, vpq = (window*p*p).sum()-mp**2, (window*q*q).sum()-mq**2, (window*p*q).sum()-mp*mq
            values.append((2*mp*mq + 1e-4)*(2*vpq + 9e-4)/((mp**2 + mq**2 + 1e-4)*(vp + vq + 9e-4)))
    assert ssim(y, x).shape == (1,)
    assert ssim(y, x).item() == pytest.approx(np.mean(values), abs=1e-4)

def test_perceptual_distance_is_its_formula(classifier, digits):
    distance, a, b = PerceptualDistance(classifier), digits[0][:2], digits[0][2:4]
    expected = []
    for i in range(2):
        total = 0.
        for p, q in zip(classifier.feature_maps(a[i:i+1]), classifier.feature_maps(b[i:i+1])):
            cells = [(r, c) for r in range(p.shape[2]) for c in range(p.shape[3])]
            for r, c in cells:
                u, v = p[0, :, r, c], q[0, :, r, c]
                total += ((u/u.norm().clamp(min=1e-6) - v/v.norm().clamp(min=1e-6))**2).sum().item()/len(cells)
        expected.append(total)
    assert distance(a, b).tolist() == pytest.approx(expected, rel=1e-3)
    assert distance(a, b).tolist() == pytest.approx(distance(b, a).tolist())

def test_perceptual_distance_trains_images_only(classifier, digits):
    distance, target = PerceptualDistance(classifier), digits[0][:8]
    holder = nn.Sequential(distance).train()
    assert not distance.training and not distance.classifier.training and holder.training
    before = {name: value.clone() for name, value in distance.state_dict().items()}
    x = (target + .5*torch.randn(target.shape, generator=generator())).requires_grad_()
    distance(x, target).sum().backward()
    assert x.grad.isfinite().all() and (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None for p in distance.parameters())
    assert all(torch.equal(value, before[name]) for name, value in distance.state_dict().items())
    assert (distance(target, target) == 0).all() and (distance(x, target) > 0).all()
    flat = torch.full((1, 3, 16, 16), -1., requires_grad=True)
    distance(flat, target[:1]).sum().backward()
    assert flat.grad.isfinite().all()
    with pytest.raises(ValueError, match='reference must have the shape of images'): distance(target, target[:1])

def test_lpips_is_frozen_and_per_image():
    distance, x = load_lpips('squeeze', pretrained=False).train(), random_images(2, 32).requires_grad_()
    values = distance(x, random_images(2, 32, seed=1))
    values.sum().backward()
    assert values.shape == (2,) and (values > 0).all() and x.grad.abs().sum() > 0
    assert not distance.network.training and all(p.grad is None for p in distance.parameters())

# Crowds

class UnsignedImages(torch.utils.data.Dataset):
    def __init__(self, images): self.images = to_uint8(images)
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.images[i]

def test_fidelity_metrics_are_torch_fidelitys(classifier):
    "Their whole pipeline, with the classifier registered as one of their extractors."
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    class Extractor(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.classifier = classifier
        @staticmethod
        def get_provided_features_list(): return 'pooled', 'logits'
        @staticmethod
        def get_default_feature_layer_for_metric(metric): return 'logits' if metric == 'isc' else 'pooled'
        @staticmethod
        def can_be_compiled(): return False
        def forward(self, x):
            pooled = self.classifier.features(x/127.5 - 1)
            return tuple(dict(pooled=pooled, logits=self.classifier.head(pooled))[f] for f in self.features_list)
    torch_fidelity.register_feature_extractor('tokpost-test', Extractor)
    # smooth random images, so that both crowds overlap only in part
    smooth = lambda n, seed: nn.functional.interpolate(random_images(n, 4, seed), size=16)
    a, b = smooth(60, 0), to_uint8(smooth(80, 1)*.8)/127.5 - 1
    theirs = torch_fidelity.calculate_metrics(
        input1=UnsignedImages(a), input2=UnsignedImages(b), feature_extractor='tokpost-test', cuda=False,
        isc=True, fid=True, kid=True, prc=True, kid_subset_size=60, save_cpu_ram=True, verbose=False, cache=False)
    ours = fidelity_metrics(a, b.split(30), ClassifierFeatures(classifier, 'test'))
    assert (ours['network'], ours['n_samples'], ours['n_reference']) == ('test', 60, 80)
    # theirs keeps float32 statistics of float32 features
    assert ours['frechet_distance'] == pytest.approx(theirs['frechet_inception_distance'], rel=1e-3)
    features = [extract_features(x, ClassifierFeatures(classifier, 'test')) for x in (a, b)]
    assert ours['frechet_distance'] == pytest.approx(fidelity_fid(*(x.double() for x in features)), rel=1e-6)
    assert ours['inception_score'] == pytest.approx(theirs['inception_score_mean'], rel=1e-5)
    assert ours['kernel_distance'] == pytest.approx(theirs['kernel_inception_distance_mean'], rel=1e-3)
    assert ours['precision'] == pytest.approx(theirs['precision'], abs=.01)
    assert ours['recall'] == pytest.approx(theirs['recall'], abs=.01)
    assert 0 < ours['precision'] < 1 or 0 < ours['recall'] < 1

def test_fidelity_metrics_of_few_images_and_of_a_network_without_logits(classifier):
    network = FeatureNetwork(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), 'thumbnail', dim=12)
    assert 'inception_score' not in fidelity_metrics(random_images(12), random_images(15, seed=1), network)
    with pytest.raises(ValueError, match='at least 10, got 9 and 15'):
        fidelity_metrics(random_images(9), random_images(15), network)
    with pytest.raises(ValueError, match='at least one batch'): extract_features(iter([]), network)

def linear_network(dim=12, classes=7):
    weight = 2*torch.randn(dim, classes, generator=generator(5))
    return FeatureNetwork(nn.Flatten(), 'linear', dim, head=lambda x: x.float() @ weight)

@pytest.mark.parametrize('n, part_size', [(600, 100), (600, 600), (600, None), (640, 64)])
def test_inception_score_is_torch_fidelitys(n, part_size):
    from torch_fidelity.metric_isc import isc_features_to_metric
    network, x = linear_network(), torch.randn(n, 12, generator=generator())
    theirs = isc_features_to_metric(network.head(x), splits=n//(part_size or n), shuffle=False)['inception_score_mean']
    for batch_size in (7, 64, 1000):
        assert inception_score(x, network, part_size, batch_size) == pytest.approx(theirs, rel=1e-6) # float32 logits

def test_inception_score_is_adms_form():
    "Parts of 5,000 in order, the last one shorter; in numpy, as the evaluator writes it."
    network, x = linear_network(), torch.randn(12_000, 12, generator=generator())
    p, scores = network.head(x).double().softmax(1).numpy(), []
    for start in range(0, len(p), 5000):
        part = p[start:start+5000]
        scores.append(np.exp((part*(np.log(part) - np.log(part.mean(0, keepdims=True)))).sum(1).mean()))
    assert len(scores) == 3 and inception_score(x, network) == pytest.approx(np.mean(scores), rel=1e-6)

def test_inception_score_of_certain_and_of_equal_classes():
    network = FeatureNetwork(nn.Flatten(), 'logits', 5, head=lambda x: x)
    certain = 200.*torch.eye(5).repeat(20, 1)
    assert inception_score(certain, network) == pytest.approx(5.) and inception_score(0*certain, network) == pytest.approx(1.)
    with pytest.raises(ValueError, match='part_size must be at least 1 or None, got 0'):
        inception_score(certain, network, part_size=0)

def brute_precision_recall(samples, reference, k):
    def inside(points, centres):
        distances = ((centres[:, None] - centres[None])**2).sum(-1)
        radii = np.sort(distances, 1)[:, k]
        return np.mean([(((point - centres)**2).sum(1) <= radii).any() for point in points])
    return inside(samples, reference), inside(reference, samples)

@pytest.mark.parametrize('k', [1, 3, 5])
@pytest.mark.parametrize('kind', ['normal', 'whole numbers'])
def test_precision_and_recall_are_brute_force(k, kind):
    "Whole numbers have many distances that are equal, and those far from 0 lose digits in float32."
    a, b = torch.randn(150, 6, generator=generator(1)), 1.3*torch.randn(90, 6, generator=generator(2)) + .3
    if kind == 'whole numbers': a, b = (2*a).round() + 3000, (2*b).round() + 3000
    expected = brute_precision_recall(a.double().numpy(), b.double().numpy(), k)
    assert .05 < min(expected) and max(expected) < 1
    for chunk_size in (1, 7, 64, 1000):
        assert precision_recall(a, b, k, chunk_size) == pytest.approx(expected, abs=1e-12)

def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity.metric_prc import prc_features_to_metric
    a, b = torch.randn(300, 64, generator=generator(1)), 1.1*torch.randn(200, 64, generator=generator(2))
    theirs = prc_features_to_metric(a.double(), b.double(), prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    found = precision_recall(a, b, chunk_size=64)
    assert found == pytest.approx((theirs['precision'], theirs['recall'])) and 0 < min(found) < max(found) < 1

def test_copies_are_at_no_distance():
    x = torch.randn(50, 2048, generator=generator(3))*30 + 100.
    assert precision_recall(x, x.flip(0), chunk_size=16) == (1., 1.)
    precision, recall = precision_recall(x[:1].repeat(8, 1), x) # all radii are 0
    assert (precision, recall) == (1., 1/50)

def test_chunks_never_hold_all_distances(monkeypatch):
    from tokpost import metrics
    sizes, distances = [], metrics._squared_distances
    monkeypatch.setattr(metrics, '_squared_distances', lambda a, b: sizes.append(len(a)*len(b)) or distances(a, b))
    precision_recall(torch.randn(500, 4), torch.randn(300, 4), chunk_size=40)
    assert max(sizes) == 1600 and sum(sizes) == 500*500 + 300*300 + 2*500*300

@pytest.mark.parametrize('n, m, k', [(3, 50, 3), (50, 3, 3), (50, 50, 0)])
def test_too_few_neighbours_are_refused(n, m, k):
    with pytest.raises(ValueError, match=f'more than neighbours >= 1, got {n}, {m} and {k}'):
        precision_recall(torch.randn(n, 4), torch.randn(m, 4), k)

@pytest.mark.parametrize('bandwidths', [None, .7, [.5, 2.]])
def test_maximum_mean_discrepancy_is_its_loops(bandwidths):
    a, b = features_of(7, 3), features_of(9, 3, 2)
    both = torch.cat([a, b]).tolist()
    distances = sorted(math.dist(both[i], both[j]) for i in range(16) for j in range(i))
    assert len(distances) % 2 == 0
    # torch's median of an even number is the lower of the two in the middle
    widths = [distances[len(distances)//2 - 1]] if bandwidths is None else np.atleast_1d(bandwidths)
    kernel = lambda x, y: np.mean([math.exp(-math.dist(x, y)**2/(2*w**2)) for w in widths])
    x, y = a.tolist(), b.tolist()
    within = [np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]) for z in (x, y)]
    expected = sum(within) - 2*np.mean([kernel(p, q) for p in x for q in y])
    assert maximum_mean_discrepancy(a, b, bandwidths) == pytest.approx(expected, abs=1e-12)

def test_maximum_mean_discrepancy_refuses():
    with pytest.raises(ValueError, match=r'got \(1, 3\) and \(4, 3\)'): maximum_mean_discrepancy(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match='bandwidths must be positive'): maximum_mean_discrepancy(torch.rand(4, 3), torch.rand(4, 3), [1., 0.])
