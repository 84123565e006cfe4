"One optimisation step of every stage of the `full` preset: models of true size, real images, random weights."
import copy
import functools
import inspect
import math
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tokpost import autoencoder, autoregressive, coda, diffusion, masked, post_train, run as running, tokenizer
from tokpost.data import Images, load_images, make_latent_store, make_token_store
from tokpost.evaluate import perceptual_distance
from tokpost.losses import ImageLoss, named_adversary
from tokpost.released import build_flux_vae
from tokpost.run import PRESETS, Run, preset_sizes

SOURCE = 'imagenet-sample-256'
MISSING = not os.getenv('TOKPOST_DATA') or not (Path(os.environ['TOKPOST_DATA'])/SOURCE).is_dir()
pytestmark = pytest.mark.skipif(MISSING, reason=f"needs the 256-pixel images of {SOURCE} under $TOKPOST_DATA")


# What happens in a process of its own, one stage each, so that the memory of one is free for the next

AdamW = torch.optim.AdamW


class Observed(AdamW):
    "AdamW that notes the gradients it is given; it keeps no moments, which one step does not need."
    seen = {}

    def step(self):
        for group in self.param_groups:
            options = {key: group[key] for key in ('lr', 'betas', 'eps', 'weight_decay')}
            for p in filter(lambda p: p.requires_grad, group['params']):
                if p.grad is None: note = 'missing'
                elif not p.grad.isfinite().all(): note = 'not finite'
                else: note = 'gradient' if p.grad.any() else 'zero'
                self.seen[id(p)] = note, p
                AdamW([p], **options).step()
                p.grad = None


class SameEMA:
    "In the place of the average of a model that is too large to be kept twice here."
    def __init__(self, module, decay): self.module = module
    def update(self, module): pass


def wake(module):
    "Give matrices that begin at zero (gates of adaLN, second factors of adapters) the weights of later steps."
    draws = torch.Generator().manual_seed(0)
    for p in module.parameters():
        if p.dim() > 1 and not p.any(): p.data.normal_(std=.02, generator=draws)


def watched(train, reports, awake):
    "A training function that leaves a report of its step."
    def watch(*args, **kwargs):
        given = inspect.signature(train).bind(*args, **kwargs).arguments
        parts = nn.ModuleDict({key: part for key, part in given.items() if isinstance(part, nn.Module)})
        shapes = {}
        def note(path): return lambda module, inputs, out: shapes.update({path: tuple((out[0] if isinstance(out, tuple) else out).shape)})
        for path, module in parts.named_modules():
            if path.count('.') == 1 or path.endswith(('.autoencoder.encoder', '.autoencoder.decoder')):
                module.register_forward_hook(note(path))
        if awake: wake(parts)
        began = time.perf_counter()
        rows = train(*args, **kwargs)
        weights = {}
        for name, p in parts.named_parameters():
            frozen = 'frozen' if p.grad is None else 'frozen, with gradient'
            weights[name] = p.numel(), Observed.seen.get(id(p), (frozen,))[0] if p.isfinite().all() else 'weight not finite'
        reports[train.__name__] = dict(rows=rows, weights=weights, shapes=shapes, seconds=time.perf_counter()-began)
        return rows
    return watch


def perform(stage, preset, home, changes, awake, given):
    "Run a stage at true size; what it returns, and reports of its training steps."
    reports, began = {}, time.perf_counter()
    torch.optim.AdamW, running.Loop.save = Observed, lambda self, step: None
    running.project_root = lambda: Path(home)
    for module, name in ((tokenizer, 'train_tokenizer'), (autoregressive, 'train_generator'), (post_train, 'post_train'),
                         (autoencoder, 'train_autoencoder'), (coda, 'train_quantizer'), (coda, 'train_coda'),
                         (masked, 'train_masked'), (diffusion, 'train_diffusion')):
        setattr(module, name, watched(getattr(module, name), reports, awake))
    one = {f'{name}.{entry}': 1 for name in PRESETS['full'] if name.endswith('training') for entry in ('steps', 'batch_size')}
    one |= {'pairs.count': 1, 'pairs.batch_size': 1, 'tokenizer.pretrained': False, 'losses.pretrained': False, 'precision': 'fp32'}
    run = Run('full', preset, changes=one | changes)
    images = load_images(SOURCE, 'train', run.size['image_size'], memory=0)
    count = run.size['main_training']['batch_size']
    images = Images([images.rows[i] for i in range(count)], images.labels[:count], images.num_classes, run.size['image_size'])
    torch.manual_seed(0)
    returned = stage(run, SimpleNamespace(train=images, perceptual=perceptual_distance(run, images)), *given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)/2**30
    return reports, returned, dict(seconds=time.perf_counter()-began, peak=peak)


def main_training(run, evaluation):
    model, _, _ = tokenizer.main_trained(run, evaluation)
    return model.encode(evaluation.train[:]).numpy(), evaluation.train.labels.numpy()


def generator_training(run, evaluation, tokens, labels):
    store = make_token_store(run.root/'tokens', lambda rows: torch.from_numpy(tokens[rows]), torch.from_numpy(labels),
                             tokens.shape[1], run.size['tokenizer']['codebook_size'], {})
    autoregressive.trained_generator(run, store, evaluation.train.num_classes)


def pairs_and_post_training(run, evaluation):
    size = run.size
    learner = tokenizer.build_tokenizer(size['image_size'], **size['tokenizer'])
    generator = autoregressive.RAR(learner.codebook_size, 256, evaluation.train.num_classes, **size['generator'])
    adversary = named_adversary(size['losses'], size['image_size'], 0)
    written, sample = [], generator.sample
    generator.sample = lambda *args, **kwargs: written.append(sample(*args, **kwargs)) or written[-1]
    system = post_train.System(learner.eval(), generator.eval(), adversary, size['sampling'], {})
    pairs = post_train.stored_pairs(run, system, evaluation.train, .9)
    true = learner.encode(evaluation.train[pairs.sources])
    post_train.post_train(learner, pairs, evaluation.train, image_loss=ImageLoss(evaluation.perceptual), adversary=adversary,
                          seed=run.seed, precision=run.here.precision, **size['post_training'])
    return true.numpy(), written[0].numpy(), pairs[:].numpy()


def finished(run, evaluation):
    "The preset's finished autoencoder, of random weights in a file of the published format."
    about = run.size['autoencoder']
    if about['pretrained'] == 'mar-kl16':
        about['pretrained'] = str(run.root/'kl16.safetensors')
        weights = {autoencoder.ldm_name(name): w.contiguous() for name, w in autoencoder.build_mar_kl16().state_dict().items()}
        save_file(weights, about['pretrained'])
    else:
        about['pretrained'] = str(run.root/'flux')
        build_flux_vae().save_pretrained(f"{about['pretrained']}/{about['subfolder']}")
    return autoencoder.trained_autoencoder(run, evaluation)


def autoencoder_training(run, evaluation):
    model, _, _ = finished(run, evaluation)
    autoencoder.train_autoencoder(
        model, evaluation.train, image_loss=ImageLoss(evaluation.perceptual), seed=run.seed, precision=run.here.precision,
        adversary=named_adversary(run.size['losses'], run.size['image_size'], 0), **run.size['autoencoder_training'])


def coda_training(run, evaluation):
    model, _, name = finished(run, evaluation)
    model, _, _ = coda.trained_coda(run, evaluation, model, name)
    latents = model.features(evaluation.train[:])
    return model.quantizer.assign(latents).numpy(), latents.numpy(), evaluation.train.labels.numpy(), model.codebook.numpy()


def masked_training(run, evaluation, tokens, labels, codes):
    store = make_token_store(run.root/'tokens', lambda rows: torch.from_numpy(tokens[rows]), torch.from_numpy(labels),
                             tokens.shape[1], len(codes), {})
    masked.trained_masked(run, store, evaluation.train.num_classes, run.size['coda']['sides'], torch.from_numpy(codes))


def diffusion_training(run, evaluation, latents, labels):
    diffusion.EMA = SameEMA
    store = make_latent_store(run.root/'latents', lambda rows: torch.from_numpy(latents[rows]), torch.from_numpy(labels),
                              latents.shape[1:], {})
    diffusion.trained_diffusion(run, store, evaluation.train.num_classes)

if __name__ == '__main__':
    pass
