"Continuous autoencoders: sizes, names, posteriors, normalisation, training that resumes, and what is refused."
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tokpost.autoencoder as module
from tokpost.autoencoder import (Autoencoder, build_autoencoder, build_mar_kl16, draw_posterior, fit_weights, from_diffusers,
                                 kl_divergence, ldm_name, load_autoencoder, load_diffusers, load_mar_kl16, load_taef2,
                                 normalize_latents, read_weights, tiny_decoder, tiny_encoder, train_autoencoder,
                                 trained_autoencoder)
from tokpost.data import load_images
from tokpost.evaluate import Evaluation, reconstruction_scores
from tokpost.losses import ImageLoss, build_adversary
from tokpost.metrics import psnr
from tokpost.run import PRESETS, Run, fold, generator, load_state
from tokpost.tokens import tokenize

SIZES = dict(latent_channels=4, width=8, multipliers=(1, 2), blocks=1, attention=False)
FLUX = dict(down_block_types=['DownEncoderBlock2D']*4, up_block_types=['UpDecoderBlock2D']*4, layers_per_block=2,
            latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=.3611, shift_factor=.1159)


@pytest.fixture(scope='module')
def digits(): return load_images('digits', 'train', 16)


def count(part): return sum(p.numel() for p in part.parameters())


def noise(*shape, seed=0): return torch.rand(shape, generator=torch.Generator().manual_seed(seed))*2 - 1


def same(a, b): return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


# sizes and names of the finished ones

def test_parameter_counts():
    "Of the released files: MAR KL-16 66.46 M, FLUX 83.82 M, Stable Diffusion 83.65 M, TAESD 2.4 M, TAEF2 2.7 M."
    from diffusers import AutoencoderKL, AutoencoderTiny
    with torch.device('meta'):
        mar = from_diffusers(build_mar_kl16())
        flux = from_diffusers(AutoencoderKL(block_out_channels=[128, 256, 512, 512], **FLUX))
        sd = from_diffusers(AutoencoderKL(block_out_channels=[128, 256, 512, 512], **FLUX | dict(
            latent_channels=4, use_quant_conv=True, use_post_quant_conv=True, scaling_factor=.18215, shift_factor=None)))
        tiny = from_diffusers(AutoencoderTiny())
    assert [count(a) for a in (mar, flux, sd, tiny)] == [66_456_019, 83_819_683, 83_653_863, 2_445_063]
    assert [(a.latent_channels, a.factor) for a in (mar, flux, sd, tiny)] == [(16, 16), (16, 8), (4, 8), (4, 8)]
    assert (count(tiny_encoder()), count(tiny_decoder())) == (1_338_528, 1_338_499)


def ldm_shapes(width, channels=16, multipliers=(1, 1, 2, 2, 4)):
    "Names and shapes of LDM's AutoencoderKL as MAR builds it, written down without regard to the map."
    shapes = {}

    def conv(name, inputs, outputs, kernel=3):
        shapes[f'{name}.weight'], shapes[f'{name}.bias'] = (outputs, inputs, kernel, kernel), (outputs,)

    def norm(name, channels): shapes[f'{name}.weight'] = shapes[f'{name}.bias'] = (channels,)

    def resnet(name, inputs, outputs):
        norm(f'{name}.norm1', inputs)
        conv(f'{name}.conv1', inputs, outputs)
        norm(f'{name}.norm2', outputs)
        conv(f'{name}.conv2', outputs, outputs)
        if inputs != outputs: conv(f'{name}.nin_shortcut', inputs, outputs, 1)

    def attention(name, channels):
        norm(f'{name}.norm', channels)
        for part in ('q', 'k', 'v', 'proj_out'): conv(f'{name}.{part}', channels, channels, 1)

    def middle(part, channels):
        resnet(f'{part}.mid.block_1', channels, channels)
        attention(f'{part}.mid.attn_1', channels)
        resnet(f'{part}.mid.block_2', channels, channels)

    now, last = width, len(multipliers)-1
    conv('encoder.conv_in', 3, width)
    for level, multiplier in enumerate(multipliers):
        for block in range(2):
            resnet(f'encoder.down.{level}.block.{block}', now, multiplier*width)
            now = multiplier*width
            if level == last: attention(f'encoder.down.{level}.attn.{block}', now)
        if level < last: conv(f'encoder.down.{level}.downsample.conv', now, now)
    middle('encoder', now)
    norm('encoder.norm_out', now)
    conv('encoder.conv_out', now, 2*channels)
    conv('decoder.conv_in', channels, now)
    middle('decoder', now)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for block in range(3):
            resnet(f'decoder.up.{level}.block.{block}', now, multiplier*width)
            now = multiplier*width
        if level: conv(f'decoder.up.{level}.upsample.conv', now, now)
    norm('decoder.norm_out', now)
    conv('decoder.conv_out', now, 3)
    conv('quant_conv', 2*channels, 2*channels, 1)
    conv('post_quant_conv', channels, channels, 1)
    return shapes


def ldm_weights(width):
    "Weights that are a function of name and shape."
    def weight(name, shape):
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(fold(0, name)))
        if len(shape) > 1: return draw/torch.tensor(shape[1:]).prod()**.5
        return .1*draw + float('norm' in name and name.endswith('weight'))
    return {name: weight(name, shape) for name, shape in ldm_shapes(width).items()}


def test_the_fixture_names_what_the_official_module_names():
    "Digest of the sorted names and shapes of LTH14/mar's AutoencoderKL with 32 channels instead of 128."
    text = json.dumps(sorted((name, list(shape)) for name, shape in ldm_shapes(32).items()))
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == '73fdd984104ee938'


def test_mar_equals_the_official_module():
    "Moments and image that LTH14/mar's AutoencoderKL computes from the same weights."
    autoencoder = from_diffusers(fit_weights(build_mar_kl16(32), ldm_weights(32), 'kl16', ldm_name))
    z = torch.randn((1, 16, 2, 2), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean, log_variance = autoencoder.moments(noise(1, 3, 32, 32))
        image, latents = autoencoder.decode(z*.2325), autoencoder.encode(noise(1, 3, 32, 32))
    close = dict(rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(mean[0, :4, 0, 0], torch.tensor([.29053789, .13718021, -.37045559, .19116257]), **close)
    torch.testing.assert_close(log_variance[0, :4, 1, 1], torch.tensor([-.08030757, .63292813, -.10928749, .17086768]), **close)
    torch.testing.assert_close(image[0, :, 5, 7], torch.tensor([.57567501, .28140581, -1.18516481]), **close)
    assert (image.std().item(), mean.std().item()) == pytest.approx((.47020811, .36958423), rel=1e-4)
    torch.testing.assert_close(latents, mean*.2325)


def test_every_name_is_mapped_to_its_own():
    with torch.device('meta'): names = list(build_mar_kl16().state_dict())
    assert sorted(map(ldm_name, names)) == sorted(ldm_shapes(128))


@pytest.mark.parametrize('suffix', ['.safetensors', '.ckpt'])
def test_mar_from_its_released_formats(tmp_path, monkeypatch, suffix):
    real = module.build_mar_kl16
    monkeypatch.setattr(module, 'build_mar_kl16', lambda: real(32))
    state, path = ldm_weights(32), tmp_path/f'kl16{suffix}'
    save_file(state, path) if suffix == '.safetensors' else torch.save({'model': state}, path)
    autoencoder = load_autoencoder(path)
    assert torch.equal(autoencoder.encoder[0].conv_in.weight, state['encoder.conv_in.weight'])
    assert torch.equal(autoencoder.last_layer, state['decoder.conv_out.weight'])
    attention = autoencoder.encoder[0].down_blocks[4].attentions[1].to_k.weight
    assert torch.equal(attention, state['encoder.down.4.attn.1.k.weight'][..., 0, 0])


def test_diffusers_agree(tmp_path):
    from diffusers import AutoencoderKL, AutoencoderTiny
    torch.manual_seed(0)
    images = noise(2, 3, 32, 32)
    kinds = [AutoencoderKL(block_out_channels=[32]*4, **FLUX), AutoencoderTiny(), AutoencoderKL(
        block_out_channels=[32]*4, **FLUX | dict(shift_factor=None, scaling_factor=1., use_quant_conv=True,
        use_post_quant_conv=True, latents_mean=[.1*i for i in range(16)], latents_std=[1+i for i in range(16)]))]
    for vae, shift, scale in zip(kinds, (.1159, 0, kinds[2].config.latents_mean), (.3611, 1, [1/(1+i) for i in range(16)])):
        autoencoder, vae = from_diffusers(vae), vae.eval()
        shift, scale = (torch.tensor(x).view(-1, 1, 1) for x in (shift, scale))
        with torch.no_grad():
            theirs = vae.encode(images)
            theirs = theirs.latents if isinstance(vae, AutoencoderTiny) else theirs.latent_dist.mode()
            z = autoencoder.encode(images)
            torch.testing.assert_close(z, (theirs-shift)*scale)
            torch.testing.assert_close(autoencoder.decode(z), vae.decode(theirs).sample, rtol=1e-4, atol=1e-4)
        assert autoencoder.last_layer.shape[0] == 3


def test_files_of_diffusers(tmp_path):
    from diffusers import AutoencoderKL, AutoencoderTiny
    vae, images = AutoencoderKL(block_out_channels=[32]*4, **FLUX), noise(1, 3, 16, 16)
    vae.save_pretrained(tmp_path/'vae')
    torch.testing.assert_close(load_autoencoder(tmp_path, 'vae').encode(images), from_diffusers(vae).encode(images))
    with pytest.raises(FileNotFoundError, match='fetch config.json and diffusion_pytorch_model.safetensors'): load_diffusers(tmp_path)
    AutoencoderTiny().save_pretrained(tmp_path/'tiny')
    (tmp_path/'vae/diffusion_pytorch_model.safetensors').write_bytes((tmp_path/'tiny/diffusion_pytorch_model.safetensors').read_bytes())
    with pytest.raises(ValueError, match='is of another model: .* differ at decoder'): load_diffusers(tmp_path/'vae')
    (tmp_path/'config.json').write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match='must hold an AutoencoderKL or an AutoencoderTiny, got UNet2DModel'): load_diffusers(tmp_path)


DATA = Path(os.getenv('TOKPOST_DATA', '.'))
needs_taef2 = pytest.mark.skipif(not ((DATA/'taef2').exists() and (DATA/'imagenet-sample-256').exists()),
                                 reason='TOKPOST_DATA holds no taef2 and imagenet-sample-256')


@needs_taef2
def test_taef2_reconstructs_real_images():
    autoencoder, images = load_taef2(), load_images('imagenet-sample-256', 'validation', 256)[[0, 60, 97]]
    with torch.no_grad():
        z = autoencoder.encode(images)
        assert psnr(autoencoder.decode(z).clamp(-1, 1), images).mean() > 28
        assert torch.equal(z, autoencoder.encode(images, 'sample'))
    assert z.shape == (3, 32, 32, 32) and abs(z.mean()) < .1 and abs(z.std()-.84) < .05


def test_taef2_from_its_files(tmp_path):
    parts = dict(encoder=tiny_encoder(), decoder=tiny_decoder())
    with pytest.raises(FileNotFoundError, match='taef2_encoder.pth; fetch them from github.com/madebyollin/taesd and put them there'):
        load_taef2(tmp_path)
    for name, part in parts.items():
        torch.save({key: value.half() for key, value in part.state_dict().items()}, tmp_path/f'taef2_{name}.pth')
    autoencoder, images = load_taef2(tmp_path), noise(1, 3, 16, 24)
    with torch.no_grad():
        z = autoencoder.encode(images)
        torch.testing.assert_close(z, parts['encoder']((images+1)/2), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(autoencoder.decode(100*z), 2*parts['decoder'](100*z)-1, rtol=1e-2, atol=2e-2)
    assert z.shape == (1, 32, 2, 3)
    (tmp_path/'taef2_encoder.pth').write_bytes((tmp_path/'taef2_decoder.pth').read_bytes())
    with pytest.raises(ValueError, match=r'another model: 0.weight has nothing there, \(64, 3, 3, 3\) here'): load_taef2(tmp_path)


# posterior and normalisation

class Moments(nn.Module):
    "An encoder that emits given moments."
    def __init__(self, mean, log_variance): super().__init__(); self.moments = torch.cat([mean, log_variance], 1)
    def forward(self, images): return self.moments


def test_posterior_statistics():
    mean = torch.linspace(-1, 1, 4)[None, :, None, None].expand(1, 4, 200, 200)
    log_variance = torch.tensor([-40., -2., 0., 1.])[None, :, None, None].expand(1, 4, 200, 200)
    autoencoder = Autoencoder(Moments(mean, log_variance), nn.Identity(), 4, 1, scale=2., shift=[0., 1., 2., 3.])
    images, shift = torch.zeros(1, 3, 200, 200), torch.arange(4.)
    z = autoencoder.encode(images, 'sample', generator(0))[0].flatten(1)
    deviation = torch.tensor([-30., -2., 0., 1.]).div(2).exp()                       # clamped at -30
    standard_error = 2*deviation/200
    assert ((z.mean(1) - 2*(mean[0, :, 0, 0]-shift)).abs() < 4*standard_error + 1e-5).all()
    assert z.std(1).div(2*deviation).sub(1).abs()[1:].amax() < 4/(2*200**2)**.5 and z[0].std() < 1e-5
    torch.testing.assert_close(autoencoder.encode(images)[0, :, 0, 0], 2*(mean[0, :, 0, 0]-shift))
    assert torch.equal(z, autoencoder.encode(images, 'sample', generator(0))[0].flatten(1))
    assert not torch.equal(z, autoencoder.encode(images, 'sample', generator(1))[0].flatten(1))


def test_a_generator_leaves_the_global_one_alone():
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    draw_posterior(torch.zeros(2, 3), torch.zeros(2, 3), generator(0))
    assert torch.equal(first, torch.rand(3))


def test_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (log_variance/2).exp()), normal(0., 1.)).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)
    assert kl_divergence(mean, None).eq(0).all()


def test_normalised_latents_and_round_trip(digits):
    autoencoder, some = build_autoencoder(**SIZES), digits[range(8)]
    before = autoencoder.decode(autoencoder.encode(some)).detach()
    latents = torch.cat([autoencoder.moments(digits[rows])[0].detach() for rows in torch.arange(len(digits)).split(200)])
    normalize_latents(autoencoder, digits, len(digits))
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(some)).detach(), before, rtol=1e-3, atol=1e-4)
    z = autoencoder.normalize(latents)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and z.var((0, 2, 3)).mean().item() == pytest.approx(1, abs=1e-3)
    assert autoencoder.scale.unique().numel() == 1
    half = Autoencoder(autoencoder.encoder, autoencoder.decoder, 4, 2)
    normalize_latents(half, digits, len(digits), batch_size=7)
    torch.testing.assert_close(half.scale, autoencoder.scale, rtol=1e-4, atol=1e-4)


def test_images_in_another_range():
    inner = Autoencoder(nn.Identity(), nn.Identity(), 3, 1, image_range=(0., 1.))
    images = noise(1, 3, 4, 4)
    torch.testing.assert_close(inner.encode(images), (images+1)/2)
    torch.testing.assert_close(inner.decode((images+1)/2), images)


def test_gradients_flow_both_ways():
    autoencoder, images = build_autoencoder(**SIZES), noise(2, 3, 16, 16).requires_grad_()
    autoencoder.decode(autoencoder.encode(images, 'sample')).square().mean().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is not None for p in autoencoder.parameters())
    assert autoencoder.last_layer is autoencoder.decoder[-1].weight


# training

def trained(digits, folder=None, **options):
    autoencoder = build_autoencoder(**SIZES)
    options = dict(steps=6, batch_size=16, lr=1e-3, warmup=2, adversary=build_adversary('patch', 16, 8),
                   discriminator_start=.3, precision='fp32') | options
    return autoencoder, train_autoencoder(autoencoder, digits, folder=folder, **options)


def test_same_seed_same_weights():
    a, b, c = (build_autoencoder(seed=seed, **SIZES).state_dict() for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c)


def test_same_seed_same_training(digits):
    a, b, c = (trained(digits, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c)


def test_it_learns_and_ends_normalised(digits):
    autoencoder, rows = trained(digits, steps=60, lr=4e-3, adversary=None)
    assert rows[-1]['loss'] < rows[0]['loss']/2 and not autoencoder.training
    z = autoencoder.encode(digits[range(200)])
    assert abs(z.mean()) < .1 and abs(z.std()-1) < .1


def test_the_weight_of_the_divergence(digits):
    "Light, the divergence hardly enters the loss; heavy, it becomes small."
    light, heavy = (trained(digits, steps=60, lr=4e-3, adversary=None, kl_weight=w)[1][-1] for w in (1e-6, 10.))
    assert heavy['kl'] < light['kl']/5 and light['loss'] == pytest.approx(light['l2'], rel=1e-2)


@pytest.mark.parametrize('options', [dict(adversary=None), dict(clip=1.), dict(augment=True)])
def test_each_part_can_be_off(digits, options):
    _, rows = trained(digits, **options)
    assert len(rows) == 6 and ('adversarial' in rows[-1]) == ('adversary' not in options)


def test_killed_and_resumed_equals_undisturbed(digits, tmp_path, monkeypatch):
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
    finished, _ = trained(digits, tmp_path/'whole')
    assert same(whole.state_dict(), finished.state_dict())
    with pytest.raises(ValueError, match='kl_weight=1e-06, this run has kl_weight=0.1'): trained(digits, tmp_path/'whole', kl_weight=.1)


def test_a_loss_that_is_no_number_stops(digits, tmp_path):
    class Bad(nn.Module):
        def forward(self, a, b): return (a-b).flatten(1).square().mean(1)*float('nan')
    with pytest.raises(FloatingPointError, match='autoencoder: the loss is not finite at step 0'):
        trained(digits, tmp_path, image_loss=ImageLoss(Bad()))


# the preset's

@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'settings.ini').touch()
    changes = {'autoencoder_training.steps': 3, 'evaluation.reconstructions': 64}
    return Run('test', 'smoke', changes=changes)


def test_preset_trains_scores_and_tokenizes(run):
    evaluation = Evaluation(run)
    autoencoder, adversary, name = trained_autoencoder(run, evaluation)
    again, _, same_name = trained_autoencoder(run, evaluation)
    assert same(autoencoder.state_dict(), again.state_dict()) and name == same_name and adversary is not None
    other = trained_autoencoder(run, evaluation, latent_channels=2)
    assert other[0].latent_channels == 2 and other[2] != name
    scores = reconstruction_scores(evaluation, autoencoder)
    assert scores['n'] == 64 and 'bits' not in scores
    store = tokenize(run, autoencoder, evaluation.validation, name)
    assert store.latents.shape[1:] == (4, 4, 4)
    assert torch.allclose(store[[0, 1]], autoencoder.encode(evaluation.validation[range(2)]), atol=1e-5)


def test_preset_takes_a_finished_one(run, tmp_path, monkeypatch):
    "One without a scale of its own is normalised on training images, once."
    for name, part in dict(encoder=tiny_encoder(), decoder=tiny_decoder()).items():
        (tmp_path/'taef2').mkdir(exist_ok=True)
        torch.save(part.state_dict(), tmp_path/f'taef2/taef2_{name}.pth')
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path))
    evaluation, run.size['autoencoder'] = Evaluation(run), dict(pretrained='taef2')
    autoencoder, adversary, name = trained_autoencoder(run, evaluation)
    z = autoencoder.encode(evaluation.train[range(0, 1000, 10)])
    assert adversary is None and autoencoder.latent_channels == 32 and abs(z.mean()) < .1 and abs(z.std()-1) < .2
    monkeypatch.setattr(module, 'normalize_latents', None)
    again, _, same_name = trained_autoencoder(run, evaluation)
    assert same(autoencoder.state_dict(), again.state_dict()) and name == same_name


def test_full_preset_says_what_to_fetch(run, tmp_path, monkeypatch):
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path))
    evaluation, run.size['autoencoder'] = Evaluation(run), PRESETS['full']['autoencoder']
    with pytest.raises(FileNotFoundError, match=r'no weights at .*mar/kl16.safetensors; fetch them from huggingface.co/jadechoghari/mar'):
        trained_autoencoder(run, evaluation)


# what is refused

@pytest.mark.parametrize('shape', [(3, 16, 16), (1, 1, 16, 16), (1, 3, 17, 16), (1, 3, 16, 15)])
def test_images_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r'images must be \(B, 3, H, W\) with sides that are multiples of 2, got'):
        build_autoencoder(**SIZES).encode(torch.zeros(shape))


def test_bad_input(digits, tmp_path):
    autoencoder = build_autoencoder(**SIZES)
    for bad in (2., float('nan')):
        with pytest.raises(ValueError, match=r'images must be in \[-1, 1\], got'): autoencoder.encode(torch.full((1, 3, 16, 16), bad))
    with pytest.raises(ValueError, match="posterior must be 'mode' or 'sample', got 'mean'"): autoencoder.encode(noise(1, 3, 16, 16), 'mean')
    for shape in ((1, 5, 8, 8), (4, 8, 8)):
        with pytest.raises(ValueError, match=r'z must be \(B, 4, h, w\), got'): autoencoder.decode(torch.zeros(shape))
    for scale in (0., -1., float('inf'), [1., 2.]):
        with pytest.raises(ValueError, match='scale must be a positive number or 4 of them, got'): autoencoder.set_normalization(scale, 0.)
    with pytest.raises(ValueError, match='shift must be a number or 4 of them'): autoencoder.set_normalization(1., float('nan'))
    with pytest.raises(ValueError, match='kl_weight must be at least 0, got -1'): train_autoencoder(autoencoder, digits, 1, kl_weight=-1)
    with pytest.raises(ValueError, match='steps must be at least 1, got 0'): train_autoencoder(autoencoder, digits, 0)
    with pytest.raises(ValueError, match='vae must be an AutoencoderKL or an AutoencoderTiny, got Linear'): from_diffusers(nn.Linear(1, 1))
    (tmp_path/'x.safetensors').write_bytes(b'no weights')
    (tmp_path/'x.ckpt').write_bytes(b'no weights')
    for name in ('x.safetensors', 'x.ckpt'):
        with pytest.raises(ValueError, match='cannot be read as weights'): read_weights(tmp_path/name, 'there')
    torch.save({'model': nn.Conv2d(3, 4, 3)}, tmp_path/'code.ckpt')
    with pytest.raises(ValueError, match='cannot be read as weights'): read_weights(tmp_path/'code.ckpt', 'there')


def test_a_checkpoint_of_another_vae_is_refused(tmp_path):
    torch.save(tiny_encoder().state_dict(), tmp_path/'kl16.ckpt')
    with pytest.raises(ValueError, match=r'kl16.ckpt is of another model: encoder.conv_in.weight has nothing there, \(128, 3, 3, 3\) here'):
        load_mar_kl16(tmp_path/'kl16.ckpt')
    state = ldm_weights(32)
    with pytest.raises(ValueError, match='loss.weight has .* there, nothing here'):
        fit_weights(build_mar_kl16(32), state | {'loss.weight': torch.zeros(1)}, 'kl16', ldm_name)
    del state['quant_conv.bias']
    with pytest.raises(ValueError, match='quant_conv.bias has nothing there'): fit_weights(build_mar_kl16(32), state, 'kl16', ldm_name)


@pytest.mark.parametrize('other', [dict(warmup=2), dict(final_lr=.5), dict(clip=1.), dict(ema_horizon=.5), dict(augment=True)])
def test_a_checkpoint_of_another_recipe_is_refused(digits, tmp_path, other):
    recipe = dict(steps=1, batch_size=4, lr=1e-3, warmup=0, folder=tmp_path/'run', precision='fp32')
    small = dict(latent_channels=2, width=8, multipliers=(1, 2), blocks=1, attention=False)
    train_autoencoder(build_autoencoder(**small), digits, **recipe)
    with pytest.raises(ValueError, match=f'was made with {next(iter(other))}='):
        train_autoencoder(build_autoencoder(**small), digits, **recipe | other)


@pytest.mark.parametrize('content', [torch.zeros(3), dict(a=torch.zeros(3), epoch=3), [torch.zeros(3)]])
def test_files_without_tensors_by_name_are_refused(tmp_path, content):
    torch.save(content, tmp_path/'kl16.pt')
    with pytest.raises(ValueError, match='must hold tensors by name'): load_mar_kl16(tmp_path/'kl16.pt')
