"Scores against explicit loops and known answers; statistics that are made once."
import numpy as np, pytest, torch
from tokpost.data import to_pixels
from tokpost.evaluate import (LOSS_SEED, METRIC_SEED, Evaluation, decode_bytes, feature_statistics,
                              merge_over_processes, perceptual_distance, reconstruction_scores,
                              trained_classifier)
from tokpost.metrics import FrechetStatistics, frechet_distance
from tokpost.run import Run

@pytest.fixture(scope='module')
def evaluation(tmp_path_factory):
    "The ruler of `smoke`, in a project of its own."
    folder = tmp_path_factory.mktemp('project')
    (folder/'settings.ini').touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Evaluation(Run('evaluate'))

class Lookup:
    "A tokenizer that knows images by heart: token i stands for image i."
    def __init__(self, images, change=lambda images: images):
        self.images, self.change = images[:], change
        self.codebook = torch.arange(len(images))[:, None].float()
        self.numbers = {image.numpy().tobytes(): i for i, image in reversed(list(enumerate(self.images)))}
    def encode(self, images):
        return torch.tensor([[self.numbers[image.numpy().tobytes()]] for image in images])
    def decode(self, indices): return self.change(self.images[indices[:, 0]])

def test_training_images_are_at_no_distance_from_themselves(evaluation):
    N = len(evaluation.train)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:, None]
    tokenizer = Lookup(evaluation.train)
    noisy = Lookup(evaluation.train, lambda x: x + .1*torch.randn_like(x))
    scores = evaluation.generation(tokenizer.decode, order)
    assert scores['gfid'] < 1e-6 and scores['n'] == N
    assert scores['features'] == 'digits classifier'
    assert scores['features_fingerprint'] == evaluation.network.fingerprint
    assert evaluation.generation(noisy.decode, order)['gfid'] > .01

def test_batch_size_changes_nothing(evaluation):
    images = evaluation.validation[:100]
    made = [feature_statistics(images.split(size), evaluation.network) for size in (7, 100)]
    assert made[0].count == made[1].count == 100
    for a, b in zip(*((s.mean, s.covariance) for s in made)): assert torch.allclose(a, b, atol=1e-6)

@pytest.mark.parametrize('split', ['train', 'validation'])
def test_statistics_are_made_once_and_read_back(evaluation, monkeypatch, split):
    first = evaluation.statistics(split)
    features = evaluation.network(getattr(evaluation, split)[:]).double().numpy()
    assert first.count == len(features)
    assert np.allclose(first.mean, features.mean(0), atol=1e-6)
    assert np.allclose(first.covariance, np.cov(features, rowvar=False), atol=1e-5)
    again = Evaluation(Run('another notebook', seed=7))
    assert again.network.fingerprint == evaluation.network.fingerprint       # the same ruler for every seed
    monkeypatch.setattr(again.network, 'extract', None)                      # would fail if it were called
    again = again.statistics(split)
    for name, value in first.state().items(): assert torch.equal(again.state()[name], value)

def test_other_images_or_networks_have_statistics_of_their_own(evaluation, monkeypatch):
    usual = evaluation.statistics('validation')
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, 'validation', evaluation.train)
        assert evaluation.statistics('validation').count == len(evaluation.train) != usual.count
    other = Evaluation(Run('evaluate'))
    other.network.fingerprint = 'another'
    monkeypatch.setattr(other.network, 'extract', lambda images: images.flatten(1)[:, :other.network.dim])
    assert not torch.allclose(other.statistics('validation').mean, usual.mean)
    assert torch.equal(evaluation.statistics('validation').mean, usual.mean)

def test_the_network_that_scores_is_not_the_one_that_trains(evaluation):
    scoring, training = evaluation.network.network, evaluation.perceptual.classifier
    metric, loss = (trained_classifier(evaluation.run, evaluation.train, seed)
                    for seed in (METRIC_SEED, LOSS_SEED))
    weights = dict(metric=metric, loss=loss, training=training)
    weights = {name: network.stem[0][0].weight for name, network in weights.items()}
    assert torch.equal(weights['training'], weights['loss'])
    assert not torch.equal(weights['metric'], weights['loss'])
    scoring_weights = [p for p in scoring.parameters() if p.shape == weights['metric'].shape]
    assert torch.equal(scoring_weights[0], weights['metric'])
    assert not any(p.requires_grad for network in (scoring, training) for p in network.parameters())
    folders = {folder.name for folder in evaluation.run.root.glob('runs/smoke/classifier-*')}
    assert len(folders) == 2

@pytest.mark.parametrize('perceptual, message',
                         [('vgg', "'lpips', 'classifier' or None, got 'vgg'"), (None, None)])
def test_perceptual_loss_by_name(evaluation, perceptual, message):
    run = Run('x', changes={'losses.perceptual': perceptual})
    if message is None: assert perceptual_distance(run, evaluation.train) is None
    else:
        with pytest.raises(ValueError, match=message): perceptual_distance(run, evaluation.train)

def test_reconstruction_scores_equal_loop(evaluation):
    "Of a tokenizer whose every pixel is off by a tenth of the range."
    images = evaluation.validation[:]
    tokenizer = Lookup(evaluation.validation, lambda x: x*.8 + .2*torch.sign(x + 1e-3))
    scores = reconstruction_scores(evaluation, tokenizer)
    decoded = to_pixels(tokenizer.change(images)).double()/127.5 - 1
    errors = ((decoded - images.double())/2).square().mean((1, 2, 3))
    assert scores['psnr'] == pytest.approx((-10*errors.log10()).mean().item(), rel=1e-5)
    counts = torch.bincount(tokenizer.encode(images).flatten(), minlength=len(images)).double()
    share = counts[counts > 0]/counts.sum()
    assert scores['codebook_usage'] == pytest.approx((counts > 0).double().mean().item())
    assert scores['perplexity'] == pytest.approx(np.exp(-(share*share.log()).sum().item()))
    made = FrechetStatistics(evaluation.network.dim).update(evaluation.network(decoded.float()))
    expected = frechet_distance(made, evaluation.statistics('validation'))
    assert scores['rfid'] == pytest.approx(expected, rel=1e-4)
    assert scores['n'] == len(images) and 0 < scores['ssim'] < 1

def test_perfect_reconstruction(evaluation):
    scores = reconstruction_scores(evaluation, Lookup(evaluation.validation))
    assert scores['rfid'] < 1e-6 and scores['ssim'] == pytest.approx(1.) and scores['psnr'] == float('inf')

def test_images_are_judged_as_bytes(evaluation):
    out = decode_bytes(lambda indices: torch.linspace(-1.5, 1.5, 3000).expand(2, 3, 4, -1), torch.zeros(2, 1))
    assert -1 == out.min() and out.max() == 1 and len(out.unique()) == 256
    assert torch.equal(((out + 1)*127.5).round(), to_pixels(out).float())

def test_classes_are_generated_equally_often(evaluation):
    assert torch.bincount(evaluation.labels(100)).tolist() == [10]*10
    assert len(evaluation.labels()) == evaluation.samples == 64

def test_one_process_merges_nothing():
    statistics = FrechetStatistics(3).update(torch.randn(5, 3))
    assert merge_over_processes(statistics) is statistics
