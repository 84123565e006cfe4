"Stores of latents, tokens in memory, and what all generators share."
import numpy as np
import pytest
import torch
from torch import nn

from tokpost.data import LatentStore, load_images, make_latent_store, token_batches
from tokpost.networks import Attention, Block
from tokpost.run import Run
from tokpost.sampling import draw_seed, in_eval_mode
from tokpost.tokens import Tokens, generated_tokens, tokenize

PLAN = dict(labels=torch.arange(10) % 3, shape=(2, 3, 3), made_by=dict(autoencoder='noise'), batch_size=4)


def noise(rows):
    return torch.stack([torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(int(row))) for row in rows])


def test_latents_come_back_as_they_were(tmp_path):
    store = make_latent_store(tmp_path/'store', noise, **PLAN)
    assert torch.equal(store[:], noise(range(10))) and torch.equal(store[[7, 2]], noise([7, 2]))
    assert store[:].dtype == torch.float32 and store.sources.tolist() == list(range(10))


def test_interrupted_latents_are_completed_with_the_same_bytes(tmp_path):
    made = []
    def dies(rows):
        if rows[0] == 8: raise KeyboardInterrupt
        return noise(rows)
    with pytest.raises(KeyboardInterrupt): make_latent_store(tmp_path/'store', dies, **PLAN)
    assert not (tmp_path/'store').exists()
    store = make_latent_store(tmp_path/'store', lambda rows: made.append(int(rows[0])) or noise(rows), **PLAN)
    assert made == [8] and torch.equal(store[:], noise(range(10)))


@pytest.mark.parametrize('wrong', [lambda rows: noise(rows)/0, lambda rows: noise(rows)[:, :1], lambda rows: noise(rows)*torch.nan])
def test_wrong_latents_leave_no_store(tmp_path, wrong):
    with pytest.raises(ValueError, match='latents must be finite and'): make_latent_store(tmp_path/'store', wrong, **PLAN)
    assert not (tmp_path/'store').exists()


def test_latents_of_another_autoencoder_or_shape_are_refused(tmp_path):
    make_latent_store(tmp_path/'store', noise, **PLAN)
    with pytest.raises(ValueError, match='another autoencoder'): LatentStore(tmp_path/'store', dict(autoencoder='mine'))
    with pytest.raises(ValueError, match='has shape'): make_latent_store(tmp_path/'store', noise, **dict(PLAN, shape=(2, 3, 4)))


@pytest.mark.parametrize('world', [1, 2])
def test_batches_of_latents_are_rows_of_the_store(tmp_path, world):
    store = make_latent_store(tmp_path/'store', noise, **PLAN)
    parts = [next(token_batches(store, 6, seed=1, rank=rank, world=world)) for rank in range(world)]
    latents = torch.stack([x for x, _ in parts], 1).flatten(0, 1) # shards interleave
    whole, labels = next(token_batches(store, 6, seed=1))
    assert torch.equal(latents, whole)
    rows = [(store[:] == z).flatten(1).all(1).nonzero().item() for z in whole]
    assert len(set(rows)) == 6 and torch.equal(store.labels[rows], labels)


def test_in_memory_latents_keep_their_type():
    assert Tokens(noise(range(3)), torch.arange(3))[[1]].dtype == torch.float32
    assert Tokens(torch.arange(6).view(3, 2).short(), torch.arange(3))[[1]].dtype == torch.long
    with pytest.raises(ValueError, match='labels must be 3, one per row, got 2'): Tokens(noise(range(3)), torch.arange(2))


class Continuous:
    latent_shape = 3, 2, 2
    def encode(self, images): return images[:, :, ::8, ::8]
    def sample(self, labels, latents=None, sigma=0., generator=None, scale=1.):
        return scale*torch.randn(len(labels), 3, 2, 2, generator=generator)


def test_continuous_models_get_latent_stores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path) # a project of its own
    run, images = Run('tokens', 'smoke'), load_images('digits', 'validation', 16)
    store = tokenize(run, Continuous(), images, 'every eighth pixel')
    assert torch.equal(store[:], images[:][:, :, ::8, ::8]) and torch.equal(store.labels, images.labels)
    one, two = (generated_tokens(run, Continuous(), 'noise', torch.zeros(70, dtype=torch.long), dict(scale=scale)) for scale in (1., 2.))
    assert torch.equal(2*one[:], two[:]) and not torch.equal(one[[0]], one[[64]])


def test_a_causal_position_ignores_what_follows():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 16)
    for causal in (True, False):
        block = Block(16, 2, causal=causal).eval()
        jacobian = torch.autograd.functional.jacobian(lambda x: block(x).sum(-1), x)[0, :, 0].abs().sum(-1) # (out, in)
        assert (jacobian.triu(1) == 0).all() == causal and (jacobian.tril() > 0)[*torch.tril_indices(6, 6)].all()


def test_width_must_divide_by_heads():
    with pytest.raises(ValueError, match='width must be a multiple of heads=3, got 16'): Attention(16, 3)


def test_eval_mode_ends_with_an_error_too():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(RuntimeError):
        with in_eval_mode(model):
            assert not model[0].training
            raise RuntimeError
    assert model.training and model[0].training and not model[1].training


def test_seeds_are_a_function_of_the_generator():
    seeds = [draw_seed(torch.Generator().manual_seed(0)) for _ in range(2)]
    assert seeds[0] == seeds[1] != draw_seed(torch.Generator().manual_seed(1))
