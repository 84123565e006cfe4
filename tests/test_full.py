"One optimisation step of every stage of the `full` preset: models of true size, real images, random weights."
import functools
import inspect
import math
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tokpost import autoencoder, autoregressive, coda, diffusion, masked, post_train, run as running, tokenizer
from tokpost.data import Images, load_images, make_latent_store, make_token_store
from tokpost.evaluate import perceptual_distance
from tokpost.losses import ImageLoss, named_adversary
from tokpost.paper import paper_table
from tokpost.released import build_flux_vae
from tokpost.run import PRESETS, Run, fold, preset_sizes

SOURCE = 'imagenet-sample-256'
FOUND = os.getenv('TOKPOST_DATA') and (Path(os.environ['TOKPOST_DATA'])/SOURCE).is_dir()
needs_images = pytest.mark.skipif(not FOUND, reason=f"needs the images of $TOKPOST_DATA/{SOURCE}")

# What a process of its own does: one stage or two, so that their memory is free for the next.

AdamW = torch.optim.AdamW


class Observed(AdamW):
    "AdamW that notes the gradients it is given, and keeps no moments, which one step does not need."
    seen = {}

    def step(self):
        for group in self.param_groups:
            options = {key: group[key] for key in ('lr', 'betas', 'eps', 'weight_decay')}
            for p in filter(lambda p: p.requires_grad, group['params']):
                if p.grad is None: note = 'missing'
                elif not p.grad.isfinite().all(): note = 'not finite'
                else: note = 'gradient' if p.grad.any() else 'zero'
                self.seen[id(p)] = note
                AdamW([p], **options).step()
                p.grad = None


class NoEMA:
    "In the place of the average of a model that is too large to be kept twice here."
    def __init__(self, module, decay): self.module = module
    def update(self, module): pass


def wake(module):
    "Give what begins at zero or close to it (modulations, adapters, layer scales, queries) weights, as if later in training."
    draws = torch.Generator().manual_seed(0)
    for p in module.parameters():
        if p.abs().max() < 1e-4 and (p.dim() > 1 or p.any()): p.data.normal_(std=.05, generator=draws)


def watched(train, reports, awake):
    "A training function that leaves a report of its step: log, gradients, shapes."
    def watch(*args, **kwargs):
        given = inspect.signature(train).bind(*args, **kwargs).arguments
        parts = nn.ModuleDict({key: part for key, part in given.items() if isinstance(part, nn.Module)})
        shapes, hooks = {}, []
        for path, module in parts.named_modules():
            def note(module, inputs, out, path=path): shapes[path] = tuple((out[0] if isinstance(out, tuple) else out).shape)
            if path.count('.') == 1 or re.search(r'autoencoder\.(en|de)coder$', path): hooks.append(module.register_forward_hook(note))
        if awake: wake(parts)
        Observed.seen.clear()
        rows = train(*args, **kwargs)
        for hook in hooks: hook.remove()
        weights = {}
        for name, p in parts.named_parameters():
            note = Observed.seen.get(id(p), 'frozen' if p.grad is None else 'frozen, with gradient')
            weights[name] = p.numel(), note if p.isfinite().all() else 'weight not finite'
        reports[train.__name__] = SimpleNamespace(rows=rows, weights=weights, shapes=shapes)
        return rows
    return watch


class Evaluation:
    "The images and the perceptual loss of a preset; nothing is scored here."
    def __init__(self, run, count):
        images = load_images(SOURCE, 'train', run.size['image_size'], memory=0)
        self.run, rows = run, [images.rows[i] for i in range(count)]
        self.train = Images(rows, images.labels[:count], images.num_classes, run.size['image_size'])

    @functools.cached_property
    def perceptual(self): return perceptual_distance(self.run, self.train)


def perform(stage, preset, changes, awake, given):
    "Reports of a stage's training steps, what it returns, and the memory it took (GiB)."
    torch.manual_seed(0)
    reports = {}
    torch.optim.AdamW, running.Loop.save = Observed, lambda self, step: None
    for module, name in ((tokenizer, 'train_tokenizer'), (autoregressive, 'train_generator'), (post_train, 'post_train'),
                         (autoencoder, 'train_autoencoder'), (coda, 'train_quantizer'), (coda, 'train_coda'),
                         (masked, 'train_masked'), (diffusion, 'train_diffusion')):
        setattr(module, name, watched(getattr(module, name), reports, awake))
    one = {f'{name}.{entry}': 1 for name in PRESETS['full'] if name.endswith('training') for entry in ('steps', 'batch_size')}
    one |= {'pairs.count': 1, 'pairs.batch_size': 1, 'tokenizer.pretrained': False, 'losses.pretrained': False, 'precision': 'fp32'}
    with tempfile.TemporaryDirectory() as home:
        running.project_root = lambda: Path(home)
        run = Run('full', preset, changes=one | changes)
        returned = stage(run, Evaluation(run, run.size['main_training']['batch_size']), *given)
    unit = 2**30 if sys.platform == 'darwin' else 2**20
    return reports, returned, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/unit


def main_training(run, evaluation):
    redrawn, perturb = [], tokenizer.perturb_quantized
    def noted(z, z_q, *args, **kwargs):
        perturbed = perturb(z, z_q, *args, **kwargs)
        redrawn.append((perturbed != z_q).any(-1).float().mean().item())
        return perturbed
    tokenizer.perturb_quantized = noted
    model, _, _ = tokenizer.main_trained(run, evaluation)
    return model.encode(evaluation.train[:]).numpy(), evaluation.train.labels.numpy(), redrawn


def stored(run, tokens, labels, codebook_size):
    return make_token_store(run.root/'tokens', lambda rows: torch.from_numpy(tokens[rows]), torch.from_numpy(labels),
                            tokens.shape[1], codebook_size, {})


def generator_training(run, evaluation, tokens, labels):
    store = stored(run, tokens, labels, run.size['tokenizer']['codebook_size'])
    autoregressive.trained_generator(run, store, evaluation.train.num_classes)


def pairs_and_post_training(run, evaluation):
    size, written = run.size, []
    learner = tokenizer.build_tokenizer(size['image_size'], **size['tokenizer']).eval()
    generator = autoregressive.RAR(learner.codebook_size, 256, evaluation.train.num_classes, **size['generator']).eval()
    def sample(*args, **kwargs):
        written.append(autoregressive.RAR.sample(generator, *args, **kwargs))
        return written[-1]
    generator.sample, adversary = sample, named_adversary(size['losses'], size['image_size'], fold(run.seed, 'adversary'))
    system = post_train.System(learner, generator, adversary, size['sampling'], {})
    pairs = post_train.stored_pairs(run, system, evaluation.train, .9)
    true = learner.encode(evaluation.train[pairs.sources])
    post_train.post_train(learner, pairs, evaluation.train, image_loss=ImageLoss(evaluation.perceptual), adversary=adversary,
                          seed=run.seed, precision=run.here.precision, **size['post_training'])
    return true.numpy(), written[0].numpy(), pairs[:].numpy()


def finished(run, evaluation):
    "The preset's finished autoencoder, of random weights in a file of the released format."
    about = run.size['autoencoder']
    if about['pretrained'] == 'mar-kl16':
        path = about['pretrained'] = str(run.root/'kl16.safetensors')
        state = autoencoder.build_mar_kl16().state_dict()
        save_file({autoencoder.ldm_name(name): weight for name, weight in state.items()}, path)
    else:
        path = about['pretrained'] = str(run.root/'flux')
        build_flux_vae().save_pretrained(Path(path)/about['subfolder'])
    return autoencoder.trained_autoencoder(run, evaluation)


def coda_training(run, evaluation):
    model, _, name = finished(run, evaluation)
    model, _, _ = coda.trained_coda(run, evaluation, model, name)
    latents = model.features(evaluation.train[:])
    return model.quantizer.assign(latents).numpy(), latents.numpy(), evaluation.train.labels.numpy(), model.codebook.numpy()


def autoencoder_training(run, evaluation):
    model, _, _ = finished(run, evaluation)
    autoencoder.train_autoencoder(
        model, evaluation.train, image_loss=ImageLoss(evaluation.perceptual), seed=run.seed, precision=run.here.precision,
        adversary=named_adversary(run.size['losses'], run.size['image_size'], 0), **run.size['autoencoder_training'])
    return tuple(model.encode(evaluation.train[:]).shape)


def masked_training(run, evaluation, tokens, labels, codes):
    store = stored(run, tokens, labels, len(codes))
    masked.trained_masked(run, store, evaluation.train.num_classes, run.size['coda']['sides'], torch.from_numpy(codes))


def diffusion_training(run, evaluation, latents, labels):
    diffusion.EMA = NoEMA
    store = make_latent_store(run.root/'latents', lambda rows: torch.from_numpy(latents[rows]), torch.from_numpy(labels),
                              latents.shape[1:], {})
    diffusion.trained_diffusion(run, store, evaluation.train.num_classes)

# What is true of them.

# Stage: what runs, preset, changes, whether zero weights are woken, what it is given of other stages.
# Main training sees two images, because a contrast of one image with itself has no gradient, and perturbs both.
STAGES = {
    'main': (main_training, 'full', {'main_training.batch_size': 2, 'perturbation.beta': 1.}, True, None),
    'rar-b': (generator_training, 'full', {'precision': 'bf16'}, False, lambda: returned('main')[:2]),
    'rar-l': (generator_training, 'full+rar-l', {}, True, lambda: returned('main')[:2]),
    'post': (pairs_and_post_training, 'full', {'precision': 'bf16'}, True, None),
    'mar': (autoencoder_training, 'full', {}, True, None),
    'coda-16384': (coda_training, 'full+coda-16384', {}, False, None),
    'coda-65536': (coda_training, 'full', {}, True, None),
    'coda-flux': (coda_training, 'full+coda-flux', {}, True, None),
    'masked': (masked_training, 'full', {}, True, lambda: [returned('coda-65536')[i] for i in (0, 2, 3)]),
    'diffusion': (diffusion_training, 'full', {}, True, lambda: returned('coda-65536')[1:3])}

HEADS = r'adversary\.discriminator\.heads\..*'
LAST_BIAS = r'adversary\.discriminator\.heads\.\d+\.2\.bias' # both sides of the hinge pull it as hard, against each other
NETWORKS = 'adversary.discriminator.network', 'image_loss.perceptual'


@functools.cache
def performed(name):
    stage, preset, changes, awake, given = STAGES[name]
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(perform, stage, preset, changes, awake, given() if given else ()).result()


def returned(name): return performed(name)[1]


def checked(name, train, trained, zero='', either='', frozen=()):
    "The report of a step: what learns has a gradient, but for what `zero` explains, nothing else has one; losses are finite."
    reports, _, memory = performed(name)
    report = reports[train]
    assert memory < 8                                                    # GiB; SiT-XL takes 6.8
    assert len(report.rows) == 1 and all(map(math.isfinite, report.rows[0].values()))
    wrong = {}
    for weight, (_, note) in report.weights.items():
        should = ('gradient' if not re.fullmatch(zero, weight) else 'zero') if re.fullmatch(trained, weight) else 'frozen'
        if note != should and not (note == 'zero' and re.fullmatch(either, weight)): wrong[weight] = note, should
    assert not wrong, wrong
    for part in frozen: assert size(report, re.escape(part) + r'\..*') > 1e6, f'{part} is not there'
    return report


def size(report, pattern): return sum(size for name, (size, _) in report.weights.items() if re.fullmatch(pattern, name))


def dropped(name, train):
    "Pattern of the branches that drop path left out: all weights of one are without gradient together."
    branches = {}
    for weight, (_, note) in performed(name)[0][train].weights.items():
        found = re.match(r'(.*\.vit\.blocks\.\d+)\.(?:(norm1|attn|ls1)|(norm2|mlp|ls2))\.', weight)
        if found: branches.setdefault((found[1], bool(found[2])), []).append((weight, note))
    gone = [part for part in branches.values() if {note for _, note in part} == {'zero'}]
    assert len(gone) <= len(branches)/4                                  # drawn with a probability of at most 0.1
    return '|'.join(re.escape(weight) for part in gone for weight, _ in part)


def paper(metric, row, **where):
    "A count that the papers give or imply."
    table = paper_table('settings', row=row, metric=metric)
    for column, value in where.items(): table = table[table[column] == value]
    return table.value.item()


def test_faults_are_seen():
    def train(model):
        optimizer = Observed([p for name, p in model.items() if 'frozen' not in name], lr=.1)
        (model['used'] + 0*model['dead'] + math.nan*model['broken'] + model['frozen and pulled']).sum().backward()
        optimizer.step()
        return [dict(loss=0.)]
    reports, names = {}, ('used', 'unused', 'dead', 'broken', 'frozen', 'frozen and pulled')
    watched(train, reports, False)(nn.ParameterDict({name: torch.ones(2) for name in names}))
    assert {name: note for name, (_, note) in reports['train'].weights.items()} == {
        'model.used': 'gradient', 'model.unused': 'missing', 'model.dead': 'zero', 'model.broken': 'weight not finite',
        'model.frozen': 'frozen', 'model.frozen and pulled': 'frozen, with gradient'}


@needs_images
def test_main_training():
    report = checked('main', 'train_tokenizer', r'tokenizer\..*|teacher\.project\..*|' + HEADS,
                     either=dropped('main', 'train_tokenizer'), frozen=('teacher.network', *NETWORKS))
    assert {'l2', 'perceptual', 'adversarial', 'adaptive_weight', 'discriminator', 'loss'} <= set(report.rows[0])
    assert report.shapes['tokenizer.encoder'] == (2, 64, 16, 16) and report.shapes['tokenizer.quantizer'] == (2, 256, 64)
    assert report.shapes['tokenizer.decoder'] == (2, 3, 256, 256) and report.shapes['teacher.project'] == (2, 64)
    assert report.shapes['adversary.discriminator'] == (2, 5*14*14)
    tokens, _, redrawn = returned('main')
    assert tokens.shape == (2, 256) and 0 <= tokens.min() and tokens.max() < 4096
    assert redrawn[0] > .9                                               # α = 1: all but one in a hundred


def official(report, width): # with the released tables of places, of which most rows are never read
    return size(report, '.*') + (2*(1024-2) + 100-2)*width


@needs_images
def test_rar_b_in_bfloat16_and_at_its_initial_weights():
    closed = r'model\.inputs\.(cls_token|step)|model\.blocks\.\d+\.(norm1|attention|norm2|mlp)\..*' # behind gates of zero
    report = checked('rar-b', 'train_generator', r'model\..*', zero=closed)
    assert report.shapes['model.head'] == (1, 257, 4096)
    assert official(report, 768)/1e6 == pytest.approx(paper('parameters', 'RAR-B', codebook_size=4096), abs=.05)
    assert report.rows[0]['loss'] == pytest.approx(math.log(4096), rel=.05)


@needs_images
def test_rar_l():
    report = checked('rar-l', 'train_generator', r'model\..*')
    assert report.shapes['model.head'] == (1, 257, 4096)
    assert official(report, 1024)/1e6 == pytest.approx(paper('parameters', 'RAR-L', codebook_size=4096), abs=.05)


@needs_images
def test_pairs_and_post_training_in_bfloat16():
    report = checked('post', 'post_train', r'tokenizer\.decoder\..*|' + HEADS, either=dropped('post', 'post_train'),
                     frozen=('tokenizer.encoder', *NETWORKS))
    assert report.shapes['tokenizer.decoder'] == (1, 3, 256, 256)
    true, written, pairs = returned('post')
    assert true.shape == written.shape == pairs.shape == (1, 256)
    assert abs((written == true).mean() - .9) < .1                       # σ = 0.9, five standard deviations
    assert (pairs != written).any() and 0 <= pairs.min() and pairs.max() < 4096


@needs_images
def test_autoencoder_training():
    report = checked('mar', 'train_autoencoder', r'autoencoder\..*|' + HEADS, frozen=NETWORKS)
    assert report.shapes['autoencoder.encoder'] == (1, 32, 16, 16) and report.shapes['autoencoder.decoder'] == (1, 3, 256, 256)
    assert returned('mar') == (1, 16, 16, 16) and report.rows[0]['kl'] > 0
    assert size(report, r'autoencoder\..*')/1e6 == pytest.approx(paper('vae_parameters', 'CODA MAR'), abs=.005)


ADAPTERS, BASE = r'coda\.autoencoder\..*\.adapter\..*', r'coda\.autoencoder\.(?!.*\.adapter\.).*'


@needs_images
@pytest.mark.parametrize('name, row, codes, tokens', [
    pytest.param('coda-16384', 'CODA MAR', 16_384, 680, id='mar-16384'),
    pytest.param('coda-65536', 'CODA MAR', 65_536, 680, id='mar-65536'),
    pytest.param('coda-flux', 'CODA FLUX', 65_536, 2240, id='flux-65536')])
def test_coda(name, row, codes, tokens):
    alone = checked(name, 'train_quantizer', r'quantizer\..*')
    first = r'.*\.adapter\.0\.weight' if name == 'coda-16384' else '' # at initial weights, behind a second factor of zero
    report = checked(name, 'train_coda', rf'coda\.quantizer\..*|{ADAPTERS}|{HEADS}', first, LAST_BIAS, NETWORKS)
    side = {680: 16, 2240: 32}[tokens]
    assert report.shapes['coda.autoencoder.encoder'] == (1, 32, side, side)
    assert report.shapes['coda.quantizer'] == (1, side*side, 16) and report.shapes['coda.autoencoder.decoder'] == (1, 3, 256, 256)
    indices, latents, _, codebook = returned(name)
    assert indices.shape == (1, tokens) and 0 <= indices.min() and indices.max() < codes
    assert latents.shape == (1, 16, side, side) and codebook.shape == (codes, 16)
    assert size(report, ADAPTERS) == paper('adapter_parameters', row)
    assert size(report, BASE)/1e6 == pytest.approx(paper('vae_parameters', row), abs=.005)
    counts = paper_table('settings', metric='quantizer_parameters').set_index('codebook_size').value
    assert size(report, r'coda\.quantizer\..*') == size(alone, '.*') == counts[codes]


@needs_images
def test_masked_generator_on_coda_tokens():
    report = checked('masked', 'train_masked', r'model\..*')
    assert report.shapes['model.body'] == (1, 1+680, 768)
    parameters = paper_table('coda_tables', row='CODA MaskGIT-L', metric='parameters').value.max()
    assert size(report, '.*')/1e6 == pytest.approx(parameters, rel=.02)


@needs_images
def test_diffusion_on_latents():
    report = checked('diffusion', 'train_diffusion', r'model\..*')
    assert report.shapes['model.final'] == (1, 256, 16)
    assert size(report, '.*')/1e6 == pytest.approx(675, abs=1)           # SiT-XL (Ma et al. 2024, Table 1)


# Graph breaks depend neither on the number of blocks nor on the width of convolutions and their images.

def vit(part):
    sizes = preset_sizes('full', {'tokenizer.pretrained': False, 'tokenizer.depth': 2})
    model = tokenizer.build_tokenizer(sizes['image_size'], **sizes['tokenizer']).train()
    return getattr(model, part), torch.zeros(1, 3, 256, 256) if part == 'encoder' else torch.zeros(1, 64, 16, 16)


def rar():
    model = autoregressive.RAR(4096, 256, 1000, **preset_sizes('full', {'generator.depth': 2})['generator']).train()
    return model, torch.zeros(1, 256, dtype=torch.long), torch.tensor([0]), autoregressive.random_orders(1, 256, 1.)


def maskgit():
    sizes = preset_sizes('full')['masked']
    return masked.SkipTransformer(sizes['width'], 3, sizes['heads']), torch.zeros(1, 1+680, sizes['width'])


def sit():
    model = diffusion.SiT((16, 16, 16), 1000, **preset_sizes('full', {'diffusion.depth': 2})['diffusion'])
    return model, torch.zeros(1, 16, 16, 16), torch.tensor([.5]), torch.tensor([0])


def adapted(build, part):
    model = autoencoder.from_diffusers(build(32))
    coda.inject_lora(model, coda.inner_convolutions(model.encoder, model.decoder), 4)
    return getattr(model, part), torch.zeros(1, 3, 64, 64) if part == 'encoder' else torch.zeros(1, 16, 4, 4)


@pytest.mark.parametrize('build', [
    *(pytest.param(functools.partial(vit, part), id=f'vit-{part}') for part in ('encoder', 'decoder')), rar, maskgit, sit,
    *(pytest.param(functools.partial(adapted, vae, part), id=f'{vae.__name__}-{part}')
      for vae in (autoencoder.build_mar_kl16, build_flux_vae) for part in ('encoder', 'decoder'))])
def test_one_graph(build):
    "What `Processes.compile` compiles on a GPU is one graph."
    module, *inputs = build()
    torch._dynamo.reset()
    found = torch._dynamo.explain(module)(*inputs)
    assert found.graph_count == 1, found.break_reasons
