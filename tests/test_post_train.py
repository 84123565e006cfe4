"Pairs and post-training: what is forced, what is frozen, what a kill leaves."
import copy
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

import tokpost.post_train as module
from tokpost.autoregressive import RAR
from tokpost.data import load_images, to_images, to_pixels
from tokpost.losses import ImageLoss, build_adversary
from tokpost.post_train import make_pairs, post_train
from tokpost.run import PRESETS, load_state
from tokpost.tokenizer import build_tokenizer


@pytest.fixture(scope='module')
def digits(): return load_images('digits', 'train', 16)

@pytest.fixture(scope='module')
def tokenizer(): return build_tokenizer(16, **PRESETS['smoke']['tokenizer']).eval()

@pytest.fixture(scope='module')
def generator():
    torch.manual_seed(0)
    model = RAR(64, 16, 10, width=32, depth=1, heads=2).eval()
    for p in model.parameters(): nn.init.normal_(p, std=.2)
    return model


def pairs_of(folder, tokenizer, generator, digits, sigma=.5, **options):
    return make_pairs(folder, tokenizer, generator, digits, sigma, **dict(count=40, batch_size=16) | options)


class Recorder:
    "A generator that writes token 7 wherever it is not forced, and remembers what it was given."
    def __init__(self): self.calls = []
    def sample(self, labels, indices=None, sigma=0., generator=None):
        keep = torch.rand(indices.shape, generator=generator) < sigma
        self.calls.append((labels, indices, sigma, keep))
        return torch.where(keep, indices, 7)


def same(a, b): return all(torch.equal(x, b[name]) for name, x in a.items())


def test_sigma_one_is_the_true_tokens(tokenizer, generator, digits, tmp_path):
    pairs = pairs_of(tmp_path/'a', tokenizer, generator, digits, 1., form='direct')
    assert torch.equal(pairs[:], tokenizer.encode(digits[pairs.sources]))
    assert torch.equal(pairs.labels, digits.labels[pairs.sources]) and pairs.sources.unique().numel() == 40


def test_the_control_goes_through_the_picture_too(tokenizer, digits, tmp_path):
    "Re-encoded pairs at sigma 1 differ from those below it in the generator alone."
    recorder = Recorder()
    pairs = pairs_of(tmp_path/'a', tokenizer, recorder, digits, 1)
    assert not recorder.calls
    true = tokenizer.encode(digits[pairs.sources])
    again = tokenizer.encode(to_images(to_pixels(tokenizer.decode(true).detach())))
    assert torch.equal(pairs[:], again) and not torch.equal(again, true)


def test_images_that_are_not_those_of_the_pairs_are_refused(tokenizer, generator, digits, tmp_path):
    pairs = pairs_of(tmp_path/'a', tokenizer, generator, digits)
    with pytest.raises(ValueError, match='images must be those of the pairs'):
        post_train(copy.deepcopy(tokenizer), pairs, load_images('digits', 'validation', 16), steps=1, batch_size=8)


def test_a_decoder_without_weights_is_refused(tokenizer, generator, digits, tmp_path):
    pairs = pairs_of(tmp_path/'a', tokenizer, generator, digits)
    with pytest.raises(ValueError, match='decoder must have parameters to train, got ModuleDict'):
        post_train(copy.deepcopy(tokenizer), pairs, digits, nn.ModuleDict(), steps=1, batch_size=8)


@pytest.mark.parametrize('other', [dict(warmup=2), dict(final_lr=.5), dict(clip=1.), dict(ema_horizon=.5), dict(discriminator_lr=1e-5)])
def test_a_checkpoint_of_another_recipe_is_refused(tokenizer, generator, digits, tmp_path, other):
    pairs = pairs_of(tmp_path/'a', tokenizer, generator, digits)
    recipe = dict(steps=1, batch_size=8, warmup=1, folder=tmp_path/'run')
    post_train(copy.deepcopy(tokenizer), pairs, digits, **recipe)
    with pytest.raises(ValueError, match=f'was made with {next(iter(other))}='):
        post_train(copy.deepcopy(tokenizer), pairs, digits, **recipe | other)


def test_direct_pairs_are_what_the_generator_wrote(tokenizer, digits, tmp_path):
    recorder = Recorder()
    pairs = pairs_of(tmp_path/'a', tokenizer, recorder, digits, .6, form='direct')
    true, keep = (torch.cat([call[i] for call in recorder.calls]) for i in (1, 3))
    assert torch.equal(true, tokenizer.encode(digits[pairs.sources]))
    assert torch.equal(pairs[:], torch.where(keep, true, 7)) and .45 < keep.float().mean() < .75
    assert torch.equal(torch.cat([call[0] for call in recorder.calls]), digits.labels[pairs.sources])


def test_reencoded_pairs_go_through_a_picture_of_bytes(tokenizer, generator, digits, tmp_path):
    direct = pairs_of(tmp_path/'a', tokenizer, generator, digits, form='direct')
    pairs = pairs_of(tmp_path/'b', tokenizer, generator, digits)
    with torch.no_grad():                                                # in the same batches: floats depend on their size
        expected = torch.cat([tokenizer.encode(to_images(to_pixels(tokenizer.decode(direct[np.arange(a, min(a+16, 40))]))))
                              for a in range(0, 40, 16)])
    assert torch.equal(pairs[:], expected) and not torch.equal(pairs[:], direct[:])


def test_two_bytes_a_token_same_seed_same_bytes(tokenizer, generator, digits, tmp_path):
    a, b, c = (pairs_of(tmp_path/name, tokenizer, generator, digits, seed=seed) for name, seed in (('a', 0), ('b', 0), ('c', 1)))
    assert a.indices.dtype == np.uint16 and a.indices.nbytes == 2*40*16
    assert (tmp_path/'a/indices.npy').read_bytes() == (tmp_path/'b/indices.npy').read_bytes()
    assert not torch.equal(a.sources, c.sources)


def test_more_pairs_than_images_take_each_equally_often(tokenizer, generator, digits, tmp_path):
    pairs = pairs_of(tmp_path/'a', tokenizer, generator, digits, 1., count=2*len(digits), batch_size=1000)
    assert pairs.sources.bincount().eq(2).all()


def test_killed_while_writing_pairs(tokenizer, generator, digits, tmp_path):
    whole = pairs_of(tmp_path/'whole', tokenizer, generator, digits)
    pid = os.fork()
    if pid == 0:
        class Dies:
            calls = 0
            def sample(self, *args, **kwargs):
                Dies.calls += 1
                if Dies.calls == 2: os.kill(os.getpid(), signal.SIGKILL)
                return generator.sample(*args, **kwargs)
        pairs_of(tmp_path/'killed', tokenizer, Dies(), digits)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL and not (tmp_path/'killed').exists()
    again = pairs_of(tmp_path/'killed', tokenizer, generator, digits)
    assert torch.equal(again[:], whole[:])


def taught(tokenizer, pairs, digits, folder=None, **options):
    learner = copy.deepcopy(tokenizer)
    options = dict(steps=6, batch_size=16, lr=1e-3, warmup=1, precision='fp32') | options
    options = dict(adversary=build_adversary('patch', 16, 8)) | options
    return learner, post_train(learner, pairs, digits, folder=folder, **options)


def test_only_the_decoder_moves(tokenizer, generator, digits, tmp_path):
    pairs = pairs_of(tmp_path/'a', tokenizer, generator, digits)
    learner, _ = taught(tokenizer, pairs, digits)
    before, after = tokenizer.state_dict(), learner.state_dict()
    moved = {name.split('.')[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {'decoder'}
    assert torch.equal(learner.encode(digits[range(50)]), tokenizer.encode(digits[range(50)]))
    assert not learner.training and not any(p.requires_grad for p in learner.parameters())


def test_the_frozen_part_is_in_eval_mode(tokenizer, generator, digits, tmp_path, monkeypatch):
    pairs, modes = pairs_of(tmp_path/'a', tokenizer, generator, digits), []
    learner = copy.deepcopy(tokenizer).train()
    decode = learner.decode
    learner.decode = lambda indices: modes.append((learner.encoder.training, learner.quantizer.training, learner.decoder.training)) or decode(indices)
    post_train(learner, pairs, digits, steps=2, batch_size=8, warmup=0, precision='fp32')
    assert set(modes) == {(False, False, True)}


def test_learns_to_return_the_real_image(tokenizer, digits, tmp_path):
    pairs = pairs_of(tmp_path/'a', tokenizer, Recorder(), digits, .8, form='direct')
    learner, rows = taught(tokenizer, pairs, digits, adversary=None, steps=40, ema_horizon=.05)
    def error(t):
        with torch.no_grad(): return (t.decode(pairs[:])-digits[pairs.sources]).square().mean()
    assert error(learner) < .8*error(tokenizer) and rows[-1]['loss'] < rows[0]['loss']


def test_same_seed_same_bytes_and_resume(tokenizer, generator, digits, tmp_path, monkeypatch):
    real = module.Loop
    monkeypatch.setattr(module, 'Loop', lambda *a, **k: real(*a, **k, checkpoint_every=2))
    pairs = pairs_of(tmp_path/'a', tokenizer, generator, digits)
    whole, _ = taught(tokenizer, pairs, digits)
    pid = os.fork()
    if pid == 0:
        calls, step = [], module.train_discriminator
        def dies(*args):
            calls.append(0)
            if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)
        module.train_discriminator = dies
        taught(tokenizer, pairs, digits, tmp_path/'killed')
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert load_state(tmp_path/'killed/checkpoint.safetensors')['step'] == 2
    resumed, rows = taught(tokenizer, pairs, digits, tmp_path/'killed')
    assert same(whole.state_dict(), resumed.state_dict()) and len(rows) == 6
    other = pairs_of(tmp_path/'b', tokenizer, generator, digits, .9)
    with pytest.raises(ValueError, match='was made with pairs='): taught(tokenizer, other, digits, tmp_path/'killed')


def test_judged_tokens_reach_the_decoder_through_the_adversary_alone(tokenizer, generator, digits, tmp_path):
    pairs = pairs_of(tmp_path/'a', tokenizer, generator, digits, 1.)
    free = pairs_of(tmp_path/'b', tokenizer, generator, digits, 0., form='direct')
    plain = taught(tokenizer, pairs, digits)[0].state_dict()
    judged = taught(tokenizer, pairs, digits, judged=free)[0].state_dict()
    assert not same(plain, judged)
    without = [taught(tokenizer, pairs, digits, judged=j, adversary=None)[0].state_dict() for j in (None, free)]
    assert same(*without)


@pytest.mark.parametrize('options, message', [
    (dict(sigma=1.5), r'sigma must be in \[0, 1\], got 1.5'), (dict(sigma=-.1), r'sigma must be in \[0, 1\]'),
    (dict(form='png'), "got 'png'"), (dict(count=0), 'count must be at least 1, got 0')])
def test_bad_input(tokenizer, generator, digits, tmp_path, options, message):
    with pytest.raises(ValueError, match=message): pairs_of(tmp_path/'a', tokenizer, generator, digits, **options)
    assert not list(tmp_path.iterdir())


def test_a_generator_that_writes_no_tokens_is_refused(tokenizer, digits, tmp_path):
    class Wrong:
        def sample(self, labels, indices=None, sigma=0., generator=None): return indices + 64
    with pytest.raises(ValueError, match=r'must be in \[0, 64\)|\(16, 16\) in \[0, 64\)'):
        pairs_of(tmp_path/'a', tokenizer, Wrong(), digits, form='direct')
    assert not (tmp_path/'a').exists()
