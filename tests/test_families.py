"The three families of generators, from training to post-training, at the size of a test."
import copy

import pytest
import torch

from tokpost.coda import lora_convolutions
from tokpost.data import LatentStore, TokenStore
from tokpost.evaluate import Evaluation, reconstruction_scores
from tokpost.pfid import latent_pfid, residual_pfid
from tokpost.post_train import FAMILIES, post_train, stored_pairs, trained_system
from tokpost.run import Run
from tokpost.tokens import generated_tokens

SMALL = {'autoencoder_training.steps': 20, 'main_training.steps': 8, 'pairs.count': 24, 'evaluation.reconstructions': 64,
         'coda_quantizer_training.steps': 20, 'generator_training.steps': 4, 'masked_training.steps': 4,
         'diffusion_training.steps': 4}


@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('project')


@pytest.fixture(scope='module', params=FAMILIES)
def family(request): return request.param


@pytest.fixture(scope='module')
def parts(family, home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('tokpost.run.project_root', lambda: home)
        run = Run('families', 'smoke', changes=SMALL)
        evaluation = Evaluation(run)
        return run, evaluation, trained_system(run, evaluation, family)


def test_pairs_are_of_the_real_images(family, parts):
    run, evaluation, system = parts
    images = evaluation.train
    pairs = {sigma: stored_pairs(run, system, images, sigma, 'direct') for sigma in (1., .7, 0.)}
    assert isinstance(pairs[1.], LatentStore if family == 'diffusion' else TokenStore)
    with torch.no_grad(): true = system.tokenizer.encode(images[pairs[1.].sources])
    torch.testing.assert_close(pairs[1.][:], true, atol=1e-4, rtol=1e-4)
    for store in pairs.values(): assert torch.equal(images.labels[store.sources], store.labels)
    if family == 'diffusion': distance = {s: (store[:]-true).square().mean() for s, store in pairs.items()}
    else: distance = {s: (store[:] != true).float().mean() for s, store in pairs.items()}
    assert distance[1.] < 1e-6 < distance[.7] < distance[0.]
    if family != 'diffusion': assert (pairs[.7][:] == true).float().mean() > .6 # 384 tokens and more, at least 70 % kept


def test_reencoded_pairs_are_tokens_of_pictures(family, parts):
    run, evaluation, system = parts
    direct, again = (stored_pairs(run, system, evaluation.train, .7, form) for form in ('direct', 'reencoded'))
    control = stored_pairs(run, system, evaluation.train, 1.)
    assert torch.equal(direct.sources, again.sources) and direct[:].shape == again[:].shape
    assert torch.equal(control.sources, again.sources) and not torch.equal(control[:], again[:])
    assert not torch.equal(direct[:], again[:])


def test_only_the_decoder_moves(parts):
    run, evaluation, system = parts
    pairs, learner = stored_pairs(run, system, evaluation.train, .7), copy.deepcopy(system.tokenizer)
    post_train(learner, pairs, evaluation.train, adversary=copy.deepcopy(system.adversary), steps=3, batch_size=8, lr=1e-3, warmup=1)
    inside = {id(p) for p in learner.decoder.parameters()}
    before = dict(system.tokenizer.named_parameters())
    moved = {name for name, p in learner.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= {name for name, p in learner.named_parameters() if id(p) in inside}
    some = evaluation.validation[range(4)]
    with torch.no_grad(): assert torch.equal(learner.encode(some), system.tokenizer.encode(some))


def test_generated_and_scored(family, parts, home, monkeypatch):
    run, evaluation, system = parts
    monkeypatch.setattr('tokpost.run.project_root', lambda: home)
    written = generated_tokens(run, system.generator, system.made_by['generator'], evaluation.labels(), system.sampling)
    assert evaluation.generation(system.tokenizer.decode, written[:])['gfid'] > 0
    scores = reconstruction_scores(evaluation, system.tokenizer)
    assert ('bits' in scores) == (family != 'diffusion') and scores['rfid'] > 0
    if family == 'masked': assert scores['bits'] == system.tokenizer.bits == 30*6


def test_masked_adapters_alone(family, parts):
    if family != 'masked': pytest.skip('only CODA has adapters')
    run, evaluation, system = parts
    pairs, learner = stored_pairs(run, system, evaluation.train, .7), copy.deepcopy(system.tokenizer)
    post_train(learner, pairs, evaluation.train, learner.decoder_adapters(), steps=3, batch_size=8, lr=1e-2, warmup=1)
    before = dict(system.tokenizer.named_parameters())
    moved = {name for name, p in learner.named_parameters() if not torch.equal(p, before[name])}
    found = lora_convolutions(learner.decoder)
    assert moved and all('adapter' in name and 'decoder' in name for name in moved) and len(moved) <= 2*len(found)
    assert (learner.decode(pairs[[0]]) - system.tokenizer.decode(pairs[[0]])).abs().max() > 0


def test_pfid_of_their_own(family, parts):
    run, evaluation, system = parts
    if family == 'autoregressive': pytest.skip('pFID itself is in test_pfid')
    batches = list(evaluation.batches('validation'))
    if family == 'masked': result = residual_pfid(system.tokenizer, batches, evaluation.network, alphas=(.5,), deltas=(8,), rfid=True)
    else: result = latent_pfid(system.tokenizer, batches, evaluation.network, rfid=True)
    assert result.n == 64 and result.rfid > 0 and result.to_rows()


def test_unknown_family_is_named(parts):
    run, evaluation, _ = parts
    with pytest.raises(ValueError, match="family must be one of .* got 'gan'"): trained_system(run, evaluation, 'gan')
