"Attention quantization against whole matrices, explicit loops, gradcheck; memory; usage on a toy."
import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest, torch, torch.nn.functional as F
from scipy.stats import entropy as scipy_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import tokpost.attention as attention
from tokpost.attention import AttentionQuantizer, assignment_confidence, attend, attend_dense

ROOT = Path(__file__).parent.parent

def rng(seed=0): return torch.Generator().manual_seed(seed)

def inputs(M=37, K=512, d=8, D=4, dtype=torch.float64):
    tensors = [torch.randn(n, width, generator=rng(i), dtype=dtype) for i, (n, width) in enumerate(((M, d), (K, d), (K, D)))]
    return [(tensor/2).requires_grad_() for tensor in tensors]

def quantizer_of(K=512, D=6, seed=0, **options):
    torch.manual_seed(seed)
    return AttentionQuantizer(K, D, **options)

def largest(tensor): return tensor.abs().max().double().item()

# Chunks against whole matrices

def everything(quantizer, z, fn, monkeypatch):
    "Outputs, losses, and gradients of every parameter and of the latent."
    monkeypatch.setattr(attention, 'attend', fn)
    quantizer, z = copy.deepcopy(quantizer), z.clone().requires_grad_()
    z_q, indices, losses = quantizer(z)
    weight = torch.randn(z_q.shape, generator=rng(9)).to(z_q)
    ((z_q*weight).mean() + sum(losses.values())).backward()
    gradients = dict(z=z.grad, **{name: p.grad for name, p in quantizer.named_parameters()})
    return indices, dict(z_q=z_q, **losses), gradients

@pytest.mark.parametrize('dtype, bound, share', [(torch.float64, 1e-11, 1e-3), (torch.float32, 1e-5, 1.)])
@pytest.mark.parametrize('options', [dict(), dict(entropy_weight=0.), dict(entropy_weight=1., entropy_temperature=.1),
                                     dict(norm='layer'), dict(norm='none', entropy_temperature=1.)])
@pytest.mark.parametrize('K', [512, 300])
def test_chunked_equals_dense(K, options, dtype, bound, share, monkeypatch):
    "70 features in chunks of 7 and, with the last one short, of 16; `share` of the largest gradient of all."
    quantizer = quantizer_of(K, **options).to(dtype)
    with torch.no_grad():
        for norm in (quantizer.query_norm, quantizer.key_norm):
            for p in norm.parameters(): p.sub_(torch.rand(p.shape, generator=rng(3)).to(dtype)/2)
    z = torch.randn(2, 6, 5, 7, generator=rng(1)).to(dtype)
    indices, outputs, gradients = everything(quantizer, z, attend_dense, monkeypatch)
    assert len(indices.unique()) > 10 and ('entropy_loss' in outputs) == (options.get('entropy_weight') != 0.)
    steepest = max(map(largest, gradients.values()))
    for chunk in (7*K, 16*K+5, None):
        quantizer.chunk = chunk
        ours, found, slopes = everything(quantizer, z, attend, monkeypatch)
        assert torch.equal(ours, indices) and found.keys() == outputs.keys() and slopes.keys() == gradients.keys()
        for name in outputs: assert largest(found[name]-outputs[name]) < bound*largest(outputs[name]), name
        for name in gradients:  # a bias of all keys has no gradient at all
            assert largest(slopes[name]-gradients[name]) < bound*max(largest(gradients[name]), share*steepest), name

def test_dense_reference_equals_loops():
    "The reference itself, and the two terms of the entropy against scipy."
    queries, keys, values = (tensor.detach() for tensor in inputs(M=9, K=20))
    codes, chosen, indices, loss = attend_dense(queries, keys, values, temperature=.3)
    each, mean = 0., [0.]*20
    for m in range(9):
        logits = [sum(a*b for a, b in zip(queries[m].tolist(), keys[j].tolist())) for j in range(20)]
        i = max(range(20), key=logits.__getitem__)
        assert i == indices[m] and torch.allclose(codes[m], values[i]) and torch.equal(chosen[m], values[i])
        weights = [math.exp(a/.3) for a in logits]
        p = [w/sum(weights) for w in weights]
        each += scipy_entropy(p)/9
        mean = [a + b/9 for a, b in zip(mean, p)]
    assert loss.item() == pytest.approx(each + sum(p*math.log(p+1e-5) for p in mean), rel=1e-9)
    assert loss.item() == pytest.approx(each - scipy_entropy(mean), abs=1e-3)

@pytest.mark.parametrize('chunk', [1, 60, None])
def test_gradient_of_the_code_equals_the_formula(chunk):
    "dL/da = p (s - <p, s>) with s = V g; dL/dv = g on chosen rows; by loops over features."
    queries, keys, values = inputs(M=11, K=30)
    g, h = (torch.randn(11, 4, generator=rng(seed), dtype=torch.float64) for seed in (5, 6))
    codes, chosen, indices, _ = attend(queries, keys, values, chunk=chunk)
    ((codes*g).sum() + (chosen*h).sum()).backward()
    q, k, v = queries.detach(), keys.detach(), values.detach()
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for m in range(11):
        p = torch.tensor([math.exp(a) for a in (k @ q[m]).tolist()], dtype=torch.float64)
        p = p/p.sum()
        s = torch.stack([v[j].dot(g[m]) for j in range(30)])
        grad_a = p*(s - (p*s).sum())
        for j in range(30):
            grad_q[m] += grad_a[j]*k[j]
            grad_k[j] += grad_a[j]*q[m]
        grad_v[indices[m]] += g[m] + h[m]
    for found, expected in ((queries.grad, grad_q), (keys.grad, grad_k), (values.grad, grad_v)):
        assert torch.allclose(found, expected, atol=1e-12)
    assert (grad_v.abs().sum(1) == 0).sum() == 30 - len(indices.unique()) > 0

@pytest.mark.parametrize('temperature', [.05, 1.])
@pytest.mark.parametrize('chunk', [13*3, None])
def test_gradcheck_of_the_entropy(chunk, temperature):
    queries, keys, values = inputs(M=7, K=13, d=3, D=2)
    assert torch.autograd.gradcheck(
        lambda q, k: attend(q, k, values.detach(), temperature, chunk)[3], (queries, keys), atol=1e-6)

def test_gradcheck_of_the_values():
    queries, keys, values = inputs(M=7, K=13, d=3, D=2)
    assert torch.autograd.gradcheck(lambda v: attend(queries.detach(), keys.detach(), v, .1, 26)[:2], (values,))

@pytest.mark.parametrize('frozen', [0, 1, 2])
def test_frozen_inputs(frozen):
    "A frozen codebook, or latents without gradient: the others' gradients stay."
    expected, tensors = inputs(), inputs()
    tensors[frozen].requires_grad_(False)
    for each in (expected, tensors):
        codes, chosen, _, loss = attend(*each, .1)
        (codes.cos().sum() + chosen.sin().sum() + loss).backward()
    assert tensors[frozen].grad is None
    for i in {0, 1, 2} - {frozen}: assert torch.equal(tensors[i].grad, expected[i].grad)

def test_each_output_alone_has_its_gradient():
    for pick in range(4):
        if pick == 2: continue
        gradients = []
        for fn in (attend, attend_dense):
            tensors = inputs()
            fn(*tensors, .1)[pick].square().sum().backward()
            gradients.append([t.grad if t.grad is not None else torch.zeros_like(t) for t in tensors])
        for ours, theirs in zip(*gradients): assert torch.allclose(ours, theirs, atol=1e-11)

def test_nothing_in_nothing_out():
    quantizer = quantizer_of()
    z = torch.zeros(0, 6, 4, 4, requires_grad=True)
    z_q, indices, losses = quantizer(z)
    assert z_q.shape == (0, 16, 6) and indices.shape == (0, 16) and losses['entropy_loss'].item() == 0.
    z_q.sum().backward()
    assert z.grad.shape == z.shape
    assert quantizer.assign(z).shape == (0, 16) and quantizer.lookup(indices).shape == (0, 16, 6)
    assert quantizer.confidence(z, 3)[0].shape == (0, 16, 3)

def test_largest_by_blocks():
    for K in (256, 1024, 1000):
        logits = torch.randn(50, K, generator=rng(K))
        value, index = attention._largest(logits)
        assert torch.equal(value, logits.max(1).values) and torch.equal(index, logits.argmax(1))
    ties = torch.zeros(3, 512)
    assert torch.equal(attention._largest(ties)[1], torch.zeros(3, dtype=torch.long))

# Precision

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_computes_in_float32_under_autocast(dtype):
    quantizer, z = quantizer_of(), torch.randn(2, 6, 4, 4, generator=rng(1)).to(dtype)
    results = []
    for autocast in (False, True):
        quantizer.zero_grad()
        leaf = (z if autocast else z.float()).clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            z_q, indices, losses = quantizer(leaf)
            assert torch.equal(quantizer.assign(leaf), indices)
            assert torch.equal(quantizer.lookup(indices), z_q)
        (z_q.sin().sum() + sum(losses.values())).backward()
        results.append([indices, z_q, leaf.grad.to(dtype), quantizer.embedding.grad.clone(), *losses.values()])
        assert {z_q.dtype, *(loss.dtype for loss in losses.values())} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(*results))

def test_the_backward_pass_is_in_float32_under_autocast():
    gradients = []
    for autocast in (False, True):
        tensors = inputs(dtype=torch.float32)
        codes, _, _, loss = attend(*tensors, .1)
        total = codes.sin().sum() + loss
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast): total.backward()
        gradients.append([tensor.grad for tensor in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))

# Memory

class Largest(TorchDispatchMode):
    "Remembers the number of elements of the largest tensor made."
    size = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out

def test_no_matrix_of_positions_and_codes():
    "Neither made, nor kept for the backward pass."
    K, M, chunk = 4096, 900, 2**15
    quantizer, z = quantizer_of(K, 4, chunk=chunk, attention_dim=4), torch.randn(1, M, 4, generator=rng())
    kept = []
    def pack(tensor):
        kept.append(tensor.numel())
        return tensor
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z_q, _, losses = quantizer(z.requires_grad_())
        (z_q.sum() + sum(losses.values())).backward()
    assert largest.size <= 3*chunk < M*K/30
    assert kept and max(kept) <= 4*K

PEAK = """
import re, sys, torch
import tokpost.attention as attention

def memory(which): # kB; ru_maxrss would begin with the parent's
    return int(re.search(which + r':\\s+(\\d+)', open('/proc/self/status').read())[1])

def step(codebook_size):
    torch.manual_seed(0)
    quantizer, z = attention.AttentionQuantizer(codebook_size, 16), torch.randn(1, 16, 16, 16)
    z_q, _, losses = quantizer(z)
    (z_q.square().mean() + sum(losses.values())).backward()

attention.attend = getattr(attention, sys.argv[1])
step(512)  # loads what a step needs
before = memory('VmRSS')
step(65536)
print((memory('VmHWM') - before)/1024)
"""

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
def test_peak_memory_is_a_quarter_at_most():
    "Of a process that takes one step of one level of 256 positions at 65,536 codes."
    peaks = {}
    for fn in ('attend', 'attend_dense'):
        out = subprocess.run([sys.executable, '-c', PEAK, fn], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks[fn] = float(out.stdout)
    assert peaks['attend_dense'] > 5*256*65536*4/2**20  # the matrices were really there
    assert peaks['attend'] < peaks['attend_dense']/4, peaks

# The layer

@pytest.mark.parametrize('size, count', [(16384, 263_568), (65536, 1_050_000)])
def test_parameter_counts(size, count):
    assert sum(p.numel() for p in AttentionQuantizer(size, 16).parameters()) == count

def test_layer_equals_its_formula():
    "Queries, keys and values written out, and the four losses."
    quantizer = quantizer_of(40, 6, attention_dim=5, commitment_cost=.3, entropy_weight=.7, entropy_temperature=.2).double()
    with torch.no_grad():
        for norm in (quantizer.query_norm, quantizer.key_norm): norm.weight.copy_(torch.rand(5, generator=rng(8))+.5)
    u = torch.randn(3, 7, 6, generator=rng(2), dtype=torch.float64)
    rms = lambda x: x/(x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    E = quantizer.embedding
    q = rms(u.flatten(0, 1) @ quantizer.query.weight.T + quantizer.query.bias)*quantizer.query_norm.weight
    k = rms(E @ quantizer.key.weight.T + quantizer.key.bias)*quantizer.key_norm.weight
    v = E @ quantizer.value.weight.T + quantizer.value.bias
    a = q @ k.T/5**.5
    chosen = a.argmax(1)
    z_q, indices, losses = quantizer(u)
    assert torch.equal(indices.flatten(), chosen) and torch.allclose(z_q.flatten(0, 1), v[chosen])
    assert torch.allclose(quantizer.codebook, v)
    error = (u.flatten(0, 1) - v[chosen]).square().mean().item()
    P = (a/.2).softmax(1)
    spread = -(P*P.log()).sum(1).mean() + (P.mean(0)*(P.mean(0)+1e-5).log()).sum()
    expected = dict(assignment_loss=error, commitment_loss=error, codebook_loss=.3*error, entropy_loss=.7*spread.item())
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)

def test_gradients_of_the_losses_go_where_they_should():
    "Commitment moves the features alone, the codebook loss the codes alone, both not the assignment."
    for name, moved in (('commitment_loss', {'z'}), ('codebook_loss', {'embedding', 'value.weight', 'value.bias'}),
                        ('entropy_loss', {'z', 'embedding', 'query.weight', 'query.bias', 'key.weight', 'key.bias',
                                          'query_norm.weight', 'key_norm.weight'})):
        quantizer, z = quantizer_of(), torch.randn(2, 9, 6, generator=rng(1)).requires_grad_()
        quantizer(z)[2][name].backward()
        parts = dict(quantizer.named_parameters(), z=z)
        assert {part for part, p in parts.items() if p.grad is not None and p.grad.abs().max() > 0} == moved

def test_every_code_learns():
    quantizer, z = quantizer_of(2048, entropy_weight=0.), torch.randn(1, 8, 6, generator=rng(1))
    z_q, indices, _ = quantizer(z)
    z_q.square().sum().backward()
    assert (quantizer.embedding.grad.abs().amax(1) > 0).all() and len(indices.unique()) <= 8

def test_logits_are_bounded_cosines_at_the_start():
    quantizer = quantizer_of(4096, 16)
    logits = quantizer.queries(torch.randn(1, 200, 16, generator=rng())) @ quantizer.tables()[0].T
    assert logits.abs().max() <= math.sqrt(32)*1.0001 and logits.abs().max() > 2

@pytest.mark.parametrize('training', [True, False])
def test_lookup_gives_what_the_decoder_saw(training):
    quantizer = quantizer_of().train(training)
    maps = torch.randn(3, 6, 4, 5, generator=rng(1))
    z_q, indices, _ = quantizer(maps)
    assert torch.equal(quantizer.assign(maps), indices) and torch.equal(quantizer.lookup(indices), z_q)
    rows = quantizer(maps.flatten(2).mT)
    assert torch.equal(rows[0], z_q) and torch.equal(rows[1], indices)
    with torch.no_grad(): assert torch.equal(quantizer(maps)[0], z_q)

def test_indices_do_not_depend_on_the_batch():
    quantizer, z = quantizer_of(), torch.randn(9, 6, 4, 4, generator=rng(1))
    assert torch.equal(torch.cat([quantizer.assign(each) for each in z.split([1, 3, 5])]), quantizer.assign(z))

def test_tables_are_shared_inside_and_only_there():
    quantizer, z = quantizer_of(), torch.randn(1, 6, 4, 4, generator=rng(1))
    calls = []
    quantizer.key.register_forward_hook(lambda *args: calls.append(1))
    quantizer(z)[0].sum().backward()
    alone = quantizer.embedding.grad.clone()
    quantizer.zero_grad()
    with quantizer.shared_tables(), quantizer.shared_tables():
        (quantizer(z)[0].sum() + quantizer(z)[0].sum()).backward()
        quantizer.assign(z), quantizer.codebook
    assert len(calls) == 2 and torch.allclose(quantizer.embedding.grad, 2*alone, atol=1e-6)
    with torch.no_grad(): quantizer.value.bias.add_(1.)
    assert torch.allclose(quantizer.codebook, F.linear(quantizer.embedding, quantizer.value.weight, quantizer.value.bias))

@pytest.mark.parametrize('chunk', [512, None])
def test_confidence_equals_softmax(chunk):
    quantizer, z = quantizer_of(chunk=chunk), torch.randn(2, 6, 3, 3, generator=rng(1))
    p, indices = quantizer.confidence(z, 7)
    expected = (quantizer.queries(quantizer.flatten(z)) @ quantizer.tables()[0].T).softmax(1).sort(1, descending=True)
    assert torch.allclose(p.flatten(0, 1), expected.values[:, :7]) and p.shape == indices.shape == (2, 9, 7)
    assert torch.equal(indices[..., 0], quantizer.assign(z))
    assert torch.allclose(quantizer.confidence(z, 512)[0].sum(2), torch.ones(2, 9))

# Codes reach the data (toy of CODA's training dynamics)

@pytest.mark.parametrize('seed', [0, 1])
def test_attention_reaches_more_of_the_data(seed):
    cloud, start = 6 + 1.5*torch.randn(1000, 2, generator=rng(seed)), torch.randn(35, 2, generator=rng(seed+10))
    usage = {}
    for arm in ('nearest', 'attention'):
        torch.manual_seed(seed)
        quantizer, nearest = AttentionQuantizer(35, 2), torch.nn.Parameter(start.clone())
        quantizer.embedding.data.copy_(start)
        torch.nn.init.eye_(quantizer.value.weight)
        torch.nn.init.zeros_(quantizer.value.bias)
        optimizer = torch.optim.Adam([*quantizer.parameters(), nearest], .02, betas=(.5, .9))
        for _ in range(900):
            rows = cloud[torch.randint(1000, (128,))]
            if arm == 'attention': loss = sum(quantizer(rows[None])[2].values())
            else: loss = F.mse_loss(nearest[torch.cdist(rows, nearest).argmin(1)], rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        indices = quantizer.assign(cloud[None]) if arm == 'attention' else torch.cdist(cloud, nearest).argmin(1)
        usage[arm] = len(indices.unique())/35
    assert usage['attention'] > .8 and usage['attention'] > usage['nearest'] + .2, usage

# Bad input

@pytest.mark.parametrize('options, message', [
    (dict(codebook_size=1), 'codebook_size must be an integer of at least 2, got 1'),
    (dict(code_dim=0), 'code_dim must be an integer of at least 1, got 0'),
    (dict(attention_dim=1.5), 'attention_dim must be an integer of at least 1, got 1.5'),
    (dict(chunk=0), 'chunk must be an integer of at least 1, got 0'),
    (dict(commitment_cost=-1.), r'commitment_cost must be in \[0, inf\), got -1'),
    (dict(entropy_weight=math.nan), r'entropy_weight must be in \[0, inf\), got nan'),
    (dict(entropy_temperature=0.), r'entropy_temperature must be in \(0, inf\), got 0'),
    (dict(norm='batch'), "norm must be 'rms', 'layer' or 'none', got 'batch'")])
def test_bad_quantizers_are_refused(options, message):
    with pytest.raises(ValueError, match=message): AttentionQuantizer(**dict(codebook_size=8, code_dim=2) | options)

@pytest.mark.parametrize('shape', [(2, 5, 4, 4), (2, 9, 5), (6,), (2, 6)])
def test_bad_features_are_refused(shape):
    for call in ('forward', 'assign', 'confidence'):
        with pytest.raises(ValueError, match=r'z must be \(B, 6, H, W\) or \(B, N, 6\), got'):
            getattr(quantizer_of(), call)(torch.zeros(shape))

@pytest.mark.parametrize('wrong', [-1, 512])
def test_indices_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r'indices must be in \[0, 512\), got'):
        quantizer_of().lookup(torch.tensor([[0, wrong]]))

@pytest.mark.parametrize('count', [0, 513])
def test_bad_counts_are_refused(count):
    with pytest.raises(ValueError, match=rf'count must be in \[1, 512\], got {count}'):
        assignment_confidence(quantizer_of(), torch.zeros(1, 1, 6), count)
