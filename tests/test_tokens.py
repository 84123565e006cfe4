"Stores of latents, tokens in memory, and what all generators share."
import gzip
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tokpost import post_train, tokens
from tokpost.data import Images, LatentStore, load_images, make_latent_store, token_batches
from tokpost.networks import Attention, Block
from tokpost.run import Processes, Run
from tokpost.sampling import draw_seed, in_eval_mode
from tokpost.tokens import Tokens, generated_tokens, read_pretokenized, tokenize

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


class Means:
    "Sixteen levels of the mean of each quarter of a crop."
    codebook = torch.zeros(16, 1)
    def encode(self, images): return nn.functional.adaptive_avg_pool2d(images.mean(1), 2).flatten(1).add(1).mul(7.5).round().long()


@pytest.fixture
def photos():
    rows = [dict(path=f'{i}.png', array=np.random.default_rng(i).integers(0, 256, (12, 9 + i % 5, 3), dtype=np.uint8)) for i in range(60)]
    return Images(rows, np.arange(60) % 7, 7, 8, 'photos')


def names(folder): return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('crops', [1, 2, 10])
@pytest.mark.parametrize('tokenizer', [Means(), Continuous()])
def test_rows_of_a_store_are_the_crops_of_its_images(tmp_path, monkeypatch, photos, tokenizer, crops):
    monkeypatch.chdir(tmp_path)
    decoded, decode = [], photos._decode_raw
    monkeypatch.setattr(photos, '_decode_raw', lambda i: decoded.append(i) or decode(i))
    store = tokenize(Run('tokens', 'smoke'), tokenizer, photos, 'mine', crops)
    assert len(store) == 60*crops and store.sources.tolist() == [i for i in range(60) for _ in range(crops)]
    assert torch.equal(store.labels, photos.labels[store.sources])
    assert sorted(decoded) == ([] if crops < 10 else [0, *range(60)]) # the first also tells the shape
    for i in (0, 24, 25, 59): assert torch.equal(store[range(i*crops, (i+1)*crops)], tokenizer.encode(photos.crops_of([i], crops)[0]))


def test_one_crop_keeps_the_name_of_its_store(tmp_path, monkeypatch, photos):
    "Stages that rest on the tokens of one crop are found again."
    monkeypatch.chdir(tmp_path)
    run = Run('tokens', 'smoke')
    stores = [tokenize(run, Means(), photos, 'mine', crops) for crops in (1, 2, 10)]
    about = dict(tokenizer='mine', images=photos.fingerprint)
    assert stores[0].folder == run.folder('tokens', **about)/'tokens' and stores[0].made_by == about
    assert json.loads((stores[0].folder/'store.json').read_text())['batch_size'] == 256
    assert stores[2].made_by == dict(about, crops=10) and len({store.folder for store in stores}) == 3


def test_a_killed_store_of_crops_is_completed_with_the_same_bytes(tmp_path, monkeypatch, photos):
    class Dies(Means):
        calls = 0
        def encode(self, images):
            Dies.calls += 1
            if Dies.calls == 4: raise KeyboardInterrupt
            return super().encode(images)
    stores = []
    for name in 'killed', 'whole':
        (tmp_path/name).mkdir()
        monkeypatch.chdir(tmp_path/name)
        if name == 'killed':
            with pytest.raises(KeyboardInterrupt): tokenize(Run('tokens', 'smoke'), Dies(), photos, 'mine', 10)
            assert not list((tmp_path/name).rglob('tokens/store.json'))
        stores.append(tokenize(Run('tokens', 'smoke'), Dies(), photos, 'mine', 10))
    assert Dies.calls == 4 + 1 + 1 + 1 + 3 # of three batches two were made before the kill; each opening asks for one row
    assert names(stores[0].folder) == names(stores[1].folder)


def in_two_processes(task):
    "Results of `task(here)` of two processes that are threads."
    barrier, found, errors = threading.Barrier(2, timeout=60), [None, None], []
    def process(rank):
        here = Processes('fp32')
        here.rank, here.world, here.is_main, here.wait = rank, 2, rank == 0, barrier.wait
        here.sum = lambda tensor: tensor
        try: found[rank] = task(here)
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert errors == []
    return found


def test_two_processes_make_the_crops_of_one(tmp_path, monkeypatch, photos):
    monkeypatch.chdir(tmp_path)
    one = tokenize(Run('tokens', 'smoke'), Means(), photos, 'mine', 10)
    def process(here):
        run = Run('tokens', 'smoke', seed=1)
        run.here = here
        return tokenize(run, Means(), photos, 'mine', 10)
    for two in in_two_processes(process): assert names(two.folder) == names(one.folder) and two.folder != one.folder


def test_a_system_takes_the_crops_of_its_preset(tmp_path, monkeypatch):
    "Asked of digits, which are never mirrored, ten are refused."
    monkeypatch.chdir(tmp_path)
    evaluation, asked = SimpleNamespace(train=load_images('digits', 'train', 16)), []
    for name in ('main_trained', 'trained_autoencoder'):
        monkeypatch.setattr(post_train, name, lambda run, evaluation: (Means(), None, 'mine'))
    monkeypatch.setattr(post_train, 'trained_generator', lambda run, store, classes: asked.append(store) or (None, 'mine'))
    run = Run('crops', 'smoke', changes={'crops.autoregressive': 10})
    with pytest.raises(ValueError, match="crops must be 1 for 'digits'.*got 10"): post_train.trained_system(run, evaluation)
    with pytest.raises(ValueError, match='crops must be 1, 2 or 10, got 3'):
        post_train.trained_system(Run('crops', 'smoke', changes={'crops.diffusion': 3}), evaluation, 'diffusion')
    monkeypatch.setattr(evaluation.train, 'flips', True)
    post_train.trained_system(run, evaluation)
    assert len(asked[0]) == 10*len(evaluation.train) and asked[0].made_by['crops'] == 10


# Published tokens

def published(count=9000, num_tokens=5, codebook_size=64):
    draws = np.random.default_rng(0)
    return draws.integers(codebook_size, size=(count, num_tokens)), draws.integers(1000, size=count)


def lines_of(tokens, labels):
    return [json.dumps(dict(class_id=int(label), tokens=row)) for label, row in zip(labels, tokens.tolist())]


def write_lines(path, lines):
    text = '\n'.join(lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == '.gz' else text)
    return path


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz'])
def test_published_tokens_come_back(tmp_path, suffix):
    "With or without a last line feed, keys in any order, and further keys."
    rows, labels = published()
    lines = lines_of(rows, labels)
    lines[3] = json.dumps(dict(tokens=rows[3].tolist(), class_id=int(labels[3])))
    lines[4] = f'{{ "class_id" : {labels[4]} , "file": "a.JPEG", "tokens": {rows[4].tolist()} }}'
    path = write_lines(tmp_path/f'set{suffix}', lines + [''])
    store = read_pretokenized(path, tmp_path/'store', 64, 'robustok')
    assert np.array_equal(store[:], rows) and np.array_equal(store.labels, labels) and store.indices.dtype == np.uint16
    assert store.codebook_size == 64 and store.sources.tolist() == list(range(9000))
    assert store.made_by == dict(tokenizer='robustok', pretokenized=path.name, bytes=path.stat().st_size)
    path.unlink()
    assert np.array_equal(read_pretokenized(path, tmp_path/'store', 64, 'robustok')[[8999, 3]], rows[[8999, 3]])


@pytest.mark.parametrize('line, problem', [
    ('{"class_id": 3, "tokens": [1, 2, 3, 4', 'JSONDecodeError'), ('', 'class_id must be in'), ('not JSON', 'class_id must be in'),
    ('{"tokens": [1, 2, 3, 4, 5]}', 'class_id must be in'), ('{"class_id": 1000, "tokens": [1, 2, 3, 4, 5]}', r'class_id must be in \[0, 1000\)'),
    ('{"class_id": -1, "tokens": [1, 2, 3, 4, 5]}', 'class_id must be in'), ('{"class_id": "3", "tokens": [1, 2, 3, 4, 5]}', 'class_id must be in'),
    ('{"class_id": 3.5, "tokens": [1, 2, 3, 4, 5]}', 'class_id must be in'),
    ('{"class_id": 3}', 'KeyError'), ('{"class_id": 3, "tokens": 7}', 'tokens must be 5 integers'), ('{"class_id": 3, "tokens": null}', 'tokens must be 5 integers'),
    ('{"class_id": 3, "tokens": [1, 2, 3, 4]}', r'tokens must be 5 integers in \[0, 64\), got \(4,\) of them in \[1, 4\]'),
    ('{"class_id": 3, "tokens": []}', 'tokens must be 5 integers'),
    ('{"class_id": 3, "tokens": [1, 2, 3, 4, 64]}', r'in \[1, 64\]'), ('{"class_id": 3, "tokens": [-1, 2, 3, 4, 5]}', r'in \[-1, 5\]'),
    ('{"class_id": 3, "tokens": [1, 2, 3, 4, 5.5]}', 'tokens must be 5 integers'), ('{"class_id": 3, "tokens": [1, 2, 3, 4, [5]]}', 'tokens must be 5 integers')])
@pytest.mark.parametrize('number', [1, 4999, 5000])
def test_damaged_lines_are_named(tmp_path, line, problem, number):
    rows, labels = published(5000)
    lines = lines_of(rows, labels)
    lines[number-1] = line
    path = write_lines(tmp_path/'set.jsonl', lines + [''])
    if number == 1: problem = problem.replace('5 integers', 'some integers') # the first line says how many there are
    if number == 1 and line.endswith('[1, 2, 3, 4]}'): number, problem = 2, 'tokens must be 4 integers'
    with pytest.raises(ValueError, match=f'set.jsonl, line {number}: .*{problem}'): read_pretokenized(path, tmp_path/'store', 64, 'robustok')
    assert not (tmp_path/'store').exists()


def test_a_last_line_that_is_cut_is_named(tmp_path):
    path = write_lines(tmp_path/'set.jsonl', lines_of(*published(100)))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match='line 100: .*JSONDecodeError'): read_pretokenized(path, tmp_path/'store', 64, 'robustok')


def test_an_archive_that_is_cut_or_damaged_is_named(tmp_path):
    path = write_lines(tmp_path/'set.jsonl.gz', lines_of(*published(5000)))
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:len(whole)//2], b'not an archive', whole[:500] + b'x'*500 + whole[1000:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r'set\.jsonl\.gz(, line \d+:| is cut off or damaged after line \d+)'):
            read_pretokenized(path, tmp_path/'store', 64, 'robustok')
    assert not (tmp_path/'store').exists()


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.jsonl'): read_pretokenized(tmp_path/'none.jsonl', tmp_path/'store', 64, 'robustok')
    for name in 'set.jsonl', 'set.jsonl.gz':
        with pytest.raises(ValueError, match='must hold one row per line, got an empty file'):
            read_pretokenized(write_lines(tmp_path/name, []), tmp_path/'store', 64, 'robustok')


def test_fewer_classes_may_be_asked_for(tmp_path):
    rows, labels = published(50)
    path = write_lines(tmp_path/'set.jsonl', lines_of(rows, labels % 10))
    assert len(read_pretokenized(path, tmp_path/'store', 64, 'mine', num_classes=10)) == 50
    with pytest.raises(ValueError, match=r'line \d+: class_id must be in \[0, 9\)'): read_pretokenized(path, tmp_path/'other', 64, 'mine', num_classes=9)


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz'])
def test_a_reading_that_was_killed_goes_on(tmp_path, monkeypatch, suffix):
    rows, labels = published()
    path, parse, parsed = write_lines(tmp_path/f'set{suffix}', lines_of(rows, labels)), tokens._tokens, []
    def dies(path, number, *rest):
        if number == 6000: raise KeyboardInterrupt
        return parse(path, number, *rest)
    def counts(path, number, *rest): return parsed.append(number) or parse(path, number, *rest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokens, '_tokens', dies)
        read_pretokenized(path, tmp_path/'store', 64, 'robustok')
    assert not (tmp_path/'store').exists()
    monkeypatch.setattr(tokens, '_tokens', counts)
    store = read_pretokenized(path, tmp_path/'store', 64, 'robustok')
    assert parsed == [1, *range(4097, 9001)] and np.array_equal(store[:], rows) and np.array_equal(store.labels, labels)


def test_two_processes_read_the_tokens_of_one(tmp_path, monkeypatch):
    rows, labels = published()
    path = write_lines(tmp_path/'set.jsonl', lines_of(rows, labels))
    one = read_pretokenized(path, tmp_path/'one', 64, 'robustok')
    def process(here):
        local.here = here
        return read_pretokenized(path, tmp_path/'two', 64, 'robustok')
    local = threading.local()
    monkeypatch.setattr(tokens, 'Processes', lambda: local.here)
    for two in in_two_processes(process): assert names(two.folder) == names(one.folder)


def test_tokens_of_another_file_or_tokenizer_are_refused(tmp_path):
    rows, labels = published(50)
    path, other = (write_lines(tmp_path/name, lines_of(rows, labels)) for name in ('half.jsonl', 'zero.jsonl'))
    read_pretokenized(path, tmp_path/'store', 64, 'half')
    with pytest.raises(ValueError, match='made by another tokenizer'): read_pretokenized(path, tmp_path/'store', 64, 'zero')
    with pytest.raises(ValueError, match='made by another pretokenized'): read_pretokenized(other, tmp_path/'store', 64, 'half')
    with pytest.raises(ValueError, match='64 codes, this run needs .* and 4096'): read_pretokenized(path, tmp_path/'store', 4096, 'half')
    write_lines(path, lines_of(rows[:40], labels))
    with pytest.raises(ValueError, match='made by another bytes'): read_pretokenized(path, tmp_path/'store', 64, 'half')


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
