"Adapters, the discrete autoencoder, and the faults of the official training."
import copy, math, os, signal, subprocess, sys
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch import nn
import tokpost.coda as coda_module
from tokpost.autoencoder import build_autoencoder, build_mar_kl16, from_diffusers
from tokpost.coda import (CODA, LoRAConv2d, adapters, build_quantizer, inject_lora, inner_convolutions, load_adapters,
                          load_coda, lora_convolutions, lora_parameters, merge_lora, running_order, save_adapters,
                          save_coda, train_coda, train_quantizer, trained_coda)
from tokpost.data import load_images, make_token_store
from tokpost.losses import ImageLoss, accumulate_gradients, backward, build_adversary
from tokpost.post_train import post_train
from tokpost.run import Processes, load_state, save_state
from tokpost.tokens import Tokens

MAR = 'conv1', 'conv2', 'upsample', 'downsample'
FLUX = 'conv1', 'conv2'


def rng(seed=0): return torch.Generator().manual_seed(seed)

def small_vae(seed=0, width=8): return build_autoencoder(4, width, (1, 2, 2), blocks=1, attention=False, seed=seed).eval()

def adapted(seed=0, rank=2, sides=(1, 2, 4), assignment='attention', **options):
    coda = CODA(small_vae(), build_quantizer(4, sides, 16, assignment, 8, seed=seed, **options))
    if rank: inject_lora(coda.autoencoder, inner_convolutions(coda.autoencoder.encoder, coda.decoder), rank, seed=seed)
    return coda.eval()

def excite(module, seed=0, std=.1):
    "As if trained: adapters that do something."
    for p in lora_parameters(module): nn.init.normal_(p, std=std, generator=rng(seed))
    return module

def state(module): return {name: value.clone() for name, value in module.state_dict().items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def flux():
    from diffusers import AutoencoderKL
    return AutoencoderKL(3, 3, ('DownEncoderBlock2D',)*4, ('UpDecoderBlock2D',)*4, (128, 256, 512, 512), 2,
                         latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)

@pytest.fixture(scope='module')
def digits(): return load_images('digits', 'train', 16)

@pytest.fixture(scope='module')
def latents(digits):
    with torch.no_grad(): return Tokens(small_vae().encode(digits[range(256)]), digits.labels[:256])


# adapters

CONVOLUTIONS = [dict(kernel_size=3, padding=1), dict(kernel_size=4, stride=2, padding=1), dict(kernel_size=3, stride=2),
                dict(kernel_size=3, padding='same', dilation=2, bias=False), dict(kernel_size=(1, 3), padding=(0, 1)),
                dict(kernel_size=5, padding=2, padding_mode='circular')]

@pytest.mark.parametrize('options', CONVOLUTIONS, ids=str)
def test_an_adapter_is_two_convolutions_beside_one(options):
    conv, x = nn.Conv2d(6, 10, **options), torch.randn(2, 6, 12, 12, generator=rng())
    lora = LoRAConv2d(conv, rank=3, scale=.7)
    assert torch.equal(lora(x), conv(x)) and lora.weight is conv.weight
    for p in lora.adapter.parameters(): nn.init.normal_(p, std=.1, generator=rng())
    down, up = (part.weight for part in lora.adapter)
    circular = 'padding_mode' in options
    padded = F.pad(x, (2,)*4, mode='circular') if circular else x
    beside = F.conv2d(F.conv2d(padded, down, None, conv.stride, 0 if circular else conv.padding, conv.dilation), up)
    torch.testing.assert_close(lora(x), conv(x) + .7*beside)
    merged = lora.merged()
    torch.testing.assert_close(merged(x), lora(x), rtol=1e-5, atol=1e-5)
    assert merged.state_dict().keys() == conv.state_dict().keys()

def test_initial_weights_of_the_paper():
    "D ~ N(0, 1/r²), U zero; a function of seed and path, whatever else is adapted."
    one, two, other = (nn.ModuleDict(dict(a=nn.Conv2d(64, 64, 3), b=nn.Conv2d(64, 64, 3))) for _ in range(3))
    inject_lora(one, ('a', 'b'), rank=8, seed=3)
    inject_lora(two, 'b', rank=8, seed=3)
    inject_lora(other, 'b', rank=8, seed=4)
    down, up = (part.weight for part in one['b'].adapter)
    assert down.std().item() == pytest.approx(1/8, rel=.03) and abs(down.mean()) < 4/8/math.sqrt(down.numel())
    assert up.eq(0).all() and torch.equal(down, two['b'].adapter[0].weight)
    assert not torch.equal(down, other['b'].adapter[0].weight) and not torch.equal(down, one['a'].adapter[0].weight)

@pytest.mark.parametrize('match', [MAR, 'inner'], ids=str)
def test_mar_recipe_counts(match):
    with torch.device('meta'): vae = build_mar_kl16()
    vae = from_diffusers(vae)
    paths = inject_lora(vae, inner_convolutions(vae.encoder, vae.decoder) if match == 'inner' else match)
    assert [sum(path.startswith(part) for path in paths) for part in ('encoder', 'decoder')] == [28, 38]
    assert sum(p.numel() for p in lora_parameters(vae)) == 6_021_120

def test_flux_recipe_counts():
    with torch.device('meta'): vae = flux()
    vae = from_diffusers(vae)
    paths = inject_lora(vae, FLUX)
    assert [sum(path.startswith(part) for path in paths) for part in ('encoder', 'decoder')] == [20, 28]
    assert sum(p.numel() for p in lora_parameters(vae)) == 5_816_320

def test_a_fresh_adapter_changes_nothing_and_a_merged_one_is_the_same(digits):
    base, vae, x = small_vae(), small_vae(), digits[range(8)]
    inject_lora(vae, inner_convolutions(vae.encoder, vae.decoder), rank=3, scale=.5)
    z = base.encode(x)
    assert torch.equal(vae.encode(x), z) and torch.equal(vae.decode(z), base.decode(z))
    excite(vae)
    apart = vae.encode(x), vae.decode(z)
    assert not torch.equal(apart[0], z)
    paths = merge_lora(vae)
    for a, b in zip((vae.encode(x), vae.decode(z)), apart): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(paths) == 30 and not lora_convolutions(vae) and vae.state_dict().keys() == base.state_dict().keys()

def test_names_of_the_base_stay():
    base, vae = small_vae(seed=1), small_vae()
    paths = inject_lora(vae, 'body', rank=2)
    missing, unexpected = vae.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all('.adapter.' in name for name in missing) and len(missing) == 2*len(paths)
    assert same({name: value for name, value in vae.state_dict().items() if '.adapter.' not in name}, base.state_dict())

def test_only_adapters_learn(digits):
    vae = small_vae()
    inject_lora(vae, 'body', rank=2)
    excite(vae)
    vae.decode(vae.encode(digits[range(4)])).square().mean().backward()
    learning = {id(p) for p in lora_parameters(vae)}
    for p in vae.parameters(): assert (p.grad is not None) == p.requires_grad == (id(p) in learning)

def test_a_shared_convolution_gets_one_adapter():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.ModuleDict(dict(a=nn.Sequential(conv), b=nn.Sequential(conv)))
    inject_lora(net, lambda path, conv: True, rank=2)
    assert net['a'][0] is net['b'][0] and len(lora_parameters(net)) == 2
    merge_lora(net)
    assert net['a'][0] is net['b'][0] and type(net['a'][0]) is nn.Conv2d

def test_adapters_come_in_the_order_that_is_asked_for():
    vae = excite_injected()
    paths = list(lora_convolutions(vae))
    chosen = adapters(vae, paths[::-1][:3])
    assert list(chosen) == [path.replace('.', '/') for path in paths[::-1][:3]]
    assert list(chosen.parameters())[0] is lora_convolutions(vae)[paths[-1]].adapter[0].weight

def excite_injected(seed=0, **options):
    vae = small_vae(seed, **options)
    inject_lora(vae, 'body', rank=2, scale=.5)
    return excite(vae)

def test_adapters_saved_and_loaded(digits, tmp_path):
    vae, x = excite_injected(), digits[range(4)]
    path, fresh, half = save_adapters(vae, tmp_path/'a.safetensors'), small_vae(), small_vae().to(torch.bfloat16).float()
    assert load_adapters(fresh, path) == list(lora_convolutions(vae))
    assert torch.equal(fresh.encode(x), vae.encode(x)) and same(fresh.state_dict(), vae.state_dict())
    assert load_adapters(half, path)                                         # rounded weights are no other autoencoder
    assert path.stat().st_size < 60_000                                      # without the autoencoder

@pytest.mark.parametrize('other, why', [(dict(seed=1), 'has other weights here'), (dict(width=16), r'has weights \(\d+'),])
def test_adapters_of_another_autoencoder_are_refused_by_name(tmp_path, other, why):
    path, vae = save_adapters(excite_injected(), tmp_path/'a.safetensors'), small_vae(**other)
    before = state(vae)
    with pytest.raises(ValueError, match=rf'another autoencoder: encoder\.1\.body\.2 {why}'): load_adapters(vae, path)
    assert same(before, vae.state_dict())

def test_files_that_are_no_adapters(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.safetensors'): load_adapters(small_vae(), tmp_path/'nothing.safetensors')
    (tmp_path/'broken.safetensors').write_bytes(b'no')
    with pytest.raises(ValueError, match='damaged'): load_adapters(small_vae(), tmp_path/'broken.safetensors')
    save_state(tmp_path/'other.safetensors', dict(a=1))
    with pytest.raises(ValueError, match='holds no adapters'): load_adapters(small_vae(), tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='must have adapters to save'): save_adapters(small_vae(), tmp_path/'a.safetensors')
    with pytest.raises(ValueError, match='is no convolution here'):
        load_adapters(small_vae().decoder, save_adapters(excite_injected(), tmp_path/'a.safetensors'))

def test_recipes_that_are_refused():
    with pytest.raises(ValueError, match=r"got \('conv_a',\), which chooses none of 36, such as \['encoder.0'"):
        inject_lora(small_vae(), ('conv_a',))
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f'rank must be at least 1, got {rank}'): inject_lora(small_vae(), 'body', rank)
    with pytest.raises(ValueError, match='got one at encoder.1.body.2; merge_lora'): inject_lora(excite_injected(), 'decoder')
    with pytest.raises(ValueError, match='one group, got 0'): inject_lora(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), '0')

def test_the_last_layer_is_the_one_that_runs_last():
    "diffusers lists the middle block after the last one, and MAR's own decoder counts from the finest."
    vae = from_diffusers(build_mar_kl16(32))
    inject_lora(vae, MAR, rank=1)
    coda = CODA(vae, build_quantizer(16, (1,), 8))
    listed, last = list(lora_convolutions(coda.decoder)), 'up_blocks.4.resnets.2.conv2'
    assert 'mid_block' in listed[-1]
    assert coda.last_layer is lora_convolutions(coda.decoder)[f'1.{last}'].adapter[1].weight
    assert list(coda.decoder_adapters())[-1].endswith(last.replace('.', '/')) and len(coda.decoder_adapters()) == 38

def test_the_last_layer_without_adapters_is_the_autoencoders():
    coda = adapted(rank=0)
    assert coda.last_layer is coda.autoencoder.last_layer and not len(coda.decoder_adapters())


# the discrete autoencoder

@pytest.mark.parametrize('assignment', ['attention', 'nearest'])
@pytest.mark.parametrize('sides', [(4,), (4, 4), (1, 2, 3, 4)], ids=str)
def test_tokens_decode_to_what_the_forward_pass_decodes(digits, assignment, sides):
    coda, x = adapted(sides=sides, assignment=assignment), digits[range(6)]
    with torch.no_grad():
        z_q, indices, _ = coda.quantizer(coda.features(x))
        assert torch.equal(indices, coda.encode(x)) and torch.equal(coda.decode(indices), coda.decode_codes(z_q))
        assert torch.equal(coda.encode(x[2:3]), indices[2:3])
    assert indices.shape == (6, coda.num_tokens) and coda.bits == 4*sum(side*side for side in sides)

def test_the_first_levels_alone(digits):
    coda = adapted(sides=(1, 2, 4))
    indices = coda.encode(digits[range(3)])
    assert torch.equal(coda.decode(indices, 3), coda.decode(indices)) and not torch.equal(coda.decode(indices, 2), coda.decode(indices))
    assert torch.equal(coda.decode(indices, 2), coda.decode(indices[:, :5], 2))
    scrambled = torch.cat([indices[:, :5], (indices[:, 5:]+1) % 16], 1)
    assert torch.equal(coda.decode(indices, 2), coda.decode(scrambled, 2))

def test_the_mode_is_one_and_samples_are_many(digits):
    coda, x = adapted(), digits[range(32)]
    assert torch.equal(coda.encode(x), coda.encode(x)) and not torch.equal(coda.encode(x, 'sample'), coda.encode(x, 'sample'))

def test_decoding_has_a_gradient(digits):
    coda = adapted()
    coda.decode(coda.encode(digits[range(2)])).sum().backward()
    assert coda.decoder_adapters()['1/body/2'][1].weight.grad.abs().sum() > 0

def test_latents_and_indices_that_do_not_fit(digits):
    with pytest.raises(ValueError, match="code_dim=4, the channels of the autoencoder's latents, got 8"): CODA(small_vae(), build_quantizer(8, (4,), 16))
    with pytest.raises(ValueError, match=r'side of the latents, \(4, 4\), got \[1, 2, 3\]'): adapted(sides=(1, 2, 3)).encode(digits[[0]])
    with pytest.raises(ValueError, match=r'side of the latents, \(4, 4\), got \[1, 8\]'): adapted(sides=(1, 8)).encode(digits[[0]])
    coda = adapted(sides=(1, 2, 4))
    for tokens in (4, 16, 22):
        with pytest.raises(ValueError, match=rf'indices must be \(B, 21\).*got \(1, {tokens}\)'): coda.decode(torch.zeros(1, tokens, dtype=torch.long))
    for levels in (0, 4):
        with pytest.raises(ValueError, match=rf'levels must be in \[1, 3\], got {levels}'): coda.decode(coda.encode(digits[[0]]), levels)
    with pytest.raises(ValueError, match="'mode' or 'sample', got 'mean'"): coda.encode(digits[[0]], 'mean')
    with pytest.raises(ValueError, match="'attention' or 'nearest', got 'cosine'"): build_quantizer(4, (4,), 16, 'cosine')

@pytest.mark.parametrize('rank', [0, 2])
@pytest.mark.parametrize('assignment', ['attention', 'nearest'])
def test_saved_and_loaded_without_the_autoencoder(digits, tmp_path, assignment, rank):
    coda = excite(adapted(assignment=assignment, rank=rank))
    again = load_coda(save_coda(coda, tmp_path), small_vae())
    assert torch.equal(again.decode(again.encode(digits[range(4)])), coda.decode(coda.encode(digits[range(4)])))
    assert (tmp_path/'adapters.safetensors').exists() == bool(rank)


# stage A

def test_stage_a_copies_latents_better_and_better(latents):
    quantizer = build_quantizer(4, (1, 2, 4), 16)
    rows = train_quantizer(quantizer, latents, steps=60, batch_size=32)
    assert rows[-1]['error'] < .6*rows[0]['error'] and not quantizer.training
    z = latents.indices
    error = F.mse_loss(quantizer.lookup(quantizer.assign(z)), z.flatten(2).transpose(1, 2)).item()
    assert error == pytest.approx(rows[-1]['error'], rel=.5)

@pytest.mark.parametrize('assignment', ['attention', 'nearest'])
def test_stage_a_same_seed_same_bytes_and_resumes(latents, tmp_path, assignment):
    def trained(folder=None, seed=0, steps=8):
        quantizer = build_quantizer(4, (1, 2, 4), 16, assignment)
        train_quantizer(quantizer, latents, steps, 16, seed=seed, folder=folder)
        return quantizer.state_dict()
    whole = trained(tmp_path)
    assert same(whole, trained()) and same(whole, trained(tmp_path)) and not same(whole, trained(seed=1))
    with pytest.raises(ValueError, match='steps=8, this run has steps=9'): trained(tmp_path, steps=9)
    with pytest.raises(ValueError, match='steps must be at least 1, got 0'): trained(steps=0)


# stage B

def fit(digits, coda=None, folder=None, **options):
    coda = coda or adapted()
    options = dict(steps=5, batch_size=16, lr=1e-3, adversary=build_adversary('patch', 16, 8), precision='fp32') | options
    return coda, train_coda(coda, digits, folder=folder, **options)

@pytest.fixture
def watched(monkeypatch):
    "Learning rates, ramps and gradients of every step."
    seen = dict(rates=[], ramps=[], judge=[], maker=[])
    class Watched(torch.optim.AdamW):
        def step(self, *args):
            seen['rates'].append(self.param_groups[0]['lr'])
            return super().step(*args)
    def watched_gradients(*args, **options):
        judge = args[3]
        before = [None if p.grad is None else p.grad.clone() for p in judge.parameters()]
        log = accumulate_gradients(*args, **options)
        seen['ramps'].append(options['ramp'])
        seen['judge'].append(all(p.grad is None if a is None else torch.equal(p.grad, a)
                                 for p, a in zip(judge.parameters(), before)))
        return log
    step = coda_module.train_discriminator
    def watched_step(adversary, images, reconstruction, optimizer, *size):
        fresh = copy.deepcopy(adversary)
        fresh.zero_grad()
        fresh.discriminator_loss(images, reconstruction).backward()
        expected = [p.grad for p in fresh.parameters()]
        taken = []
        hook = optimizer.register_step_pre_hook(lambda *_: taken.extend(p.grad.clone() for p in adversary.parameters()))
        loss = step(adversary, images, reconstruction, optimizer, *size)
        hook.remove()
        seen['maker'].append(all(torch.equal(a, b) for a, b in zip(taken, expected)))
        return loss
    monkeypatch.setattr(coda_module.torch.optim, 'AdamW', Watched)
    monkeypatch.setattr(coda_module, 'accumulate_gradients', watched_gradients)
    monkeypatch.setattr(coda_module, 'train_discriminator', watched_step)
    return seen

def test_generator_and_discriminator_do_not_leak_into_each_other(digits, watched):
    "The official code steps the discriminator on the generator's gradients as well."
    fit(digits, adversary=build_adversary('patch', 16, 8, augment=False))
    assert watched['judge'] == [True]*5                                      # the generator's pass adds nothing there
    assert watched['maker'] == [True]*5                                      # the step is that of its own loss alone

def test_a_generator_step_leaves_the_discriminator_without_gradient(digits):
    coda, judge, x = adapted(), build_adversary('patch', 16, 8), digits[range(4)]
    z_q, _, losses = coda.quantizer(coda.features(x))
    backward(coda.decode_codes(z_q), x, ImageLoss(), judge, coda.last_layer, sum(losses.values()))
    assert all(p.grad is None for p in judge.parameters())
    assert coda.last_layer.grad.abs().sum() > 0

def test_the_schedule_ends_with_the_run(digits, watched):
    "In optimizer updates, whatever the number of processes (see also the two below)."
    fit(digits, steps=7)
    assert watched['rates'][::2] == pytest.approx([1e-3*(1+math.cos(math.pi*step/7))/2 for step in range(7)])

@pytest.mark.parametrize('share, expected', [(1., [0, .2, .4, .6, .8]), (.4, [0, .5, 1, 1, 1])])
def test_the_ramp_is_a_share_of_the_run(digits, watched, share, expected):
    fit(digits, ramp=share)
    assert watched['ramps'] == pytest.approx(expected)

@pytest.mark.parametrize('ramp', [0., 1.5, -1.])
def test_a_ramp_that_is_none(digits, ramp):
    with pytest.raises(ValueError, match=rf'ramp must be in \(0, 1\], got {ramp}'): fit(digits, ramp=ramp)

def test_a_weight_below_zero(digits):
    with pytest.raises(ValueError, match='quantizer_weight must be at least 0, got -1'): fit(digits, quantizer_weight=-1)

def test_no_steps(digits):
    with pytest.raises(ValueError, match='steps must be at least 1, got 0'): fit(digits, steps=0)

@pytest.mark.parametrize('frozen', [False, True])
def test_adapters_and_quantizer_learn_and_nothing_else(digits, frozen):
    coda = adapted().requires_grad_(not frozen)
    before, learning = state(coda), {name for name, _ in coda.named_parameters() if '.adapter.' in name or 'quantizer' in name}
    fit(digits, coda, posterior='sample')
    for name, value in coda.state_dict().items(): assert torch.equal(value, before[name]) != (name in learning), name
    assert not any(p.requires_grad for p in coda.parameters())

def test_without_adapters_the_quantizer_learns_alone(digits):
    coda = adapted(rank=0).requires_grad_(False)
    before = state(coda)
    fit(digits, coda)
    changed = {name for name, value in coda.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith('quantizer.') for name in changed)

@pytest.mark.parametrize('options', [dict(adversary=None), dict(clip=1e-3), dict(posterior='sample'),
                                     dict(image_loss=ImageLoss()), dict(weight_decay=.5), dict(ramp=.1), dict(quantizer_weight=.1)], ids=str)
def test_each_option_matters(digits, options):
    assert not same(fit(digits)[0].state_dict(), fit(digits, **options)[0].state_dict())

def test_same_seed_same_bytes_another_seed_others(digits):
    a, b, c = (fit(digits, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c)

def test_killed_and_resumed_equals_undisturbed(digits, tmp_path, monkeypatch):
    real, calls = coda_module.Loop, []
    monkeypatch.setattr(coda_module, 'Loop', lambda *a, **k: real(*a, **k, checkpoint_every=2))
    whole, _ = fit(digits, folder=tmp_path/'whole')
    pid = os.fork()
    if pid == 0:
        step = coda_module.train_discriminator
        def dies(*args):
            calls.append(0)
            if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)
        coda_module.train_discriminator = dies
        fit(digits, folder=tmp_path/'killed')
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert load_state(tmp_path/'killed/checkpoint.safetensors')['step'] == 2
    resumed, rows = fit(digits, folder=tmp_path/'killed')
    assert same(whole.state_dict(), resumed.state_dict()) and [row['step'] for row in rows] == list(range(5))

def test_a_checkpoint_holds_no_autoencoder(digits, tmp_path):
    fit(digits, folder=tmp_path, adversary=None)
    parts = load_state(tmp_path/'checkpoint.safetensors')['parts']
    assert all(name.split('.')[0] in ('adapters', 'quantizer') for name in parts['trained'])


# other floors

def test_trained_coda_leaves_the_autoencoder_alone_and_is_read_back(digits, tmp_path, monkeypatch):
    from tokpost.evaluate import Evaluation
    from tokpost.run import Run
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path))
    run = Run('coda', 'smoke', changes={'coda_training.steps': 3, 'coda_quantizer_training.steps': 4, 'losses.perceptual': None,
                                        'evaluation.classifier_steps': 1})
    run.root = tmp_path
    evaluation, vae = Evaluation(run), small_vae()
    before = state(vae)
    coda, _, name = trained_coda(run, evaluation, vae, 'vae')
    assert same(before, vae.state_dict()) and not lora_convolutions(vae) and name.startswith('coda-')
    again, _, same_name = trained_coda(run, evaluation, vae, 'vae')
    assert name == same_name and same(coda.state_dict(), again.state_dict())
    first, _, first_name = trained_coda(run, evaluation, vae, 'vae', adapt=False)
    assert first_name.startswith('coda_quantizer-') and not lora_convolutions(first.autoencoder)
    control, _, _ = trained_coda(run, evaluation, vae, 'vae', rank=0)
    assert not lora_convolutions(control.autoencoder) and not same(control.quantizer.state_dict(), first.quantizer.state_dict())
    assert not same(coda.quantizer.state_dict(), first.quantizer.state_dict())
    direct, _, other = trained_coda(run, evaluation, vae, 'vae', adapt=False, sides=(4,), assignment='nearest')
    assert direct.num_tokens == 16 and other != first_name

def test_post_training_of_the_decoders_adapters(digits, tmp_path):
    coda = excite(adapted())
    indices = coda.encode(digits[range(32)])
    pairs = make_token_store(tmp_path/'pairs', lambda rows: indices[rows], digits.labels[:32], indices.shape[1], 16, {})
    before = state(coda)
    chosen = coda.decoder_adapters()
    post_train(coda, pairs, digits, decoder=chosen, steps=3, batch_size=16, lr=1e-2, warmup=0,
               adversary=build_adversary('patch', 16, 8), precision='fp32')
    changed = {name for name, value in coda.state_dict().items() if not torch.equal(value, before[name])}
    expected = {f'autoencoder.decoder.{path}.adapter.{i}.weight' for path in lora_convolutions(coda.decoder) for i in (0, 1)}
    assert changed == expected and len(list(chosen.parameters())) == len(expected)
    assert list(chosen.parameters())[-1] is coda.last_layer


# two processes

def training(here, folder, assignment, **options):
    "Adapters' gradients of every step, learning rates, and the weights at the end."
    digits, gradients, rates = load_images('digits', 'train', 16), [], []
    class Watched(torch.optim.AdamW):
        def step(self, *args):
            rates.append(self.param_groups[0]['lr'])
            gradients.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group['params']]))
            return super().step(*args)
    coda = excite(adapted(assignment=assignment, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, 'AdamW', Watched)
        fit(digits, coda, folder, steps=3, lr=1e-4, adversary=build_adversary('patch', 16, 8, augment=False))
    alike = [here.gather(g[None]) for g in gradients]
    alike = all(torch.equal(g, g[:1].expand_as(g)) for g in alike)
    return dict(gradients=gradients, rates=rates, alike=alike, weights=adapters(coda.autoencoder).state_dict())

def nearest(here, folder): return training(here, folder, 'nearest')

def attention(here, folder): return training(here, folder, 'attention', entropy_weight=0.)

def entropy(here, folder):
    "The entropy of a mean is not a mean of entropies, so here processes agree with each other only."
    return dict(alike=training(here, folder, 'attention')['alike'])

def copying(here, folder):
    quantizer, digits = build_quantizer(4, (1, 2, 4), 16, 'nearest'), load_images('digits', 'train', 16)
    with torch.no_grad(): latents = Tokens(small_vae().encode(digits[range(64)]), digits.labels[:64])
    train_quantizer(quantizer, latents, 4, 16)
    return quantizer.state_dict()

CHECKS = [nearest, attention, entropy, copying]

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "Folder in which two processes of torchrun left the results of every check, and what they said."
    folder = tmp_path_factory.mktemp('two')
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run([*torchrun, __file__, folder], env=environ, text=True, timeout=600,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return folder, done.stdout

@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_two_processes_equal_one(two, check):
    "The official code trains every process's adapters apart, and stretches the schedule by their number."
    folder, said = two
    assert (folder/f'{check.__name__}.pt').exists(), said[-3000:]
    found, expected = torch.load(folder/f'{check.__name__}.pt'), check(Processes('fp32'), None)
    assert found.get('alike', True) is True
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')
    here, folder = Processes('fp32'), Path(sys.argv[1])
    assert here.world == 2
    for check in CHECKS:
        result = check(here, None)
        if here.is_main: torch.save(result, folder/f'{check.__name__}.pt')
