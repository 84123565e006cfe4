"Scores against explicit loops and known answers; statistics and features that are made once, after a kill too."
import json, os, re, shutil, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import numpy as np, pytest, torch
from torch import nn
from tokpost import evaluate as module
from tokpost.data import load_images, make_token_store, to_images, to_pixels
from tokpost.evaluate import (LOSS_SEED, METRIC_SEED, REFERENCES, Evaluation, ReferenceFile, decode_bytes,
                              feature_statistics, fetch_file, forget_partial, gather_statistics, generation_scores,
                              load_reference, merge_over_processes, perceptual_distance, reconstruction_scores,
                              store_statistics, trained_classifier)
from tokpost.metrics import FeatureNetwork, FrechetStatistics, frechet_distance
from tokpost.pfid import pfid
from tokpost.run import Processes, Run

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

# Passes that go on, features that are kept

class Killed(BaseException): "What a kill does, without a process."

@pytest.mark.parametrize('stop', [1, 4, 5, 9])
def test_a_pass_that_was_killed_goes_on(tmp_path, stop):
    batches = torch.randn(10, 6, 5, generator=torch.Generator().manual_seed(0)) + 100.
    batches[3, 0] = 0.
    seen = []
    def features(batch):
        if len(seen) == stop: raise Killed
        seen.append(batch)
        return dict(a=batch, b=batch**2)
    gather = lambda features_fn: gather_statistics(batches, features_fn, ['a', 'b'], 5, folder=tmp_path/'x', every=2)
    with pytest.raises(Killed): gather(features)
    first, seen[:], stop = stop, [], -1
    found = gather(features)
    assert len(seen) == 10 - first//2*2
    whole = gather_statistics(batches, lambda batch: dict(a=batch, b=batch**2), ['a', 'b'], 5)
    for name in 'ab':
        for key, value in found[name].state().items(): assert torch.equal(value, whole[name].state()[key])
    seen.clear()
    assert gather(features)['a'].count == 60 and not seen                    # done; what was kept is still there
    forget_partial(tmp_path/'x')
    forget_partial(tmp_path/'x')
    assert not (tmp_path/'x').exists()

def test_pfid_that_was_killed_goes_on(evaluation, tmp_path):
    class Dies(Lookup):
        decoded = 0
        def decode(self, indices):
            self.decoded += 1
            if self.decoded == self.stop: raise Killed
            return super().decode(indices)
    images = evaluation.validation
    batches = lambda: images[:90].split(2)                                   # 45 batches, kept every 20
    how = dict(alphas=(.9,), deltas=(3,), progress=False, folder=tmp_path/'x')
    tokenizer = Dies(images, lambda x: x*.8)
    tokenizer.stop = 31
    with pytest.raises(Killed): pfid(tokenizer, batches(), evaluation.network, **how)
    tokenizer.stop, tokenizer.decoded = None, 0
    result = pfid(tokenizer, batches(), evaluation.network, **how)
    assert tokenizer.decoded == 25 and result == pfid(tokenizer, batches(), evaluation.network, **how | dict(folder=None))

def stored_tokens(folder, images, made_by='images'):
    return make_token_store(folder, lambda rows: torch.as_tensor(rows)[:, None], images.labels, 1, len(images), dict(made_by=made_by))

def test_features_are_made_once_and_named_by_all_they_depend_on(evaluation, tmp_path, monkeypatch):
    images = evaluation.validation
    tokens, tokenizer = stored_tokens(tmp_path/'a', images), Lookup(images, lambda x: x*.9)
    features = evaluation.generated_features(tokenizer.decode, tokens, 'shrunk')
    expected = evaluation.network(to_images(to_pixels(images[:]*.9)))
    assert features[:].dtype == torch.float32 and torch.allclose(features[:], expected, atol=1e-5)
    assert features.made_by == dict(tokens=tokens.made_by, decoder='shrunk', features_fingerprint=evaluation.network.fingerprint)
    monkeypatch.setattr(evaluation.network, 'extract', None)                 # would fail if it were called
    again = evaluation.generated_features(tokenizer.decode, tokens, 'shrunk')
    assert again.folder == features.folder
    for tokens, decoder in ((tokens, 'other'), (stored_tokens(tmp_path/'b', images, 'other images'), 'shrunk')):
        with pytest.raises(TypeError): evaluation.generated_features(tokenizer.decode, tokens, decoder)
    monkeypatch.setattr(evaluation.network, 'fingerprint', 'another')
    with pytest.raises(TypeError): evaluation.generated_features(tokenizer.decode, stored_tokens(tmp_path/'a', images), 'shrunk')

SLOW = """
import sys, time, torch
from tokpost.evaluate import Evaluation
from tokpost.run import Run
evaluation = Evaluation(Run('evaluate', changes={'evaluation.batch_size': 20}))
def images(rows):
    print('batch', rows[0], flush=True)
    if len(sys.argv) > 1 and rows[0] == 100: time.sleep(600)
    return evaluation.validation[rows]
store = evaluation.features(images, evaluation.validation.labels[:200], dict(what='killed'))
torch.save(store[:], 'features.pt')
"""

def test_features_after_a_kill(evaluation):
    "SIGKILL in the sixth of ten batches; the next run makes that one and those behind it."
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    folder = evaluation.run.root
    process = subprocess.Popen([sys.executable, '-c', SLOW, 'slow'], cwd=folder, env=env, text=True, stdout=subprocess.PIPE)
    seen = []
    while 'batch 100' not in seen:
        line = process.stdout.readline()
        assert line, 'ended before it was killed'
        seen.append(line.strip())
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (folder/'features.pt').exists()
    done = subprocess.run([sys.executable, '-c', SLOW], cwd=folder, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for row in range(100, 200, 20) for word in ('batch', str(row))]
    features = evaluation.network(evaluation.validation[:200])
    assert torch.allclose(torch.load(folder/'features.pt'), features, atol=1e-5)

def test_generation_scores_are_their_formulas(evaluation, tmp_path):
    from torch_fidelity.metric_prc import prc_features_to_metric
    images, network = evaluation.validation, evaluation.network
    made = evaluation.generated_features(Lookup(images, lambda x: x*.7 + .1).decode, stored_tokens(tmp_path/'a', images), 'dim')
    scores = generation_scores(evaluation, made)
    ours, real = made[:], network(evaluation.train[:])
    statistics = [FrechetStatistics(network.dim).update(x) for x in (ours, real)]
    assert scores['gfid'] == pytest.approx(frechet_distance(*statistics), rel=1e-6)
    expected = prc_features_to_metric(ours.double(), real.double(), prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    assert (scores['precision'], scores['recall']) == pytest.approx((expected['precision'], expected['recall']), abs=1e-6)
    p = network.head(ours).double().softmax(1)
    assert scores['inception_score'] == pytest.approx((p*(p/p.mean(0)).log()).sum(1).mean().exp().item(), rel=1e-5)
    assert (scores['n'], scores['n_reference'], scores['reference']) == (len(images), len(evaluation.train), 'train')
    assert 0 < scores['precision'] < 1 and scores['features'] == 'digits classifier'

def test_a_network_without_logits_has_no_inception_score(evaluation, monkeypatch):
    monkeypatch.setattr(evaluation.network, 'head', None)
    features = evaluation.features(lambda rows: evaluation.validation[rows], evaluation.validation.labels, dict(x=1))
    scores = generation_scores(evaluation, features)
    assert 'inception_score' not in scores and scores['recall'] > .5

# References by name

def colours(): return FeatureNetwork(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), 'four colours', 12)

def reference_arrays(**changes):
    images = load_images('digits', 'train', 16)
    features = colours()(images[:]).double()
    arrays = dict(mu=features.mean(0), sigma=features.T.cov(), mu_s=torch.zeros(4), sigma_s=torch.eye(4),
                  arr_0=to_pixels(images[:40]).permute(0, 2, 3, 1))
    return {key: np.asarray(value) for key, value in (arrays | changes).items() if value is not None}

@pytest.fixture
def small_reference(monkeypatch):
    row = ReferenceFile('small', 'http://localhost:9/small.npz', 'four colours', 12, 4, 16, 40, 1438)
    monkeypatch.setitem(REFERENCES, 'small', row)
    return row

@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_reference_file(small_reference, tmp_path, save):
    save(tmp_path/'small.npz', **reference_arrays())
    reference, images = load_reference('small', tmp_path/'small.npz'), load_images('digits', 'train', 16)
    statistics = FrechetStatistics(12).update(colours()(images[:]))
    assert reference.statistics.count == 1438 and frechet_distance(reference.statistics, statistics) < 1e-6
    assert torch.equal(reference.images_fn(np.array([3, 39, 0])), to_images(to_pixels(images[[3, 39, 0]])))
    assert reference.images == 40

def test_reference_of_float32_statistics_in_fortran_order(small_reference, tmp_path):
    arrays = reference_arrays()
    arrays |= {key: np.asfortranarray(arrays[key].astype(np.float32)) for key in ('mu', 'sigma')}
    np.savez(tmp_path/'small.npz', **arrays)
    covariance = load_reference('small', tmp_path/'small.npz').statistics.covariance
    assert torch.allclose(covariance, torch.from_numpy(reference_arrays()['sigma']), atol=1e-6)

@pytest.mark.parametrize('changes, message', [
    (dict(mu=None), r"it has no mu, only \['sigma'"), (dict(arr_0=None), 'it has no arr_0'),
    (dict(sigma=np.eye(9)), r'sigma must have shape \(12, 12\), got \(9, 9\)'),
    (dict(sigma_s=np.eye(9)), r'sigma_s must have shape \(4, 4\)'),
    (dict(mu=np.full(12, np.nan)), 'mu must be finite'), (dict(sigma=np.full((12, 12), np.inf)), 'sigma must be finite'),
    (dict(arr_0=np.zeros((10, 16, 16, 3), np.uint8)), r'arr_0 must have shape \(40, 16, 16, 3\), got \(10'),
    (dict(arr_0=np.zeros((40, 16, 16, 3))), 'arr_0 must be uint8, got float64')])
def test_wrong_reference_files_are_named(small_reference, tmp_path, changes, message):
    np.savez(tmp_path/'small.npz', **reference_arrays(**changes))
    with pytest.raises(ValueError, match=f'small.npz is not the reference .small.: {message}'):
        load_reference('small', tmp_path/'small.npz')

@pytest.mark.parametrize('text', [b'<html>not found</html>', b'', 'cut'])
def test_what_is_no_reference_file(small_reference, tmp_path, text):
    np.savez(tmp_path/'whole.npz', **reference_arrays())
    (tmp_path/'small.npz').write_bytes((tmp_path/'whole.npz').read_bytes()[:9000] if text == 'cut' else text)
    with pytest.raises(ValueError, match='it is no .npz file, or was cut off'): load_reference('small', tmp_path/'small.npz')

def test_reference_of_an_evaluation(evaluation, small_reference, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="reference must be 'train' or one of .*'adm-imagenet-256', 'small'.*, got 'adm'"):
        evaluation.reference('adm')
    with pytest.raises(ValueError, match="features must be 'inception' for the reference 'adm-imagenet-256', got 'digits"):
        evaluation.reference('adm-imagenet-256')
    with pytest.raises(ValueError, match="features must be 'four colours'"): evaluation.reference('small')
    monkeypatch.setattr(evaluation, 'network', colours())
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path))
    (tmp_path/'references').mkdir()
    np.savez(tmp_path/'references/small.npz', **reference_arrays())
    reference = evaluation.reference('small')
    features = evaluation.reference_features(reference)
    assert torch.allclose(features[:], evaluation.network(evaluation.train[:40]), atol=1e-6)
    monkeypatch.setitem(evaluation.run.size['evaluation'], 'reference', 'small') # as a preset names it
    everything = Lookup(evaluation.train)
    rows = torch.arange(len(evaluation.train))[:, None]
    assert evaluation.generation(everything.decode, rows)['gfid'] < 1e-6
    scores = generation_scores(evaluation, evaluation.network(evaluation.train[:60]))
    assert (scores['n_reference'], scores['reference'], scores['recall']) == (40, 'small', 1.)
    monkeypatch.setitem(REFERENCES, 'small', ReferenceFile(**vars(small_reference) | dict(image_size=32)))
    with pytest.raises(ValueError, match="image_size must be 32 for the reference 'small', got 16"): evaluation.reference()

# Downloads

class Server:
    "Serves bytes; breaks the connection after `limit` of them, and may ignore ranges."
    def __init__(self, content, limit=10**9, ranges=True):
        self.content, self.limit, self.ranges, self.asked, server = content, limit, ranges, [], self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self):
                wanted = self.headers.get('Range')
                server.asked.append(wanted)
                start = int(re.findall(r'\d+', wanted)[0]) if wanted and server.ranges else 0
                if start >= len(server.content): return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header('Content-Length', str(len(server.content)-start))
                self.end_headers()
                self.wfile.write(server.content[start:start+server.limit])
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}/folder/small.npz'
        Thread(target=self.server.serve_forever, daemon=True).start()

@pytest.fixture
def serve():
    servers = []
    yield lambda *args, **options: servers.append(Server(*args, **options)) or servers[-1]
    for server in servers:
        server.server.shutdown()
        server.server.server_close()

CONTENT = bytes(range(256))*40_000                                           # 10 MB

def test_a_download_goes_on_where_it_broke(serve, tmp_path):
    server, path = serve(CONTENT, limit=4_000_000), tmp_path/'a/small.npz'
    for _ in range(2):
        with pytest.raises((OSError, module.HTTPException)): fetch_file(server.url, path)
        assert not path.exists()
    assert fetch_file(server.url, path).read_bytes() == CONTENT
    assert server.asked == [None, 'bytes=4000000-', 'bytes=8000000-']
    assert [p.name for p in path.parent.iterdir()] == ['small.npz']

def test_a_server_without_ranges_begins_anew(serve, tmp_path):
    server, path = serve(CONTENT, limit=4_000_000, ranges=False), tmp_path/'small.npz'
    with pytest.raises((OSError, module.HTTPException)): fetch_file(server.url, path)
    server.limit = 10**9
    assert fetch_file(server.url, path).read_bytes() == CONTENT

def test_a_part_longer_than_the_file_is_thrown_away(serve, tmp_path):
    (tmp_path/'small.npz.part').write_bytes(CONTENT + b'more')
    assert fetch_file(serve(CONTENT).url, tmp_path/'small.npz').read_bytes() == CONTENT

def test_a_reference_is_downloaded_to_its_place(serve, small_reference, tmp_path, monkeypatch):
    np.savez(tmp_path/'there.npz', **reference_arrays())
    server = serve((tmp_path/'there.npz').read_bytes(), limit=10_000)
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path/'data'))
    monkeypatch.setitem(REFERENCES, 'small', ReferenceFile(**vars(small_reference) | dict(url=server.url)))
    place = tmp_path/'data/references/small.npz'
    with pytest.raises(FileNotFoundError) as caught: load_reference('small')
    for text in (str(place), server.url, 'Run again to go on', 'and put it there'): assert text in str(caught.value)
    server.limit = 10**9
    assert load_reference('small').images == 40 and place.exists() and server.asked == [None, 'bytes=10000-']
    server.server.shutdown()
    assert load_reference('small').images == 40                              # from disk

def test_offline_says_what_to_fetch(small_reference, tmp_path, monkeypatch):
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='fetch http://localhost:9/small.npz on a machine with a network'):
        load_reference('small')

def test_the_published_reference():
    row = REFERENCES['adm-imagenet-256']
    assert row.url.endswith('ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz')
    assert (row.dim, row.spatial_dim, row.image_size, row.images) == (2048, 7*17*17, 256, 10_000)

# Two processes

def everything(folder):
    "Features, scores and pFID of the validation images, some of them kept from a run that was killed."
    evaluation = Evaluation(Run('evaluate', changes={'evaluation.batch_size': 50}))
    here, images = evaluation.run.here, evaluation.validation
    tokens = make_token_store(folder/'tokens', lambda rows: torch.as_tensor(rows)[:, None], images.labels, 1, len(images), {},
                              rank=here.rank, world=here.world, wait=here.wait)
    tokenizer, made = Lookup(images, lambda x: x*.7 + .1), []
    def decode(indices):
        made.append(len(indices))
        return tokenizer.decode(indices)
    features = evaluation.generated_features(decode, tokens, 'dim')
    again = evaluation.generated_features(None, tokens, 'dim')
    perturbed = pfid(tokenizer, evaluation.batches('validation'), evaluation.network, (.9, .5), (3,), rfid=True,
                     reference=evaluation.statistics('validation'), progress=False, folder=folder/'pfid')
    statistics = store_statistics(features, batch_size=70)
    return dict(rows=features[:], again=again[:], made=here.sum(torch.tensor(sum(made))).item(), rfid=perturbed.rfid,
                pfid=perturbed.pfid, count=statistics.count, covariance=statistics.covariance,
                **generation_scores(evaluation, features))

def test_two_processes_equal_one(evaluation, tmp_path):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__, tmp_path]
    project = tmp_path/'project'                                             # with the same classifier
    shutil.copytree(evaluation.run.root, project, ignore=shutil.ignore_patterns('features-*', 'statistics-*'))
    done = subprocess.run(command, env=env, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path/'two.pt')
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path/'alone').mkdir()
        patch.chdir(evaluation.run.root)
        one = everything(tmp_path/'alone')
    assert two.keys() == one.keys() and one['made'] == len(evaluation.validation) == one['count']
    for name, value in one.items():
        if isinstance(value, str): assert two[name] == value
        else: torch.testing.assert_close(torch.as_tensor(two[name]), torch.as_tensor(value), rtol=1e-6, atol=1e-6, msg=name)
    assert torch.equal(two['rows'], two['again'])

if __name__ == '__main__':
    here = Processes('fp32')
    assert here.world == 2
    result = everything(Path(sys.argv[1]))
    if here.is_main: torch.save(result, Path(sys.argv[1])/'two.pt')
