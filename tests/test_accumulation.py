"A batch in parts against the batch in one pass: same gradients, same log, less memory; and two processes of parts against one."
import os, re, subprocess, sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import tokpost.tokenizer
from tokpost.autoencoder import build_autoencoder, train_autoencoder
from tokpost.autoregressive import RAR, train_generator
from tokpost.coda import CODA, build_quantizer, inject_lora, inner_convolutions, train_coda, train_quantizer
from tokpost.data import load_images
from tokpost.diffusion import SiT, train_diffusion
from tokpost.losses import Adversary, ImageLoss, Outputs, PatchDiscriminator, accumulate_gradients, train_discriminator
from tokpost.masked import MaskedTransformer, train_masked
from tokpost.perturbation import PerturbationSchedule
from tokpost.post_train import post_train
from tokpost.run import PRESETS, Means, Processes, Run, micro_batches
from tokpost.tokenizer import SemanticTeacher, build_tokenizer, train_tokenizer
from tokpost.tokens import Tokens

SIZES, BATCH = PRESETS['smoke'], 10
TRAINING = dict(steps=3, batch_size=BATCH, lr=1e-8)                      # three steps that hardly move the weights


def rng(seed=0): return torch.Generator().manual_seed(seed)
def digits(): return load_images('digits', 'train', 16)


class L1(nn.Module):
    def forward(self, a, b): return (a-b).abs().mean((1, 2, 3))


class Pairs:
    "Tokens in place of a store of `make_pairs`."
    def __init__(self, seed):
        self.rows, self.sources, self.made_by = torch.randint(64, (64, 16), generator=rng(seed)), torch.arange(64), {}
    def __len__(self): return 64
    def __getitem__(self, rows): return self.rows[rows]


def judge(**options):
    "LeCAM and its means weigh far more than in any preset."
    torch.manual_seed(0)
    return Adversary(PatchDiscriminator(8, 2), **dict(augment=False, lecam_weight=1., lecam_decay=.5) | options)


def semantics():
    torch.manual_seed(1)
    return SemanticTeacher(8, 16, 'vit_tiny_patch16_224', 8, pretrained=False)


def tokenizer(quantizer=None, teacher=True, adversary=True, augment=False, adaptive=True, **options):
    model, adversary = build_tokenizer(16, quantizer=quantizer, **SIZES['tokenizer']), judge(
        augment=augment, adaptive=adaptive) if adversary else None
    teacher = semantics() if teacher else None
    options = dict(perturbation=PerturbationSchedule(1., .5, 8), semantic_weight=5., warmup=0, discriminator_start=0.,
                   image_loss=ImageLoss(L1(), .3), precision='fp32') | options
    rows = train_tokenizer(model, digits(), adversary=adversary, teacher=teacher, **TRAINING | options)
    return nn.ModuleList(m for m in (model, adversary, teacher and teacher.project) if m is not None), rows


def autoencoder(augment=False, **options):
    model, adversary = build_autoencoder(**SIZES['autoencoder']), judge(augment=augment)
    rows = train_autoencoder(model, digits(), adversary=adversary, discriminator_start=.4, kl_weight=1., precision='fp32',
                             **TRAINING | options)
    return nn.ModuleList([model, adversary]), rows


def quantizer(augment=None, **options):
    model = build_quantizer(4, (1, 2, 3, 4), 64, attention_dim=16, entropy_weight=0.)
    store = Tokens(torch.randn(64, 4, 4, 4, generator=rng()), torch.zeros(64).long())
    return model, train_quantizer(model, store, clip=0., **TRAINING | options)


def coda(augment=False, **options):
    vae = build_autoencoder(**SIZES['autoencoder'])
    inject_lora(vae, inner_convolutions(vae.encoder, vae.decoder), 4, seed=0)
    model = CODA(vae, build_quantizer(4, (1, 2, 3, 4), 64, attention_dim=16, entropy_weight=0.))
    adversary = judge(augment=augment)
    rows = train_coda(model, digits(), adversary=adversary, perturbation=PerturbationSchedule(1., .5, 8), ramp=.9, clip=0.,
                      precision='fp32', **TRAINING | options)
    return nn.ModuleList([model, adversary]), rows


def decoder(augment=False, judged=True, **options):
    model, adversary = build_tokenizer(16, **SIZES['tokenizer']), judge(augment=augment)
    rows = post_train(model, Pairs(1), digits(), adversary=adversary, judged=Pairs(2) if judged else None, warmup=0,
                      precision='fp32', **TRAINING | options)
    return nn.ModuleList([model, adversary]), rows


def on_tokens(train, model, latents=False, augment=None, **options):
    torch.manual_seed(0)
    model, labels = model(), torch.randint(10, (64,), generator=rng(1))
    rows = torch.randn(64, 4, 4, 4, generator=rng()) if latents else torch.randint(32, (64, 16), generator=rng())
    return model, train(model, (rows, labels), precision='fp32', **dict(TRAINING, warmup=0) | options)


def rar(class_dropout=.1): return RAR(32, 16, 10, 32, 2, 2, dropout=0., attention_dropout=0., class_dropout=class_dropout)
generator = partial(on_tokens, train_generator, rar, clip=1e9)
masked = partial(on_tokens, train_masked, lambda: MaskedTransformer(32, num_tokens=16, num_classes=10, width=32, depth=2,
                                                                    heads=2, dropout=0.))
diffusion = partial(on_tokens, train_diffusion, lambda: SiT((4, 4, 4), 10, 32, 2, 2, patch_size=1), latents=True)
TRAINERS = dict(tokenizer=tokenizer, plain_tokenizer=partial(tokenizer, teacher=False, adversary=False), autoencoder=autoencoder,
                quantizer=quantizer, coda=coda, post_train=decoder, post_train_pairs=partial(decoder, judged=False),
                generator=generator, masked=masked, diffusion=diffusion)
every_trainer = pytest.mark.parametrize('train', TRAINERS.values(), ids=TRAINERS)


def gradients(module): return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, tolerance=1e-5):
    "Of the last step; each weight's to a share of its length, and of the length of all."
    assert found.keys() == expected.keys() and expected
    whole = torch.stack([g.norm() for g in expected.values()]).norm().item()
    for name, gradient in expected.items():
        assert (found[name]-gradient).norm() <= tolerance*(gradient.norm() + .1*whole), name
        assert found[name].norm().item() == pytest.approx(gradient.norm().item(), rel=tolerance, abs=.1*tolerance*whole), name


@every_trainer
def test_parts_give_the_gradients_of_one_pass(train):
    (whole, expected), (parts, rows) = train(), train(micro_batch_size=3)    # 3, 3, 3, 1
    assert_same_gradients(gradients(parts), gradients(whole))
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected): assert row == pytest.approx(other, rel=1e-4, abs=1e-5)


@every_trainer
def test_one_part_is_the_batch_to_the_bit(train):
    options = dict(augment=True, lr=1e-3)
    (whole, expected), *others = (train(micro_batch_size=size, **options) for size in (None, BATCH, 100))
    for module, rows in others:
        assert rows == expected
        for name, value in module.state_dict().items(): assert torch.equal(value, whole.state_dict()[name]), name


class Saved:
    "Bytes that graphs keep for their backward passes, weights apart: now, and at most."
    def __init__(self): self.now = self.most = 0

    def pack(self, tensor):
        saved, size = self, 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
        class Box:
            def __del__(self): saved.now -= size
        box = Box()
        box.tensor, self.now = tensor.detach(), self.now + size
        self.most = max(self.most, self.now)
        return box

    def hooks(self): return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor)


@every_trainer
def test_graphs_are_as_small_as_those_of_a_batch_of_that_size(train):
    peaks = []
    for options in (dict(), dict(micro_batch_size=2), dict(batch_size=2)):
        saved = Saved()
        with saved.hooks(): train(steps=2, **options)
        peaks.append(saved.most)
    whole, parts, small = peaks
    assert parts <= 1.05*small and parts < .5*whole


@every_trainer
@pytest.mark.parametrize('size', [0, -4, 2.5, True, '8'])
def test_a_size_that_is_none_is_refused(train, size):
    message = f'micro_batch_size must be an integer of at least 1, or None, got {size!r}'
    with pytest.raises(ValueError, match=re.escape(message)): train(micro_batch_size=size)


def test_parts_cover_the_batch():
    for count in range(1, 12):
        for largest in (None, *range(1, 14)):
            parts = micro_batches(count, largest)
            assert torch.cat([torch.arange(count)[rows] for rows, _ in parts]).tolist() == list(range(count))
            assert all((rows.stop-rows.start)/count == share for rows, share in parts)
            assert len(parts) == -(-count//min(largest or count, count))
    means = Means()
    for rows, share in micro_batches(10, 4): means.add(share, x=torch.arange(10.)[rows].mean().requires_grad_(), y=2.)
    assert means['x'].item() == pytest.approx(4.5) and means['y'] == pytest.approx(2.) and not means['x'].requires_grad


def test_both_runs_drop_the_same_units():
    "Dropout of a part is the same in both its runs, and another one in the next part."
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(.5), nn.Conv2d(8, 3, 3, padding=1))
    images, seen = digits()[[0]*6], []                                       # six times the same
    def forward(rows):
        out = Outputs(network(images[rows]))
        seen.append(out.reconstruction.detach())
        return out
    accumulate_gradients(forward, images, ImageLoss(), judge(), network[-1].weight, micro_batch_size=2)
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:]))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize('adversary', [None, 'fixed', 'adaptive'])
@pytest.mark.parametrize('joint', [False, True])
def test_only_what_ties_the_parts_is_run_twice(adversary, joint):
    network, images, calls = nn.Conv2d(3, 3, 3, padding=1), digits()[range(6)], []
    def forward(rows):
        calls.append(rows)
        return Outputs(out := network(images[rows]), other=torch.zeros(()), joint=(out.mean((2, 3)),) if joint else ())
    accumulate_gradients(forward, images, ImageLoss(), adversary and judge(adaptive=adversary == 'adaptive'), network.weight,
                         joint_loss=(lambda x: (x @ x.T).sigmoid().mean()) if joint else None, micro_batch_size=2)
    assert len(calls) == (6 if joint or adversary == 'adaptive' else 3)


def test_a_codebook_of_running_means_moves_once_per_part():
    "Two runs of every part, with the adaptive weight, leave the codebook of one run, without it."
    def codes(adaptive): return tokenizer(dict(ema_decay=.9, restart=.3, initialize='data'), teacher=False, adaptive=adaptive,
                                          steps=1, micro_batch_size=3)[0][0].quantizer.state_dict()
    once, twice = codes(False), codes(True)
    assert once['mean_counts'].ne(1).any()
    for name, value in once.items(): assert torch.equal(value, twice[name]), name


def test_logit_means_are_those_of_the_batch():
    images, fake = digits()[range(10)], digits()[range(10, 20)]*torch.linspace(.1, 1, 10)[:, None, None, None]
    adversaries = [judge() for _ in range(3)]
    losses = [train_discriminator(adversary, images, fake, torch.optim.SGD(adversary.parameters(), .1), size)
              for adversary, size in zip(adversaries, (None, 3, 1))]
    with torch.no_grad(): means = torch.stack([judge().logits(x).mean()/2 for x in (images, fake)])  # from 0, half way
    for adversary, loss in zip(adversaries, losses):
        torch.testing.assert_close(adversary.logit_means, means)
        torch.testing.assert_close(loss, losses[0])
        assert_same_gradients(gradients(adversary), gradients(adversaries[0]))


def test_a_run_goes_on_in_parts(tmp_path, monkeypatch):
    "Stopped after three of four steps in one pass, gone on in parts: refused by nothing, and close to the undisturbed run."
    real = tokpost.tokenizer.Loop
    monkeypatch.setattr(tokpost.tokenizer, 'Loop', lambda *a, **k: real(*a, **k, checkpoint_every=1))
    options = dict(steps=4, lr=1e-3)
    whole, _ = tokenizer(**options)
    step, calls = tokpost.tokenizer.train_discriminator, []
    def stops(*args):
        calls.append(0)
        if len(calls) == 4: raise KeyboardInterrupt
        return step(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokpost.tokenizer, 'train_discriminator', stops)
        tokenizer(folder=tmp_path, **options)
    resumed, rows = tokenizer(folder=tmp_path, micro_batch_size=4, **options)
    assert [row['step'] for row in rows] == list(range(4))
    assert_same_gradients(gradients(resumed), gradients(whole), tolerance=1e-3)


def test_a_folder_does_not_depend_on_the_size_of_parts():
    folder = Run('accumulation').folder
    assert folder('a', steps=3, losses=dict(adversary='dino')) == folder('a', steps=3, micro_batch_size=4, losses=dict(
        adversary='dino', micro_batch_size=2))
    assert folder('a', main_training=dict(steps=3)) == folder('a', main_training=dict(steps=3, micro_batch_size=2))
    assert folder('a', main_training=dict(steps=3)) != folder('a', main_training=dict(steps=4))


def everywhere(train, here):
    "Last gradients of a training that draws nothing, so that only the split of the batch differs."
    module, rows = train(batch_size=16, micro_batch_size=None if here.world == 1 else 3)         # 3, 3, 2 on each of two
    return gradients(module)


ACROSS = dict(tokenizer=partial(tokenizer, perturbation=None), generator=partial(on_tokens, train_generator, partial(rar, 0.), clip=1e9, randomness_start=0., randomness_stop=0.))


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "Folder in which two processes of torchrun left what they trained, and what they said."
    folder = tmp_path_factory.mktemp('two')
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run([*torchrun, __file__, folder], env=environ, text=True, timeout=600, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    return folder, done.stdout


@pytest.mark.parametrize('name', ACROSS)
def test_parts_on_two_processes_equal_one_pass_on_one(two, name):
    folder, said = two
    path = folder/f'{name}.pt'
    assert path.exists(), said[-3000:]
    assert_same_gradients(torch.load(path), everywhere(ACROSS[name], Processes('fp32')))


if __name__ == '__main__':
    from datetime import timedelta
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=120))
    here, folder = Processes('fp32'), Path(sys.argv[1])
    assert here.world == 2
    for name, train in ACROSS.items():
        result = everywhere(train, here)
        if here.is_main: torch.save(result, folder/f'{name}.pt')
