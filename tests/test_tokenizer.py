"Networks, main training, and what it must leave alone."
import os
import signal

import pytest
import torch
import torch.nn.functional as F

from tokpost.data import load_images
from tokpost.losses import ImageLoss, backward, build_adversary
from tokpost.networks import cnn_decoder, cnn_encoder
from tokpost.perturbation import PerturbationSchedule
from tokpost.run import PRESETS, load_state
from tokpost.tokenizer import SemanticTeacher, ViTDecoder, ViTEncoder, build_tokenizer, train_tokenizer

SIZES = PRESETS['smoke']['tokenizer']
TINY = dict(model='vit_tiny_patch16_224', patch_size=8, pretrained=False)


@pytest.fixture(scope='module')
def digits(): return load_images('digits', 'train', 16)


def trained(digits, folder=None, **options):
    tokenizer = build_tokenizer(16, **SIZES)
    options = dict(steps=6, batch_size=16, lr=1e-3, warmup=2, adversary=build_adversary('patch', 16, 8),
                   discriminator_start=.3, perturbation=PerturbationSchedule(1., .3, 4), precision='fp32') | options
    rows = train_tokenizer(tokenizer, digits, folder=folder, **options)
    return tokenizer, rows


def same(a, b): return all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize('side, multipliers', [(16, (1, 2)), (32, (1, 2, 2)), (24, (1, 1, 2, 2))])
def test_convolutional_shapes(side, multipliers):
    factor = 2**(len(multipliers)-1)
    z = cnn_encoder(5, 8, multipliers, 1)(torch.zeros(2, 3, side, side))
    assert z.shape == (2, 5, side//factor, side//factor)
    assert cnn_decoder(5, 8, multipliers, 1)(z).shape == (2, 3, side, side)


def test_vqgan_sizes():
    "The encoder and decoder of VQGAN f16 at ImageNet size, within a few percent of taming's 29.3 M and 42.5 M."
    with torch.device('meta'): sizes = [sum(p.numel() for p in part(256).parameters())/1e6 for part in (cnn_encoder, cnn_decoder)]
    assert sizes == pytest.approx([29.3, 42.5], rel=.1)


def test_vit_latents_read_the_image_and_pixels_read_the_latents():
    torch.manual_seed(0)
    encoder, decoder = ViTEncoder(8, image_size=32, **TINY).eval(), ViTDecoder(8, image_size=32, **TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    z = encoder(images)
    changed = images.clone()
    changed[0, :, :8, :8] += 1
    moved = (encoder(changed)-z).abs().flatten(1).sum(1)
    assert moved[0] > 0 and moved[1] == 0
    pixels = decoder(z)
    z2 = z.clone()
    z2[0, :, 3, 3] += 1
    assert (decoder(z2)-pixels)[0].abs().amax(0).gt(0).all() and torch.equal(decoder(z2)[1], pixels[1])
    assert encoder.queries.shape == (1, 16, 192) and encoder.levels.shape == (2, 192)


def test_patches_land_where_they_belong():
    decoder = ViTDecoder(8, image_size=32, **TINY).eval()
    decoder.transform = lambda first, second: F.one_hot(torch.arange(17).clamp(max=191), 192).float().expand(len(first), -1, -1)
    with torch.no_grad():
        decoder.pixels.weight.zero_()
        decoder.pixels.bias.zero_()
        decoder.pixels.weight[:, 6] = 1                                  # position 6: class token, then patch 5
    image = decoder(torch.zeros(1, 8, 4, 4))[0, 0]
    assert image[8:16, 8:16].eq(1).all() and image.sum() == 64


@pytest.mark.parametrize('architecture', ['cnn', 'vit'])
def test_every_weight_learns_and_every_frozen_one_does_not(architecture, digits):
    options = dict(SIZES) if architecture == 'cnn' else dict(architecture='vit', codebook_size=64, code_dim=8, **TINY)
    tokenizer = build_tokenizer(16, **options).train()
    teacher = SemanticTeacher(8, 16, 'vit_tiny_patch16_224', 8, pretrained=False).train()
    images = digits[range(8)]
    z_q, _, losses = tokenizer.quantizer(tokenizer.features(images))
    from tokpost.losses import semantic_loss
    other = sum(losses.values()) + semantic_loss(z_q.mean(1), teacher(images))
    backward(tokenizer.decode_codes(z_q), images, ImageLoss(), None, None, other)
    assert [n for n, p in tokenizer.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in teacher.network.parameters()) and teacher.project.weight.grad is not None


def test_same_seed_same_bytes_another_seed_others(digits):
    a, b, c = (trained(digits, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c)


def test_no_perturbation_is_perturbation_of_no_images(digits):
    clean, none, all_ = (trained(digits, adversary=None, perturbation=schedule)[0].state_dict() for schedule in (
        None, PerturbationSchedule(1., 0., 4), PerturbationSchedule(1., 1., 4)))
    assert same(clean, none) and not same(clean, all_)


@pytest.mark.parametrize('options', [dict(adversary=None), dict(perturbation=None), dict(clip=1.), dict(augment=True)])
def test_each_part_can_be_off(digits, options):
    _, rows = trained(digits, **options)
    assert len(rows) == 6 and ('adversarial' in rows[-1]) == ('adversary' not in options)


def test_ends_with_the_average(digits, tmp_path):
    tokenizer, _ = trained(digits, tmp_path)
    state = load_state(tmp_path/'checkpoint.safetensors')['parts']
    average = {name[7:]: value for name, value in state['ema'].items() if name.startswith('module.')}
    assert same(tokenizer.state_dict(), average) and not same(tokenizer.state_dict(), state['tokenizer'])


def test_killed_and_resumed_equals_undisturbed(digits, tmp_path, monkeypatch):
    import tokpost.tokenizer as module
    real, calls = module.Loop, []
    monkeypatch.setattr(module, 'Loop', lambda *a, **k: real(*a, **k, checkpoint_every=2))
    whole, _ = trained(digits, tmp_path/'whole')
    pid = os.fork()
    if pid == 0:
        step = module.train_discriminator
        def dies(*args):
            calls.append(0)
            if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)
        module.train_discriminator = dies
        trained(digits, tmp_path/'killed')
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert load_state(tmp_path/'killed/checkpoint.safetensors')['step'] == 4
    resumed, rows = trained(digits, tmp_path/'killed')
    assert same(whole.state_dict(), resumed.state_dict()) and [row['step'] for row in rows] == list(range(6))


def test_checkpoint_of_another_size_is_refused(digits, tmp_path):
    trained(digits, tmp_path)
    with pytest.raises(ValueError, match='batch_size=16, this run has batch_size=8'): trained(digits, tmp_path, batch_size=8)


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(digits, tmp_path):
    class Bad(torch.nn.Module):
        def forward(self, a, b): return (a-b).flatten(1).square().mean(1)*float('nan')
    with pytest.raises(FloatingPointError, match='main training: the loss is not finite at step 0'):
        trained(digits, tmp_path, image_loss=ImageLoss(Bad()))
    assert not (tmp_path/'checkpoint.safetensors').exists()


def test_bad_input(digits):
    tokenizer = build_tokenizer(16, **SIZES)
    with pytest.raises(ValueError, match=r'images must be \(B, 3, 16, 16\), got \(2, 3, 8, 8\)'): tokenizer.encode(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r'images must be in \[-1, 1\]'): tokenizer.encode(2*torch.ones(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r'indices must be in \[0, 64\), got \[64, 64\]'): tokenizer.decode(torch.full((1, 16), 64))
    with pytest.raises(ValueError, match="got 'mlp'"): build_tokenizer(16, 64, 8, 'mlp')
    with pytest.raises(ValueError, match="got 'gan'"): build_adversary('gan')


@pytest.mark.parametrize('other', [dict(warmup=2), dict(final_lr=.5), dict(clip=1.), dict(ema_horizon=.5), dict(augment=True),
                                   dict(perturbation=PerturbationSchedule(delta=4))])
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, other):
    recipe, digits = dict(steps=1, batch_size=4, lr=1e-3, warmup=0, folder=tmp_path/'run'), load_images('digits', 'validation', 16)
    train_tokenizer(build_tokenizer(16, **SIZES), digits, **recipe)
    with pytest.raises(ValueError, match=f'was made with {next(iter(other))}='):
        train_tokenizer(build_tokenizer(16, **SIZES), digits, **recipe | other)
