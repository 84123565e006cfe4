"Residual quantization against explicit loops, over nearest-code and attention quantizers."
import math

import pytest, torch, torch.nn.functional as F
import tokpost.attention as attention
from tokpost.attention import AttentionQuantizer, attend_dense
from tokpost.quantizer import VectorQuantizer
from tokpost.residual import ResidualQuantizer, join_levels, level_ids, level_usage, split_levels

MAR, FLUX = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]
FORMS = [[1, 2, 3, 5], [5, 5, 5], [5], [2, 2, 5, 5], [4, 1, 5]]
KINDS = ['nearest', 'attention']

def rng(seed=0): return torch.Generator().manual_seed(seed)

def inner_of(kind, K=40, D=3):
    torch.manual_seed(0)
    if kind == 'attention': return AttentionQuantizer(K, D, attention_dim=8)
    quantizer = VectorQuantizer(K, D, normalize=False)
    quantizer.embedding.data.copy_(torch.randn(K, D, generator=rng(1)))
    return quantizer

def quantizer_of(kind='attention', sides=(1, 2, 3, 5), **options):
    return ResidualQuantizer(inner_of(kind, **options), list(sides))

@pytest.fixture
def z(): return torch.randn(4, 3, 5, 5, generator=rng(2))

# Levels

@pytest.mark.parametrize('sides, K, tokens, bits', [(MAR, 16384, 680, 9520), (MAR, 65536, 680, 10880), (FLUX, 65536, 2240, 35840)])
def test_tokens_and_bits_of_the_paper(sides, K, tokens, bits):
    quantizer = quantizer_of(sides=sides, K=K)
    assert (quantizer.num_tokens, quantizer.bits, quantizer.levels) == (tokens, bits, 10)
    ids = level_ids(sides)
    assert [int((ids == level).sum()) for level in range(10)] == [side**2 for side in sides]
    assert torch.equal(ids, ids.sort().values)

@pytest.mark.parametrize('K, count', [(16384, 263_568), (65536, 1_050_000)])
def test_levels_have_no_parameters_of_their_own(K, count):
    quantizer = ResidualQuantizer(AttentionQuantizer(K, 16), MAR)
    assert sum(p.numel() for p in quantizer.parameters()) == count

@pytest.mark.parametrize('sides', FORMS)
def test_levels_split_and_join(sides):
    tokens = torch.arange(3*sum(s*s for s in sides)).view(3, -1)
    levels, start = split_levels(tokens, sides), 0
    for level, side in zip(levels, sides):
        for row in range(side):
            assert torch.equal(level[:, row], tokens[:, start:start+side])
            start += side
    assert torch.equal(join_levels(levels), tokens)

# Against loops

def shrink(x, side):
    "Area: each cell is the mean of the pixels it touches."
    full = len(x)
    edges = [(i*full//side, -(-(i+1)*full//side)) for i in range(side)]
    return torch.stack([torch.stack([x[a:b, c:d].mean((0, 1)) for c, d in edges]) for a, b in edges])

def weights(full, side):
    "Bicubic interpolation by Keys' kernel, a = -3/4, with clamped borders: (full, side)."
    def kernel(t, a=-.75):
        t = abs(t)
        if t <= 1: return (a+2)*t**3 - (a+3)*t**2 + 1
        return a*(t**3 - 5*t**2 + 8*t - 4) if t < 2 else 0.
    matrix = torch.zeros(full, side, dtype=torch.float64)
    for i in range(full):
        x = (i+.5)*side/full - .5
        for j in range(math.floor(x)-1, math.floor(x)+3): matrix[i, min(max(j, 0), side-1)] += kernel(x-j)
    return matrix

@pytest.mark.parametrize('sides', FORMS)
def test_nearest_codes_over_levels_equal_loops(z, sides):
    quantizer = quantizer_of('nearest', sides)
    codes = quantizer.codebook.detach().double()
    z_q, indices, losses = quantizer(z)
    commitment = 0.
    for b in range(4):
        rest, found = z[b].permute(1, 2, 0).double(), []
        for side in sides:
            u = shrink(rest, side)
            chosen = (u[:, :, None]-codes).square().sum(3).argmin(2)
            commitment += (u-codes[chosen]).square().mean()/4/len(sides)*.25
            rest = rest - torch.einsum('yi,xj,ijd->yxd', weights(5, side), weights(5, side), codes[chosen])
            found += chosen.flatten().tolist()
        assert indices[b].tolist() == found
        f_hat = z[b].permute(1, 2, 0).double() - rest
        assert torch.allclose(z_q[b].double().view(5, 5, 3), f_hat, atol=1e-5)
    assert losses['commitment_loss'].item() == pytest.approx(commitment.item(), rel=1e-5)

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('sides', FORMS)
def test_sum_and_residual_are_the_latent(z, kind, sides, monkeypatch):
    "Each level sees, shrunk, what the levels before it left of the latent."
    quantizer, seen = quantizer_of(kind, sides), []
    quantizer.quantizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    z_q, indices, losses = quantizer(z)
    assert len(seen) == len(sides)
    for level, (side, u) in enumerate(zip(sides, seen)):
        f_hat = quantizer.lookup(indices, level).mT.unflatten(2, (5, 5)) if level else 0.
        rest = (z - f_hat).permute(0, 2, 3, 1)
        expected = torch.stack([shrink(each, side) for each in rest]).permute(0, 3, 1, 2)
        assert torch.allclose(u, expected, atol=1e-5)

@pytest.mark.parametrize('kind', KINDS)
def test_losses_are_the_mean_over_levels(z, kind):
    quantizer, terms = quantizer_of(kind), []
    quantizer.quantizer.register_forward_hook(lambda module, inputs, out: terms.append(out[2]))
    losses = quantizer(z)[2]
    assert losses.keys() == terms[0].keys() and len(terms) == 4
    for name in losses: assert torch.allclose(losses[name], torch.stack([t[name] for t in terms]).mean())

# Decoding

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('sides', FORMS + [[1, 2, 3, 4, 6, 9]])
def test_decoding_is_exact(kind, sides):
    quantizer, z = quantizer_of(kind, sides), torch.randn(3, 3, sides[-1], sides[-1], generator=rng(5))
    for each in (quantizer.train(), quantizer.eval()):
        z_q, indices, _ = each(z)
        assert torch.equal(each.assign(z), indices) and indices.shape == (3, quantizer.num_tokens)
        assert torch.equal(each.lookup(indices), z_q) and z_q.shape == (3, sides[-1]**2, 3)
        assert torch.equal(each.lookup(indices, levels=len(sides)), z_q)
        assert torch.equal(each.assign(z.requires_grad_()), indices)

@pytest.mark.parametrize('kind', KINDS)
def test_first_levels_alone(z, kind):
    quantizer = quantizer_of(kind)
    indices = quantizer.assign(z)
    table, f_hat = quantizer.codebook.detach().double(), torch.zeros(4, 5, 5, 3, dtype=torch.float64)
    for k, (side, level) in enumerate(zip(quantizer.sides, split_levels(indices, quantizer.sides)), 1):
        f_hat = f_hat + torch.einsum('yi,xj,bijd->byxd', weights(5, side), weights(5, side), table[level])
        assert torch.allclose(quantizer.lookup(indices, k).double().view(4, 5, 5, 3), f_hat, atol=1e-5)
        first = indices[:, :sum(s*s for s in quantizer.sides[:k])]
        assert torch.equal(quantizer.lookup(first, k), quantizer.lookup(indices, k))

@pytest.mark.parametrize('kind', KINDS)
def test_indices_do_not_depend_on_the_batch(z, kind):
    quantizer = quantizer_of(kind)
    assert torch.equal(torch.cat([quantizer.assign(each) for each in z.split([1, 3])]), quantizer.assign(z))

@pytest.mark.parametrize('kind', KINDS)
def test_single_level_is_the_plain_quantizer(z, kind):
    plain, quantizer, results = inner_of(kind), quantizer_of(kind, [5]), []
    for each, inner in ((plain, plain), (quantizer, quantizer.quantizer)):
        leaf = z.clone().requires_grad_()
        z_q, indices, losses = each(leaf)
        (z_q.sin().sum() + sum(losses.values())).backward()
        results.append([z_q, indices, leaf.grad, *losses.values(), *(p.grad for p in inner.parameters())])
    for a, b in zip(*results): assert torch.allclose(a, b, atol=1e-6)
    assert torch.equal(plain.assign(z), quantizer.assign(z))

# Gradients

@pytest.mark.parametrize('sides', FORMS)
def test_nearest_codes_pass_the_gradient_once(z, sides):
    "Of z_q, the identity to the latent and nothing to the codes; of the losses, a pull at every level."
    quantizer, leaf = quantizer_of('nearest', sides), z.clone().requires_grad_()
    weight = torch.randn(4, 25, 3, generator=rng(7))
    z_q, indices, losses = quantizer(leaf)
    grad, codes = torch.autograd.grad((z_q*weight).sum(), (leaf, quantizer.quantizer.embedding),
                                      retain_graph=True, allow_unused=True)
    assert torch.equal(grad, weight.mT.unflatten(2, (5, 5))) and codes is None

    sum(losses.values()).backward()
    expected, table = torch.zeros(4, 5, 5, 3, dtype=torch.float64), quantizer.codebook.detach().double()
    pulled = torch.zeros_like(table)
    for level, (side, index) in enumerate(zip(sides, split_levels(indices, sides))):
        for b in range(4):
            f_hat = quantizer.lookup(indices, level)[b].detach().view(5, 5, 3).double() if level else 0.
            rest = (z[b].permute(1, 2, 0).double() - f_hat).requires_grad_()
            u = shrink(rest, side)
            error = (u - table[index[b]]).square().sum()/(4*side*side*3)/len(sides)
            expected[b] += .25*torch.autograd.grad(error, rest)[0]
            step = 2*(table[index[b]] - u.detach())/(4*side*side*3)/len(sides)
            pulled.index_add_(0, index[b].flatten(), step.view(-1, 3))
    assert torch.allclose(leaf.grad.double(), expected.permute(0, 3, 1, 2), atol=1e-7)
    assert torch.allclose(quantizer.quantizer.embedding.grad.double(), pulled, atol=1e-7)

def chain(inner, z, sides, forced=None):
    "The algorithm of the digest, by whole matrices and torch's interpolation, nothing detached."
    keys, values = inner.key_norm(inner.key(inner.embedding)), inner.value(inner.embedding)
    rest, f_hat, total, found = z, 0., 0., []
    for level, side in enumerate(sides):
        u = F.interpolate(rest, size=side, mode='area').flatten(2).mT.flatten(0, 1)
        logits = inner.query_norm(inner.query(u)) @ keys.T/math.sqrt(inner.attention_dim)
        p, indices = logits.softmax(1), logits.argmax(1)
        if forced is not None: indices = forced[level].flatten()
        one_hot = F.one_hot(indices, len(keys)).to(p)
        code, hard = (one_hot - p.detach() + p) @ values, one_hot @ values
        P = (logits/inner.entropy_temperature).softmax(1)
        entropy = torch.special.entr(P).sum(1).mean() + (P.mean(0)*(P.mean(0)+1e-5).log()).sum()
        total = total + ((code-u)**2).mean() + ((hard.detach()-u)**2).mean() \
            + inner.commitment_cost*((hard-u.detach())**2).mean() + inner.entropy_weight*entropy
        code = code.unflatten(0, (len(z), side, side)).permute(0, 3, 1, 2)
        code = F.interpolate(code, size=z.shape[-1], mode='bicubic')
        rest, f_hat = rest - code, f_hat + code
        found.append(indices.view(len(z), -1))
    return f_hat.flatten(2).mT, torch.cat(found, 1), total/len(sides)

@pytest.mark.parametrize('sides', FORMS)
def test_attention_over_levels_equals_dense_autograd(z, sides):
    "Outputs, losses, and gradients of the latent and of every parameter, in float64."
    quantizer, results = quantizer_of('attention', sides).double(), []
    inner = quantizer.quantizer
    inner.entropy_temperature = .1
    for run in (lambda leaf: quantizer(leaf), lambda leaf: chain(inner, leaf, sides)):
        leaf = z.double().requires_grad_()
        inner.zero_grad()
        z_q, indices, losses = run(leaf)
        total = sum(losses.values()) if isinstance(losses, dict) else losses
        (z_q.sin().sum() + 3*total).backward()
        results.append([indices, z_q.detach(), total.detach(), leaf.grad, *(p.grad.clone() for p in inner.parameters())])
    for ours, theirs in zip(*results): assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    assert results[0][3].abs().max() > 1e-3

def test_chunked_equals_dense_over_the_papers_levels(monkeypatch):
    quantizer, z, results = quantizer_of(sides=MAR, K=512, D=16), torch.randn(1, 16, 16, 16, generator=rng(3)), []
    quantizer.quantizer.chunk = 50*512
    for fn in (attention.attend, attend_dense):
        monkeypatch.setattr(attention, 'attend', fn)
        quantizer.zero_grad()
        leaf = z.clone().requires_grad_()
        z_q, indices, losses = quantizer(leaf)
        (z_q.square().mean() + sum(losses.values())).backward()
        results.append((indices, z_q.detach(), [leaf.grad, *(p.grad.clone() for p in quantizer.parameters())]))
    assert torch.equal(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1], atol=1e-6)
    steepest = max(g.abs().max() for g in results[1][2])
    for ours, theirs in zip(results[0][2], results[1][2]): assert (ours-theirs).abs().max() < 1e-5*steepest

def test_tables_are_made_once(z):
    quantizer, calls = quantizer_of('attention'), []
    quantizer.quantizer.key.register_forward_hook(lambda *args: calls.append(1))
    quantizer(z)
    quantizer.assign(z)
    assert len(calls) == 2

@pytest.mark.parametrize('kind', KINDS)
def test_computes_in_float32_under_autocast(z, kind):
    quantizer, results = quantizer_of(kind), []
    for autocast in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            z_q, indices, losses = quantizer(z)
            assert torch.equal(quantizer.assign(z), indices) and torch.equal(quantizer.lookup(indices), z_q)
        results.append([z_q, indices, *losses.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results)) and z_q.dtype == torch.float32

# Perturbation inside the loop

def swap(level, indices): return torch.where(torch.arange(indices.shape[1]) % 2 == level % 2, (indices+7) % 40, indices)

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('sides', FORMS)
def test_perturbed_tokens_are_what_is_decoded(z, kind, sides):
    quantizer, calls = quantizer_of(kind, sides), []
    def perturb(level, indices):
        calls.append((level, tuple(indices.shape)))
        return swap(level, indices)
    z_q, indices, _ = quantizer(z, perturb=perturb)
    assert calls == [(level, (4, side**2)) for level, side in enumerate(sides)]
    assert torch.equal(quantizer.lookup(indices), z_q) and torch.equal(quantizer.assign(z, perturb), indices)
    first = slice(0, sides[0]**2)
    assert torch.equal(indices[:, first], swap(0, quantizer.assign(z)[:, first]))
    same = quantizer(z, perturb=lambda level, indices: indices.clone())
    assert torch.equal(same[0], quantizer(z)[0]) and torch.equal(same[1], quantizer(z)[1])

@pytest.mark.parametrize('sides', FORMS)
def test_gradient_of_a_perturbed_assignment(z, sides):
    "The gradient at the swapped code goes through the true probabilities, and to the swapped value."
    quantizer, results = quantizer_of('attention', sides).double(), []
    inner = quantizer.quantizer
    forced = split_levels(quantizer(z.double(), perturb=swap)[1], sides)
    for run in (lambda leaf: quantizer(leaf, perturb=swap)[0], lambda leaf: chain(inner, leaf, sides, forced)[0]):
        leaf = z.double().requires_grad_()
        inner.zero_grad()
        z_q = run(leaf)
        z_q.sin().sum().backward()
        results.append([z_q.detach(), leaf.grad, *(p.grad.clone() for p in inner.parameters())])
    for ours, theirs in zip(*results): assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)

def test_gradient_of_perturbed_nearest_codes_is_the_identity(z):
    leaf, weight = z.clone().requires_grad_(), torch.randn(4, 25, 3, generator=rng(7))
    (quantizer_of('nearest')(leaf, perturb=swap)[0]*weight).sum().backward()
    assert torch.equal(leaf.grad, weight.mT.unflatten(2, (5, 5)))

def test_later_levels_make_up_for_swaps_inside_the_loop():
    "Half of the tokens of the first of three levels; codes of all lengths, as residuals are."
    quantizer, z = quantizer_of('nearest', [6, 6, 6], K=300), torch.randn(16, 3, 6, 6, generator=rng(4))
    with torch.no_grad(): quantizer.quantizer.embedding.mul_(torch.linspace(.05, 1.5, 300)[:, None])
    def first(level, indices): return torch.where(torch.arange(36) % 2 == 0, (indices+7) % 300, indices) if level == 0 else indices
    clean = quantizer.assign(z)
    after = clean.clone()
    after[:, :36] = first(0, clean[:, :36])
    error = [F.mse_loss(quantizer.lookup(indices), z.flatten(2).mT).item()
             for indices in (clean, quantizer.assign(z, first), after)]
    assert error[0] < error[1] < .5*error[2]

@pytest.mark.parametrize('wrong, message', [
    (lambda level, indices: indices[:, :-1], r'perturb must return indices \(4, 4\), got \(4, 3\)'),
    (lambda level, indices: indices+40, r'indices must be in \[0, 40\), got')])
def test_bad_perturbations_are_refused(z, wrong, message):
    quantizer = quantizer_of(sides=[2, 5])
    for call in (quantizer, quantizer.assign):
        with pytest.raises(ValueError, match=message): call(z, perturb=wrong)

# Usage

def test_usage_equals_loops():
    indices = torch.randint(0, 20, (6, 14), generator=rng()).square() % 23
    rows = level_usage(indices, [1, 2, 3], 25)
    assert [row['level'] for row in rows] == [0, 1, 2, 'all'] and [row['tokens'] for row in rows] == [1, 4, 9, 14]
    for row, part in zip(rows, (indices[:, :1], indices[:, 1:5], indices[:, 5:], indices)):
        tokens = part.flatten().tolist()
        shares = [tokens.count(k)/len(tokens) for k in set(tokens)]
        assert row['codebook_usage'] == pytest.approx(len(shares)/25)
        assert row['perplexity'] == pytest.approx(math.exp(-sum(p*math.log(p) for p in shares)))

# Bad input

@pytest.mark.parametrize('sides, message', [
    ([], 'sides must be one or more positive integers'), ([0, 5], 'sides must be one or more positive integers'),
    ([-1], 'sides must be one or more positive integers'), ([1, 2.5], r'sides must be one or more positive integers, got \[1, 2.5\]'),
    ([True, 5], 'sides must be one or more positive integers'), ([5, 3], r"sides must end at the largest, the latent's, got \[5, 3\]")])
def test_bad_sides_are_refused(sides, message):
    with pytest.raises(ValueError, match=message): ResidualQuantizer(inner_of('nearest'), sides)
    if 'largest' not in message:
        with pytest.raises(ValueError, match=message): level_ids(sides)

def test_normalized_codes_are_refused():
    with pytest.raises(ValueError, match='got normalize=True'): ResidualQuantizer(VectorQuantizer(8, 3), [1, 2])

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shape', [(4, 3, 6, 6), (4, 2, 5, 5), (4, 3, 5, 6), (4, 25, 3), (3, 5, 5)])
def test_bad_latents_are_refused(kind, shape):
    quantizer = quantizer_of(kind)
    for call in (quantizer, quantizer.assign):
        with pytest.raises(ValueError, match=r'z must be \(B, 3, 5, 5\), the sides end at 5, got'): call(torch.zeros(shape))

@pytest.mark.parametrize('indices, options, message', [
    (torch.zeros(2, 38, dtype=torch.long), {}, r'indices must be \(B, 39\), the tokens of levels \[1, 2, 3, 5\], got \(2, 38\)'),
    (torch.zeros(2, 5, dtype=torch.long), {}, r'indices must be \(B, 39\)'),
    (torch.zeros(2, 14, dtype=torch.long), dict(levels=2), r'indices must be \(B, 39\)'),
    (torch.zeros(39, dtype=torch.long), {}, r'indices must be \(B, 39\)'),
    (torch.full((2, 39), 40), {}, r'indices must be in \[0, 40\), got \[40, 40\]'),
    (torch.full((2, 39), -1), {}, r'indices must be in \[0, 40\), got \[-1, -1\]'),
    (torch.zeros(2, 39, dtype=torch.long), dict(levels=0), r'levels must be in \[1, 4\], got 0'),
    (torch.zeros(2, 39, dtype=torch.long), dict(levels=5), r'levels must be in \[1, 4\], got 5')])
def test_bad_indices_are_refused(indices, options, message):
    with pytest.raises(ValueError, match=message): quantizer_of().lookup(indices, **options)

def test_bad_sequences_are_refused():
    with pytest.raises(ValueError, match=r'indices must be \(B, 5\), the tokens of levels \[1, 2\], got \(3, 6\)'):
        split_levels(torch.zeros(3, 6), [1, 2])
    with pytest.raises(ValueError, match=r'levels must be maps \(B, side, side\), got \[\(3, 4\)\]'):
        join_levels([torch.zeros(3, 4)])
    with pytest.raises(ValueError, match=r'indices must be in \[0, 4\), got \[4, 4\]'):
        level_usage(torch.full((2, 5), 4), [1, 2], 4)
