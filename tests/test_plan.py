"What a plan says against what a run takes: FLOPs, memory, disk; and against the sizes the papers print."
import math
import resource
import socket
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokpost import autoencoder, autoregressive, coda, diffusion, masked, post_train, tokenizer
from tokpost.autoencoder import build_mar_kl16, from_diffusers
from tokpost.autoregressive import RAR, token_loss, train_generator
from tokpost.coda import adapters
from tokpost.data import load_images, make_latent_store, make_token_store
from tokpost.diffusion import SiT, train_diffusion
from tokpost.evaluate import Evaluation
from tokpost.losses import ImageLoss
from tokpost.networks import Block, cnn_decoder
from tokpost.plan import (BATCH, FAMILIES, GIB, RESERVE, SOURCES, Codec, Machine, Meter, build_generator, bytes_of, largest_batch,
                          list_stages, making_step, measure, memory_of, metered, plan)
from tokpost.run import Run, preset_sizes

SMALL = {'main_training.steps': 8, 'autoencoder_training.steps': 8, 'coda_quantizer_training.steps': 8, 'coda_training.steps': 4,
         'generator_training.steps': 8, 'masked_training.steps': 16, 'diffusion_training.steps': 8, 'post_training.steps': 4,
         'generator_training.batch_size': 16, # below twice the classes each sample has modulations of its own
         'pairs.count': 64, 'evaluation.samples': 64}


def by_stage(rows): return {(row['family'], row['stage']): row for row in rows}


# Against PyTorch's own words

class Unattended(nn.Module):
    "Attention that a machine without a GPU cannot fuse is left out on both sides."
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, *_, **__: v + 0*q + 0*k)
            return self.module(x)


def kept(module, x):
    "Shape and precision of every tensor kept for the backward pass, weights aside."
    found, weights = {}, {p.untyped_storage()._cdata for p in module.parameters()}
    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in weights: found[storage._cdata] = storage.nbytes(), t.dtype
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): y = module(x)
    return sorted(map(str, found.values())), y.dtype


@pytest.mark.parametrize('build, shape', [
    (lambda: Block(96, 4, dropout=.1, adaln=False, causal=True), (2, 16, 96)),
    (lambda: cnn_decoder(8, width=32, multipliers=(1, 2), blocks=1), (2, 8, 8, 8)),
    (lambda: from_diffusers(build_mar_kl16(32)).encoder, (1, 3, 64, 64)),
    (lambda: from_diffusers(build_mar_kl16(32)).decoder.requires_grad_(False), (1, 16, 4, 4))],
    ids=('transformer', 'convolutions', 'diffusers', 'frozen'))
def test_precisions_are_those_of_cuda_autocast(build, shape):
    "Fake CUDA tensors run the real autocast, forward, on any machine."
    fake = pytest.importorskip('torch._subclasses.fake_tensor')
    with torch.device('meta'): module, theirs = Unattended(build()), Unattended(build())
    with metered([module]), torch.autocast('meta'): ours = kept(module, torch.empty(shape, device='meta', requires_grad=True))
    try:
        with fake.FakeTensorMode(allow_non_fake_inputs=True):
            theirs._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device='cuda'))
            x = torch.empty(shape, device='cuda', requires_grad=True)
    except (RuntimeError, AssertionError) as error: pytest.skip(f"this PyTorch has no fake CUDA tensors: {error}")
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_autocast_enabled('cuda', True)
        torch.set_autocast_dtype('cuda', torch.bfloat16)
        try: assert kept(theirs, x) == ours
        finally:
            torch.set_autocast_enabled('cuda', False)
            torch.clear_autocast_cache()


def allocated(run):
    "Most bytes that PyTorch's CPU allocator held beyond what it held before."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == '[memory]']
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()): live, peak = live + event.nbytes(), max(peak, live + event.nbytes())
    return peak


def sequences(model, batch, device):
    tokens = torch.zeros(batch, model.num_tokens, dtype=torch.long, device=device)
    token_loss(model, tokens, tokens[:, 0], tokens)[0].backward()


def test_live_bytes_are_the_allocators():
    sizes = dict(num_tokens=64, num_classes=10, width=64, depth=3, heads=4)
    with torch.device('meta'): ghost = RAR(512, **sizes)
    model = RAR(512, **sizes)
    for m in (ghost, model):
        for p in m.parameters(): p.grad = torch.zeros_like(p)
    sequences(model, BATCH, 'cpu') # whatever the first run sets up
    with Meter([ghost]) as meter: sequences(ghost, BATCH, 'meta')
    with Meter([model]) as real: sequences(model, BATCH, 'cpu')
    assert meter.peak == real.peak == pytest.approx(allocated(lambda: sequences(model, BATCH, 'cpu')), rel=.01)
    assert meter.flops == real.flops
    assert meter.live == [0, 0]


def test_memory_is_that_of_a_training(tmp_path):
    "Weights, gradients, moments, average and activations of a real training, all that the CPU allocator held."
    changes = {'diffusion.width': 64, 'diffusion.depth': 3, 'diffusion_training.steps': 3, 'diffusion_training.batch_size': 128}
    size, codec = preset_sizes('smoke', changes), Codec('diffusion', preset_sizes('smoke', changes))
    row = by_stage(plan('smoke', gpus=1, families=['diffusion'], changes=changes))['diffusion', 'generator']
    assert row['micro_batch_size'] == 128
    latents, labels = torch.randn(256, *codec.latent_shape), torch.arange(256) % 10
    def train():
        model = SiT(codec.latent_shape, 10, **size['diffusion'])
        train_diffusion(model, (latents, labels), precision='fp32', **size['diffusion_training'])
    train()
    predicted = GIB*row['memory_gib']
    assert row['activations_gib'] > .5*row['memory_gib']
    assert allocated(train) == pytest.approx(predicted, rel=.2)


# Against real runs

TRAININGS = {'main training': (tokenizer, 'train_tokenizer'), 'autoencoder': (autoencoder, 'train_autoencoder'),
             'quantizer': (coda, 'train_quantizer'), 'adaptation': (coda, 'train_coda'),
             'post-training': (post_train, 'post_train')}
GENERATORS = dict(autoregressive=(autoregressive, 'train_generator'), masked=(masked, 'train_masked'),
                  diffusion=(diffusion, 'train_diffusion'))


@pytest.mark.parametrize('family', FAMILIES)
def test_flops_are_those_of_a_run(family, tmp_path, monkeypatch):
    "Every training of a family, run as it is, and the making of its tokens."
    monkeypatch.setattr('tokpost.run.project_root', lambda: tmp_path)
    found = {}
    def metered_as(name, module, function):
        run = getattr(module, function)
        def counted(*args, **kwargs):
            with Meter() as meter: result = run(*args, **kwargs)
            found[name] = found.get(name, 0) + sum(meter.flops.values())
            return result
        monkeypatch.setattr(module, function, counted)
    for name, where in (TRAININGS | dict(generator=GENERATORS[family])).items(): metered_as(name, *where)
    metered_as('latents' if family == 'diffusion' else 'tokens', post_train, 'tokenize')
    monkeypatch.setattr(autoencoder, 'normalize_latents', lambda model, *_: model)
    run = Run('plan', 'smoke', changes=SMALL)
    evaluation = Evaluation(run)
    system = post_train.trained_system(run, evaluation, family)
    pairs = post_train.stored_pairs(run, system, evaluation.train, .8)
    post_train.post_train(system.tokenizer, pairs, evaluation.train, image_loss=ImageLoss(evaluation.perceptual),
                          adversary=system.adversary, precision='fp32', **run.size['post_training'])
    rows = by_stage(plan('smoke', gpus=1, families=[family], changes=SMALL))
    planned = {stage: rows[family, stage]['flops'] for stage in found}
    assert len(found) == dict(autoregressive=4, masked=6, diffusion=4)[family]
    assert found == pytest.approx(planned, rel=.1)


@pytest.mark.parametrize('family', FAMILIES)
def test_flops_of_sampling_are_those_of_a_sampling(family, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False) # linear layers that no formula knows
    size = preset_sizes('smoke')
    sampling = size['sampling' if family == 'autoregressive' else f'{family}_sampling']
    codec = Codec(family, size)
    ghost = build_generator(family, codec, size, 10).eval()
    planned = measure(making_step(family, codec, ghost, sampling, sigma=.25), [ghost], False).flops['sampling']
    model = ghost.to_empty(device='cpu')
    for t in (*model.parameters(), *model.buffers()): nn.init.normal_(t, std=.02)
    labels = torch.arange(BATCH) % 10
    known = torch.randn(BATCH, *model.latent_shape) if family == 'diffusion' else torch.zeros(BATCH, model.num_tokens, dtype=torch.long)
    with Meter() as meter: model.sample(labels, known, .25, **sampling)
    assert sum(meter.flops.values())/BATCH == pytest.approx(planned, rel=.05)


@pytest.mark.parametrize('family', FAMILIES)
def test_disk_is_that_of_a_store(family, tmp_path):
    stage = next(s for s in list_stages('smoke', [family]) if s.name == ('latents' if family == 'diffusion' else 'tokens'))
    codec, labels = Codec(family, preset_sizes('smoke')), torch.zeros(stage.samples, dtype=torch.long)
    if family == 'diffusion': make_latent_store(tmp_path/'store', lambda rows: torch.zeros(len(rows), *codec.latent_shape), labels,
                                                codec.latent_shape, {})
    else: make_token_store(tmp_path/'store', lambda rows: torch.zeros(len(rows), codec.num_tokens, dtype=torch.long), labels,
                           codec.num_tokens, codec.codebook_size, {})
    on_disk = sum(path.stat().st_size for path in (tmp_path/'store').iterdir())
    assert on_disk == pytest.approx(stage.store, rel=.05)


def test_disk_is_that_of_a_checkpoint(tmp_path):
    changes = {'generator.width': 64, 'diffusion.width': 64}
    size, rows = preset_sizes('smoke', changes), by_stage(plan('smoke', gpus=1, changes=changes))
    codecs = {family: Codec(family, size) for family in FAMILIES}
    options = dict(steps=1, batch_size=8, precision='fp32')
    tokens = torch.zeros(8, codecs['autoregressive'].num_tokens, dtype=torch.long)
    model = RAR(codecs['autoregressive'].codebook_size, tokens.shape[1], 10, **size['generator'])
    train_generator(model, (tokens, torch.zeros(8).long()), folder=tmp_path/'autoregressive', **options)
    latents = torch.randn(8, *codecs['diffusion'].latent_shape)
    model = SiT(latents.shape[1:], 10, **size['diffusion'])
    train_diffusion(model, (latents, torch.zeros(8).long()), folder=tmp_path/'diffusion', **options)
    for family in ('autoregressive', 'diffusion'):
        on_disk = (tmp_path/family/'checkpoint.safetensors').stat().st_size
        assert on_disk == pytest.approx(GIB*rows[family, 'generator']['checkpoint_gib'], rel=.1)


# Against what is printed

def count(module): return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('width, millions', [(768, 265.6), (1024, 468.0)], ids=('RAR-B', 'RAR-L'))
def test_parameters_of_rar(width, millions):
    with torch.device('meta'): assert round(count(RAR(4096, width=width, official_tables=True))/1e6, 1) == millions


def test_parameters_of_adapters():
    size = preset_sizes('full')
    assert count(adapters(Codec('masked', size).module.autoencoder)) == 6_021_120
    assert bytes_of(Codec('masked', preset_sizes('full+coda-16384')).quantizer) == 4*263_568
    flux = Codec('masked', preset_sizes('full+coda-flux'))
    assert (flux.num_tokens, flux.latent_shape, bytes_of(flux.quantizer)) == (2240, (16, 32, 32), 4*1_050_000)
    assert count(adapters(flux.autoencoder)) == 5_816_320


def test_flux_is_the_released_one():
    from tokpost.plan import _flux_vae
    from tokpost.released import build_flux_vae
    with torch.device('meta'): ours, theirs = _flux_vae(), build_flux_vae()
    assert dict(ours.config) == dict(theirs.config)


def test_numbers_of_images():
    assert [(len(images), images.num_classes) for images in [load_images('digits', 'train', 16)]] == [SOURCES['digits']]


@pytest.fixture(scope='module')
def full():
    "The full preset, planned without a network, and how much more memory that took, in bytes."
    def refuse(*_, **__): raise AssertionError("a plan must not open a connection")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, 'connect', refuse)
        patch.setattr(socket, 'getaddrinfo', refuse)
        rows = plan('full', gpus=8)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return by_stage(rows), grown*(1 if sys.platform == 'darwin' else 1024)


def test_full_preset_is_planned_without_its_weights(full):
    rows, grown = full
    weights = max(row['weights_gib'] for row in rows.values())
    assert weights > 2 and grown < GIB
    assert {family for family, _ in rows} == set(FAMILIES)
    for family in FAMILIES: assert [stage for f, stage in rows if f == family][-4:] == ['generator', 'samples', 'pairs', 'post-training']


def test_full_preset_has_the_papers_sizes(full):
    rows, _ = full
    main, rar, maskgit = (rows[key] for key in (('autoregressive', 'main training'), ('autoregressive', 'generator'),
                                                ('masked', 'generator')))
    assert round(main['epochs']) == 200 and round(rar['epochs']) == 400
    assert round(rows['autoregressive', 'post-training']['epochs']) == 40
    assert rar['samples'] == 512_000_000 and rar['tokens'] == 256*rar['samples']
    assert round(maskgit['trainable']/1e6, 1) == 193.0
    assert rows['autoregressive', 'tokens']['samples'] == 10*SOURCES['ILSVRC/imagenet-1k'][0]
    assert rows['autoregressive', 'tokens']['store_gib']*GIB == 12_811_670*(2*256 + 16)
    assert rar['flops'] == pytest.approx(6*rar['trainable']*rar['tokens'], rel=.05)


def test_rows_add_up(full):
    for row in full[0].values():
        assert row['flops'] == pytest.approx(sum(value for key, value in row.items() if key.endswith('_flops')))
        parts = 'weights', 'gradients', 'optimizer', 'ema', 'activations', 'cache'
        assert row['memory_gib'] == pytest.approx(sum(row[f'{part}_gib'] for part in parts))
        assert row['hours'] > 0 and all(value == value for value in row.values())
        if not row['after']: continue
        assert (row['family'], row['after']) in full[0]


@pytest.mark.parametrize('preset', ['full', 'full+rar-l', 'full+coda-16384', 'full+coda-flux'])
def test_full_preset_fits_as_it_runs(full, preset):
    "On eight GPUs of 80 GiB; the preset itself names what goes through a model at once where a process's share is too much."
    rows, sizes = full[0] if preset == 'full' else by_stage(plan(preset, gpus=8)), preset_sizes(preset)
    names = {'main training': 'main_training', 'post-training': 'post_training', 'adaptation': 'coda_training', 'quantizer': 'coda_quantizer_training'}
    for (family, stage), row in rows.items():
        assert row['memory_gib'] < 72, (family, stage)
        if not row['steps']: continue
        name = names.get(stage, 'generator_training' if family == 'autoregressive' else f'{family}_training')
        share = sizes[name]['batch_size']//8
        assert row['micro_batch_size'] == min(share, sizes[name].get('micro_batch_size', share))


# A machine

def test_hours():
    options = dict(preset='smoke', families=['autoregressive'])
    one, fast = (by_stage(plan(gpus=1, utilisation=u, **options)) for u in (.2, .4))
    two = by_stage(plan(gpus=2, utilisation=.4, **options))
    for key, row in one.items():
        if row['steps'] == 0: continue
        assert row['hours'] == pytest.approx(row['flops']/(3600*989e12*.2)) == pytest.approx(2*fast[key]['hours'])
        assert two[key]['hours'] == pytest.approx(fast[key]['hours']/2)


def test_sampling_takes_as_long_as_reading():
    stage = next(s for s in list_stages('smoke', ['autoregressive']) if s.name == 'samples')
    per_call, per_sample = stage.cost.reads
    assert stage.cost.cache == 2*2*2*17*32*4 # keys and values, layers, rows, positions, channels, bytes
    row = by_stage(plan('smoke', families=['autoregressive'], gpus=1, memory_bandwidth=1e9))['autoregressive', 'samples']
    assert row['bound'] == 'memory'
    rest = row['decode_flops']/(989e12*.4)
    assert 3600*row['hours'] == pytest.approx(rest + (per_call + 64*per_sample)/1e9)
    slow = by_stage(plan('smoke', families=['autoregressive'], gpus=1, peak_flops=1e6))['autoregressive', 'samples']
    assert slow['bound'] == 'compute' and 3600*slow['hours'] == pytest.approx(slow['flops']/(1e6*.4))


def test_accumulated_batches_of_images_go_forward_twice():
    options = dict(preset='smoke', gpus=1)
    whole, parts = by_stage(plan(**options)), by_stage(plan(**options, micro_batch_size=4))
    named = by_stage(plan(**options, changes={'main_training.micro_batch_size': 4}))
    key = 'autoregressive', 'main training'
    assert whole[key]['repeated_flops'] == 0 and parts[key]['repeated_flops'] > whole[key]['forward_flops']
    assert named[key] == parts[key] and named['autoregressive', 'generator'] == whole['autoregressive', 'generator']
    assert parts['autoregressive', 'generator']['flops'] == whole['autoregressive', 'generator']['flops']
    assert parts[key]['activations_gib'] < whole[key]['activations_gib']


def test_largest_batch_fits():
    for stage in list_stages('smoke'):
        for memory in (.01, .1, 1.):
            batch = largest_batch(stage.cost, memory)
            fits = lambda n: sum(memory_of(stage.cost, n).values()) <= (1-RESERVE)*memory
            assert not fits(2*batch or 1) and (batch == 0 or fits(batch) and math.log2(batch) % 1 == 0)


def test_changes_reach_the_plan():
    rows = by_stage(plan('smoke', families=['masked'], changes={'masked_sampling.steps': 2}))
    more = by_stage(plan('smoke', families=['masked'], changes={'masked_sampling.steps': 8}))
    flops = [found['masked', 'samples']['sampling_flops'] for found in (rows, more)]
    assert flops[1]/flops[0] == pytest.approx((2*8-1)/(2*2-1)) # the first step is without guidance
    finished = by_stage(plan('smoke', families=['diffusion'], changes={'autoencoder': dict(pretrained='taef2')}))
    assert ('diffusion', 'autoencoder') not in finished and finished['diffusion', 'latents']['after'] == ''


@pytest.mark.parametrize('options, message', [
    (dict(preset='huge'), r"preset must be one of .*'full'.*, got 'huge'"),
    (dict(preset='smoke+rar-xxl'), r"variants of a preset must be among .*'rar-l'.*, got 'rar-xxl'"),
    (dict(gpus=0), 'gpus must be an integer of at least 1, got 0'),
    (dict(gpus=2.), 'gpus must be an integer of at least 1, got 2.0'),
    (dict(gpus=5), 'gpus must divide the batch of main training, 16, got 5'),
    (dict(utilisation=0), r'utilisation must be in \(0, 1\], got 0'),
    (dict(utilisation=1.01), r'utilisation must be in \(0, 1\], got 1.01'),
    (dict(utilisation=math.nan), r'utilisation must be in \(0, 1\], got nan'),
    (dict(peak_flops=0.), 'peak_flops must be above 0, got 0.0'),
    (dict(memory_bandwidth=-1.), 'memory_bandwidth must be above 0, got -1.0'),
    (dict(memory_gib=math.nan), 'memory_gib must be above 0, got nan'),
    (dict(micro_batch_size=0), 'micro_batch_size must be an integer of at least 1, or None, got 0'),
    (dict(images=0), 'images must be an integer of at least 1, or None, got 0'),
    (dict(families=['mamba']), r"families must be among \('autoregressive', 'masked', 'diffusion'\), got 'mamba'"),
    (dict(changes={'data': 'faces'}), "images and classes must be given for data other than .*, got 'faces'"),
    (dict(families=['diffusion'], changes={'autoencoder': dict(pretrained='sdxl')}), "pretrained must be one of .*, got 'sdxl'")])
def test_refused(options, message):
    with pytest.raises(ValueError, match=message): plan(**dict(preset='smoke') | options)


def test_other_data():
    row = plan('smoke', families=['autoregressive'], changes={'data': 'faces'}, images=5000, classes=2)[1]
    assert row['stage'] == 'tokens' and row['samples'] == 5000


def test_a_machine_is_checked_alone():
    with pytest.raises(ValueError, match='gpus must be'): Machine(gpus=True)
