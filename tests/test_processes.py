"Two gloo processes against one: every function here has to give the same whatever the number of processes."
import os, subprocess, sys, time
from pathlib import Path
import pytest, tokpost.run, torch
from torch import nn
from tokpost.coda import inject_lora, lora_parameters
from tokpost.data import image_batches, load_images, make_latent_store, make_token_store
from tokpost.evaluate import merge_over_processes
from tokpost.losses import Adversary, ImageLoss, PatchDiscriminator, backward, semantic_loss
from tokpost.metrics import FrechetStatistics
from tokpost.quantizer import VectorQuantizer, code_counts
from tokpost.run import EMA, Loop, Processes, cached, fold, load_state, warmup_cosine

def rng(seed=0): return torch.Generator().manual_seed(seed)

def mine(here, x): return x.chunk(here.world)[here.rank]

def gradients_of(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

def gradients(here, folder):
    "Of a network on a batch; one layer is frozen, one has a gradient on some processes only."
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    model = nn.ModuleDict(dict(body=body, frozen=nn.Linear(6, 6),
                               rare=nn.Linear(6, 3)))
    model['frozen'].requires_grad_(False)
    x, rare = torch.randn(8, 6, generator=rng()), torch.arange(8) < 4
    x, rare = mine(here, x), mine(here, rare)
    out = model['body'](model['frozen'](x))
    if rare.any(): out = out + model['rare'](x)*rare[:, None]
    out.cos().sum(1).mean().backward()
    here.mean_gradients(model.parameters())
    return gradients_of(model)

def sum_and_gather(here, folder):
    x = torch.randn(8, 3, generator=rng())
    before = mine(here, x).clone()
    part = before.clone()
    result = dict(sum=here.sum(part.sum(0)), gather=here.gather(part), long=here.gather(part.long()),
                  strided=here.gather(mine(here, x.T.contiguous().T)))
    assert torch.equal(part, before)                                         # nothing in place
    return result

def counts(here, folder): return code_counts(mine(here, torch.randint(9, (8, 5), generator=rng())), 12)

def checkpoint(here, folder):
    "Weights after a run of twelve steps that every process left after seven, and who wrote its checkpoints."
    def fit(stop):
        torch.manual_seed(here.rank)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        if here.world > 1: [torch.distributed.broadcast(p.data, 0) for p in model.parameters()]
        optimizer, ema = torch.optim.AdamW(model.parameters(), lr=.05), EMA(model, .8)
        loop = Loop(folder/'loop', 12, dict(model=model, optimizer=optimizer, ema=ema), checkpoint_every=4,
                    schedule=warmup_cosine(12, 3), name='two')
        for step in loop:
            if step == stop: break
            assert torch.initial_seed() == fold(0, step, here.rank)
            x = mine(here, torch.randn(8, 4, generator=rng(step)))
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            here.mean_gradients(model.parameters())
            optimizer.step()
            ema.update(model)
            loop.log(loss)
        averaged = {f'ema {name}': value for name, value in ema.module.state_dict().items()}
        return loop.start, {**model.state_dict(), **averaged}
    save_state, saved = tokpost.run.save_state, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokpost.run, 'save_state', lambda *args: saved.append(args) or save_state(*args))
        assert fit(stop=7)[0] == 0
        start, weights = fit(stop=None)
    written = sorted(p.name for p in (folder/'loop').iterdir())
    everywhere = here.gather(torch.cat([value.flatten() for value in weights.values()])[None])
    same = torch.equal(everywhere, everywhere[:1].expand_as(everywhere))
    return dict(weights, start=start, same=same, written=written, saves=here.sum(torch.tensor(len(saved))),
                steps=load_state(folder/'loop/checkpoint.safetensors')['step'])

def batches(here, folder):
    "Three steps of images, joined in the order of one process."
    images, joined = load_images('digits', 'validation', 8), []
    stream = image_batches(images, 6, seed=1, start=2, rank=here.rank, world=here.world)
    for _, (pixels, labels) in zip(range(3), stream):
        for x in (pixels, labels):
            joined.append(here.gather(x).unflatten(0, (here.world, -1)).transpose(0, 1).flatten(0, 1))
    return joined

def token_store(here, folder):
    make = lambda rows: torch.as_tensor(rows)[:, None]*3 % 40 + torch.arange(2)
    store = make_token_store(folder/'store', make, torch.arange(22) % 5, num_tokens=2, codebook_size=64,
                             made_by=dict(tokenizer='a'), batch_size=3,
                             rank=here.rank, world=here.world, wait=here.wait)
    return dict(tokens=store[:], labels=store.labels, files=sorted(p.name for p in folder.iterdir()))

def adversary(here, folder):
    "Gradients of both losses through a decoder, and of the discriminator, on a batch."
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    judge = Adversary(PatchDiscriminator(16, 2), augment=False)
    images = mine(here, torch.rand(8, 3, 8, 8, generator=rng())*2 - 1)
    images = images*mine(here, torch.linspace(1., .1, 8))[:, None, None, None] # unequal halves
    out = decoder(images)
    log = backward(out, images, ImageLoss(), judge, decoder[-1].weight)
    here.mean_gradients(decoder.parameters())
    judge.discriminator_loss(images, out).backward()
    here.mean_gradients(judge.parameters())
    return dict(gradients_of(decoder), **gradients_of(judge), weight=log['adaptive_weight'],
                means=judge.logit_means)

def meaning(here, folder):
    "Gradient of the contrastive loss among all images of the batch."
    weight = torch.randn(6, 5, generator=rng()).requires_grad_()
    x, y = (mine(here, torch.randn(8, d, generator=rng(d))) for d in (6, 5))
    loss = semantic_loss(x @ weight, y)
    loss.backward()
    here.mean_gradients([weight])
    return dict(loss=loss.detach(), gradient=weight.grad)

def quantizer(here, folder):
    "A codebook started from data, moved as running means, with restarts."
    torch.manual_seed(0)
    learned = VectorQuantizer(16, 4, initialize='data', ema_decay=.9, restart=.3)
    for step in range(4): learned(mine(here, torch.randn(8, 6, 4, generator=rng(step))*(1 + step)))
    return learned.state_dict()

def statistics(here, folder):
    features = torch.randn(30, 5, generator=rng()) + 3
    part = features[:11] if here.rank == 0 else features[11:]                # unequal
    merged = merge_over_processes(FrechetStatistics(5).update(features if here.world == 1 else part))
    return merged.state()

def late(here, folder):
    "A process that comes when the file is there already still meets the others where they wait."
    if here.rank == 1: time.sleep(2)
    made = cached(folder/'late.safetensors', lambda: dict(x=torch.arange(4.)))['x']
    total = here.sum(torch.tensor([1.]))/here.world
    return dict(made=made, total=total)

def together(here, folder):
    "What all processes compute is computed by all, and once."
    calls = []
    def make():
        calls.append(1)
        return dict(total=here.sum(mine(here, torch.arange(6.)).sum()))
    made = [cached(folder/'together.safetensors', make, together=True)['total'] for _ in range(2)]
    return dict(made=made, calls=here.sum(torch.tensor(len(calls)))/here.world)

def token_stores_of_latents(here, folder):
    make = lambda rows: torch.as_tensor(rows)[:, None, None, None].expand(-1, 2, 3, 3)/7
    store = make_latent_store(folder/'store', make, torch.arange(22) % 5, (2, 3, 3), dict(autoencoder='a'), batch_size=3,
                              rank=here.rank, world=here.world, wait=here.wait)
    return dict(latents=store[:], labels=store.labels)

def lora(here, folder):
    "Gradients of adapters, averaged over processes."
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    inject_lora(network, [''], rank=2)
    for p in lora_parameters(network): nn.init.normal_(p, std=.1)
    x = mine(here, torch.randn(8, 3, 6, 6, generator=rng()))
    (network(x)-x).square().mean().backward()
    here.mean_gradients(lora_parameters(network))
    return gradients_of(network)

CHECKS = [gradients, sum_and_gather, counts, checkpoint, batches, token_store, adversary, meaning, quantizer,
          statistics, late, together, token_stores_of_latents, lora]

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "Folder in which two processes of torchrun left the results of every check, and what they said."
    folder = tmp_path_factory.mktemp('two')
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS='1',
                                CUDA_VISIBLE_DEVICES='')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    process = subprocess.Popen([*torchrun, __file__, folder], env=environ, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try: said = process.communicate(timeout=600)[0]
    except subprocess.TimeoutExpired:
        process.terminate()                                                  # and torchrun the others
        said = 'no end after ten minutes: ' + process.communicate()[0]
    return folder, said

def assert_same(a, b, name=''):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a: assert_same(a[key], b[key], f'{name} {key}')
    elif isinstance(a, list):
        assert len(a) == len(b), name
        for x, y in zip(a, b): assert_same(x, y, name)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text: f'{name}: {text}')
    else: assert a == b, name

@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_two_processes_equal_one(two, tmp_path, check):
    folder, said = two
    path = folder/f'{check.__name__}.pt'
    assert path.exists(), said[-3000:]
    torch.set_num_threads(1)
    expected = check(Processes('fp32'), tmp_path)
    assert_same(torch.load(path), expected)
    if check is checkpoint:
        assert [expected[k] for k in ('start', 'steps', 'saves')] == [4, 12, 3]
    if check is gradients:
        assert not any('frozen' in name for name in expected) and any('rare' in name for name in expected)

if __name__ == '__main__':
    from datetime import timedelta
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=120))
    here, folder = Processes('fp32'), Path(sys.argv[1])
    assert here.world == 2 and here.is_main == (here.rank == 0) and here.device.type == 'cpu'
    for check in CHECKS:
        (folder/check.__name__).mkdir(exist_ok=True)
        result = check(here, folder/check.__name__)
        if here.is_main: torch.save(result, folder/f'{check.__name__}.pt')
