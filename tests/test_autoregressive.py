"The autoregressive generator against explicit loops, closed forms and an undisturbed run."
import math
import pytest, torch, torch.nn.functional as F
from contextlib import contextmanager
from functools import partial
from scipy.stats import binom
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from tokpost.autoregressive import (RAR, CachedDecoding, CUDAGraph, KVCache, random_orders, randomness, sample_tokens,
                                    token_loss, train_generator, write_tokens)
from tokpost.data import make_token_store
from tokpost.networks import decay_groups
from tokpost.released import LlamaGen
from tokpost.run import fast_bfloat16
from tokpost.sampling import (PackedLinear, draw_tokens, drop_classes, filter_logits, guidance_weights, pack_weights,
                              preservation_mask)

K, N, C = 23, 16, 5
SIZES = dict(codebook_size=K, num_tokens=N, num_classes=C, width=24, depth=3, heads=3)
PLAIN = dict(conditioning='none', target_aware=False, qk_norm=False)
VARIANTS = [{}, PLAIN, dict(qk_norm=False), dict(target_aware=False), dict(conditioning='none'),
            dict(official_tables=True)]
variants = pytest.mark.parametrize('options', VARIANTS, ids=lambda o: ' '.join(o) or 'RAR')


def rng(seed=0): return torch.Generator().manual_seed(seed)

def within_binomial_bounds(count, n, p):
    return binom.ppf(5e-7, n, p) <= count <= binom.isf(5e-7, n, p)

def random_model(seed=0, **options):
    "Every weight random, since a fresh model's blocks are the identity."
    model = RAR(**SIZES | options).eval()
    for p in model.parameters(): nn.init.normal_(p, std=.3, generator=rng(seed))
    return model

@pytest.fixture
def tokens(): return torch.randint(K, (6, N), generator=rng(1))

@pytest.fixture
def labels(): return torch.tensor([0, 1, 2, 3, 4, 2])


# the network

def by_hand(model, tokens, label, order):
    "Logits of one sequence, one step at a time in plain formulas, from the last position of each prefix."
    p = {name: value.double() for name, value in model.state_dict().items()}
    norm = lambda x, name='': F.layer_norm(x, x.shape[-1:], p.get(f'{name}.weight'), p.get(f'{name}.bias'), 1e-6)
    linear = lambda x, name: x @ p[f'{name}.weight'].T + p[f'{name}.bias']
    logits = []
    for steps in range(N):
        class_embedding = p['inputs.embedding.weight'][K+1+label]
        x = [p['inputs.cls_token'][0, 0] + p['inputs.position'][0],
             class_embedding + p['inputs.position'][1]]
        x += [p['inputs.embedding.weight'][tokens[order[t]]] + p['inputs.position'][2+order[t]] for t in range(steps)]
        if model.inputs.target is not None:
            for t in range(steps+1): x[t+1] = x[t+1] + p['inputs.target'][2+order[t]]
        x = torch.stack(x)                                             # (steps+2, W)
        adaln = model.inputs.step is not None
        if adaln: c = F.silu(class_embedding + p['inputs.step'][:steps+2])
        for i in range(len(model.blocks)):
            b = f'blocks.{i}'
            m = linear(c, f'{b}.modulation').chunk(6, -1) if adaln else (0., 0., 1., 0., 0., 1.)
            h = linear(norm(x, f'{b}.norm1')*(1+m[1]) + m[0], f'{b}.attention.qkv')
            heads = []
            for q, k, v in zip(*(part.chunk(3, -1) for part in h.chunk(3, -1))):
                if isinstance(model.blocks[0].attention.q_norm, nn.LayerNorm):
                    q, k = norm(q, f'{b}.attention.q_norm'), norm(k, f'{b}.attention.k_norm')
                rows = []
                for t in range(steps+2):
                    weights = (k[:t+1] @ q[t] / math.sqrt(q.shape[-1])).softmax(0)
                    rows.append(weights @ v[:t+1])
                heads.append(torch.stack(rows))
            x = x + m[2]*linear(torch.cat(heads, -1), f'{b}.attention.projection')
            h = linear(norm(x, f'{b}.norm2')*(1+m[4]) + m[3], f'{b}.mlp.0')
            x = x + m[5]*linear(F.gelu(h), f'{b}.mlp.3')
        x = norm(x, 'head.norm')
        if adaln:
            scale, shift = linear(c, 'head.modulation').chunk(2, -1)
            x = x*(1+scale) + shift
        logits.append(linear(x, 'head.linear')[-1])
    return torch.stack(logits)

@variants
def test_forward_equals_formulas(options, tokens, labels):
    model, orders = random_model(**options), random_orders(6, N, .5, rng(2))
    with torch.no_grad(): logits = model(tokens, labels, orders)
    assert logits.shape == (6, N, K) and logits.dtype == torch.float32
    for b in (0, 3):
        expected = by_hand(model, tokens[b], labels[b], orders[b])
        assert (logits[b]-expected).abs().max() < 1e-4*expected.std()

def test_raster_order_is_the_default(tokens, labels):
    model = random_model()
    with torch.no_grad():
        assert torch.equal(model(tokens, labels), model(tokens, labels, torch.arange(N).expand(6, N)))

@variants
def test_causal_in_any_order(options, tokens, labels):
    "Gradients of the logits at a step reach the embeddings of exactly the earlier tokens of the order."
    model, orders = random_model(**options), random_orders(6, N, 1., rng(3))
    reached = []
    model.inputs.embedding.register_forward_hook(
        lambda module, args, out: reached.append(out) or out.retain_grad() if out.shape[1] == N-1 else None)
    for step in (0, 1, 7, N-1):
        model.zero_grad(); reached.clear()
        model(tokens, labels, orders)[:, step].square().sum().backward()
        seen = reached[0].grad.abs().sum(-1) > 0                       # (6, N-1)
        assert torch.equal(seen, (torch.arange(N-1) < step).expand(6, N-1))

def test_null_class_is_a_class_of_its_own(tokens, labels):
    model = random_model()
    with torch.no_grad():
        null = model(tokens, torch.full_like(labels, C))
        assert all((null - model(tokens, torch.full_like(labels, c))).abs().amax() > .01 for c in range(C))

def test_modulations_once_per_class_are_the_same(tokens, labels):
    "A batch of many images takes another path than one of few; outputs and gradients agree."
    model = random_model()
    many, classes = tokens.repeat(4, 1), torch.randint(C+1, (24,), generator=rng(4))
    def gradients(parts):
        model.zero_grad()
        torch.cat([model(many[i], classes[i]) for i in parts]).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters()]
    at_once, in_parts = gradients([slice(0, 24)]), gradients([slice(i, i+4) for i in range(0, 24, 4)])
    for a, b in zip(at_once, in_parts): assert (a-b).abs().max() <= 2e-4*(1e-2 + b.abs().max())

@variants
def test_cached_logits_equal_forward(options, tokens, labels):
    model = random_model(**options)
    with torch.no_grad():
        decode = CachedDecoding(model, labels, span=5)
        one_by_one = torch.stack([decode()] + [decode(token) for token in tokens[:, :-1].T], 1)
        expected = model(tokens, labels)
    assert (one_by_one-expected).abs().max() <= 1e-5*expected.abs().max()

@torch.no_grad()
def decoded(model, tokens, labels, **options):
    decode = CachedDecoding(model, labels, **options)
    return torch.stack([decode()] + [decode(token) for token in tokens[:, :-1].T], 1), decode

@pytest.mark.parametrize('span', [2, 3, N, N+1, 100])
def test_any_span_gives_the_same_logits(span, tokens, labels):
    model = random_model()
    logits, decode = decoded(model, tokens, labels, span=span)
    with torch.no_grad(): expected = model(tokens, labels)
    assert (logits-expected).abs().max() <= 1e-5*expected.abs().max()
    assert all(cache.length.item() == len(cache.places) == N+1 for cache in decode.caches)

def test_cache_holds_what_it_has_room_for(tokens, labels):
    attention, x = random_model().blocks[0].attention, torch.randn(2, 9, 24, generator=rng())
    cache = KVCache(5)
    with torch.no_grad():
        seen = [attention(x[:, :2], cache), attention(x[:, 2:5], cache)]
        memory = cache.memory
        with pytest.raises(IndexError): attention(x[:, 5:6], cache)
        with pytest.raises((IndexError, RuntimeError)): attention(x[:, 5:], KVCache(3))
        cache.reserve(3), cache.reserve(5)
        assert cache.memory is memory and len(cache.places) == 5
        cache.reserve(9)
        seen.append(attention(x[:, 5:], cache))
        assert (torch.cat(seen, 1) - attention(x)).abs().max() < 1e-5*attention(x).abs().max()
        logits, decode = decoded(random_model(), tokens, labels)
        with pytest.raises(ValueError, match=f'tokens must be at most {N-1}, got one more'): decode(tokens[:, -1])
    with pytest.raises(ValueError, match='span must be at least 2, got 1'): CachedDecoding(random_model(), labels, span=1)

def test_modulations_once_per_class(tokens):
    "Several sequences of a class, in any order, and the null class: each class is computed once per span."
    model, rows = random_model(), []
    labels = torch.tensor([3, C, 1, 3, C, C])
    condition = model.inputs.condition
    model.inputs.condition = lambda *args: rows.append((args[0].tolist(), args[1])) or condition(*args)
    logits, _ = decoded(model, tokens, labels, span=6)
    assert rows == [([1, 3, C], 0), ([1, 3, C], 6), ([1, 3, C], 12)]
    del model.inputs.condition
    with torch.no_grad(): expected = model(tokens, labels)
    assert (logits-expected).abs().max() <= 1e-5*expected.abs().max()

def test_every_step_is_the_same_graph(tokens, labels):
    "Two graphs, the start and one token, serve all positions: no look at values, no change of shape."
    model, counter = random_model(), CompileCounter()
    torch._dynamo.reset()
    decode = CachedDecoding(model, labels, span=5, graphs=False)
    for cache in decode.caches: cache.reserve(N+1)
    decode.step = torch.compile(decode.step, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        logits = torch.stack([decode()] + [decode(token) for token in tokens[:, :-1].T], 1)
        expected = model(tokens, labels)
    assert counter.frame_count == 2
    assert (logits-expected).abs().max() <= 1e-5*expected.abs().max()

class Tape(TorchDispatchMode):
    "What a CUDA graph does, on a CPU: recording leaves no trace, replaying repeats it in the same memory."
    def __init__(self):
        super().__init__()
        self.operations, self.before = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, 'looked at a value'
        if operation._schema.is_mutable:
            changed = [x for x, a in zip(args, operation._schema.arguments) if a.alias_info and a.alias_info.is_write]
            self.before += [(x, x.clone()) for x in changed]
        out = operation(*args, **kwargs or {})
        self.operations.append((operation, args, kwargs or {}, out))
        return out

    def capture_end(self):
        for x, value in reversed(self.before): x.copy_(value)

    def replay(self):
        for operation, args, kwargs, out in self.operations:
            again = operation(*args, **kwargs)
            for x, value in zip(*((y if isinstance(y, (list, tuple)) else [y]) for y in (out, again))):
                if x.data_ptr() != value.data_ptr(): x.copy_(value)

@contextmanager
def recorded(tape, **options):
    with tape: yield
    tape.capture_end()

@pytest.fixture
def cuda_graphs_on_the_cpu(monkeypatch):
    tapes = []
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: tapes.append(Tape()) or tapes[-1])
    monkeypatch.setattr(torch.cuda, 'graph', recorded)
    return tapes

def random_llamagen(**options):
    model = LlamaGen(K, N, C, width=24, depth=2, heads=3).eval()
    for p in model.parameters(): nn.init.normal_(p, std=.3, generator=rng())
    return model

@pytest.mark.parametrize('make', [*(partial(random_model, **options) for options in VARIANTS), random_llamagen])
def test_replayed_steps_equal_forward(make, tokens, labels, cuda_graphs_on_the_cpu):
    model = make()
    logits, decode = decoded(model, tokens, labels, span=5, graphs=True)
    with torch.no_grad(): expected = model(tokens, labels)
    assert (logits-expected).abs().max() <= 1e-5*expected.abs().max()
    tape, = cuda_graphs_on_the_cpu
    assert len(tape.operations) > 20 and isinstance(decode.step, CUDAGraph)

def test_a_replay_reads_no_memory_that_was_given_back(tokens, labels, cuda_graphs_on_the_cpu):
    "Every tensor the graph reads, made before it, is still the one that the decoder holds at the end."
    model = random_model()
    decode, held = CachedDecoding(model, labels, span=5, graphs=True), lambda: [
        x.data_ptr() for cache in decode.caches for x in (cache.memory, cache.places, cache.length)] + [
        x.data_ptr() for x in (*decode.modulations, decode.position, decode.places, decode.rows)]
    decode(), decode(tokens[:, 0])
    assert not cuda_graphs_on_the_cpu                                  # two calls to warm up
    decode(tokens[:, 1])
    assert len(cuda_graphs_on_the_cpu) == 1
    early = held()
    for token in tokens[:, 2:-1].T: decode(token)
    assert held() == early

def test_fresh_model_has_identity_blocks_and_small_logits(tokens, labels):
    model = RAR(**SIZES)
    x = torch.randn(2, 4, 24)
    assert all(torch.equal(block(x, block.modulation(x)), x) for block in model.blocks)
    loss, _ = token_loss(model, tokens, labels, random_orders(6, N, 1., rng()))
    assert abs(loss.item() - math.log(K)) < .1
    for name, p in model.named_parameters():
        if 'modulation' in name or name.endswith('bias') or 'cls_token' in name: assert not p.any()
        elif 'norm' in name: assert (p == 1).all()
        else: assert abs(p.std() - .02) < 5*.02/math.sqrt(2*p.numel()) and abs(p.mean()) < 5*.02/math.sqrt(p.numel())

@pytest.mark.parametrize('width, size', [(768, 265.6), (1024, 468.0)])
def test_parameter_counts_of_the_paper(width, size):
    with torch.device('meta'): model = RAR(4096, width=width, official_tables=True)
    assert round(sum(p.numel() for p in model.parameters())/1e6, 1) == size

def test_bad_architecture():
    with pytest.raises(ValueError, match="conditioning must be 'adaln' or 'none', got 'film'"): RAR(**SIZES, conditioning='film')
    with pytest.raises(ValueError, match='width must be a multiple of heads=5, got 24'): RAR(**SIZES | dict(heads=5))


# orders, loss, class dropout

def test_random_orders_are_uniform_permutations():
    orders = random_orders(60_000, 3, .5, rng())
    assert torch.equal(orders.sort(1).values, torch.arange(3).expand(60_000, 3))
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        count = int((orders == torch.tensor(order)).all(1).sum())
        assert within_binomial_bounds(count, 60_000, .5/6 + .5*(order == [0, 1, 2]))
    assert torch.equal(random_orders(9, 5, 0.), torch.arange(5).expand(9, 5))

def test_randomness_of_the_paper():
    assert [randomness(s, 125_000, 187_500) for s in (0, 124_999, 125_000, 140_625, 187_500, 250_000)] == [1, 1, 1, .75, 0, 0]
    assert randomness(0, 0, 0) == 0 and randomness(0., 1., 1.) == 1
    with pytest.raises(ValueError, match='start'): randomness(0, .7, .5)

def test_loss_equals_loop(tokens, labels):
    model, orders = random_model(), random_orders(6, N, 1., rng(5))
    loss, accuracy = token_loss(model, tokens, labels, orders)
    with torch.no_grad(): logits = model(tokens, labels, orders).double()
    nats, right = 0., 0
    for b in range(6):
        for t in range(N):
            target = tokens[b, orders[b, t]]
            nats -= float(logits[b, t].log_softmax(-1)[target])
            right += int(logits[b, t].argmax() == target)
    assert abs(loss.item() - nats/(6*N)) < 1e-4*abs(loss.item())
    assert abs(accuracy.item() - right/(6*N)) < 1e-6

def test_class_dropout_rate():
    labels = torch.randint(C, (50_000,), generator=rng())
    dropped = drop_classes(labels, .1, C, rng(1))
    assert within_binomial_bounds(int((dropped == C).sum()), 50_000, .1)
    assert torch.equal(dropped[dropped < C], labels[dropped < C])
    assert torch.equal(drop_classes(labels, 0., C), labels) and (drop_classes(labels, 1., C) == C).all()


# sampling

@pytest.fixture(autouse=True)
def pack_small_layers_too(monkeypatch): monkeypatch.setattr(PackedLinear, 'smallest', 0)

EVERYTHING = dict(guidance_scale=3., guidance_power=1.5, temperature=1.1, top_k=9, top_p=.9)

@variants
@pytest.mark.parametrize('sampling', [{}, EVERYTHING, dict(guidance_scale=2., guidance_schedule='linear')],
                         ids=['plain', 'everything', 'linear'])
def test_cache_changes_no_token(options, sampling, tokens, labels):
    model = random_model(**options)
    for sigma in (0., .5):
        fast, slow = (model.sample(labels, tokens, sigma, rng(), cache=cache, **sampling) for cache in (True, False))
        assert torch.equal(fast, slow)
        assert fast.dtype == torch.long and fast.shape == (6, N) and 0 <= fast.min() and fast.max() < K

def test_sampling_loop_by_hand(tokens, labels):
    "Guided, greedy, with forced tokens: every token recomputed from whole prefixes with the formula."
    model, mask = random_model(), preservation_mask((6, N), .4, rng(6))
    choose = lambda t, logits: torch.where(mask[:, t], tokens[:, t], logits.argmax(-1))
    written = write_tokens(model, labels, guidance_weights(4., N, 1.3), choose)
    x = torch.zeros(6, N, dtype=torch.long)
    for t in range(N):
        w = 1 + (4-1)*.5*(1-math.cos(math.pi*(t/N)**1.3))
        with torch.no_grad(): c, u = model(x, labels)[:, t], model(x, torch.full_like(labels, C))[:, t]
        for b in range(6): x[b, t] = tokens[b, t] if mask[b, t] else (u[b] + w*(c[b]-u[b])).argmax()
    assert torch.equal(written, x)

def test_guidance_weights():
    for t, w in enumerate(guidance_weights(6., 256, 1.15).tolist()):
        assert abs(w - (1 + 5*.5*(1-math.cos(math.pi*(t/256)**1.15)))) < 1e-12
    assert torch.equal(guidance_weights(1., 8), torch.ones(8))
    assert guidance_weights(3., 4, schedule='linear').tolist() == [1, 1.5, 2, 2.5]
    assert guidance_weights(3., 4, 2., 'constant').tolist() == [3]*4
    with pytest.raises(ValueError, match='guidance_schedule'): guidance_weights(3., 4, schedule='step')
    with pytest.raises(ValueError, match='guidance_power'): guidance_weights(3., 4, 0.)

def test_scale_one_skips_the_branch_without_class(labels):
    model, widths = random_model(), []
    model.head.register_forward_hook(lambda module, args, out: widths.append(len(out)))
    model.sample(labels, generator=rng())
    assert widths == [6]*N
    widths.clear()
    model.sample(labels, guidance_scale=2., generator=rng())
    assert widths == [12]*N

def test_sigma_one_returns_the_tokens(tokens, labels):
    same = random_model().sample(labels, tokens, 1., rng(), **EVERYTHING)
    assert torch.equal(same, tokens) and same.data_ptr() != tokens.data_ptr()

def test_sigma_zero_is_plain_sampling(tokens, labels):
    model = random_model()
    assert torch.equal(model.sample(labels, tokens, 0., rng()), model.sample(labels, generator=rng()))
    assert not torch.equal(model.sample(labels, generator=rng()), model.sample(labels, generator=rng(1)))

def test_forced_where_the_mask_says_and_only_there(labels):
    "True tokens that the sampler can never draw by itself show where they were forced."
    model = random_model()
    with torch.no_grad(): model.head.linear.bias[K-1] = -1e4
    true = torch.full((600, N), K-1)
    mixed, mask = sample_tokens(model, labels.repeat(100), true, .3, generator=rng(), return_mask=True)
    assert torch.equal(mixed == K-1, mask)
    assert within_binomial_bounds(int(mask.sum()), mask.numel(), .3)
    per_position = mask.sum(0).tolist()
    assert all(within_binomial_bounds(count, 600, .3) for count in per_position)

def test_forced_tokens_condition_later_ones(tokens, labels):
    "The logits of every step are those of the mixed tokens before it, with a class and without."
    model, mask, seen = random_model(), preservation_mask((6, N), .5, rng(11)), []
    choose = lambda t, logits: seen.append(logits) or torch.where(mask[:, t], tokens[:, t], draw_tokens(logits, race))
    race, weights = rng(12), guidance_weights(2.5, N)
    mixed = write_tokens(model, labels, weights, choose)
    with torch.no_grad(): c, u = model(mixed, labels), model(mixed, torch.full_like(labels, C))
    expected = u + weights[:, None].float()*(c-u)
    assert (torch.stack(seen, 1) - expected).abs().max() < 1e-5*expected.abs().max()
    assert torch.equal(mixed[mask], tokens[mask]) and (mixed != tokens).any()

def test_same_past_draws_the_same_token_at_any_sigma(tokens, labels):
    model = random_model()
    free = model.sample(labels, generator=rng())
    for sigma in (.1, .5):
        mixed, mask = model.sample(labels, tokens, sigma, rng(), return_mask=True)
        for b in range(6):
            first = int(mask[b].int().argmax()) if mask[b].any() else N
            assert torch.equal(mixed[b, :first], free[b, :first])

def test_mask_rate():
    for sigma in (0., .1, .7, 1.):
        assert within_binomial_bounds(int(preservation_mask((500, 256), sigma, rng()).sum()), 128_000, sigma)

@pytest.mark.parametrize('top_k, top_p', [(0, 1.), (1, 1.), (5, 1.), (K, 1.), (0, .5), (0, .999), (0, 1e-6), (6, .8)])
def test_filters_equal_loops(top_k, top_p):
    logits = 2*torch.randn(40, K, generator=rng(7))
    kept = filter_logits(logits.clone(), top_k, top_p)
    for row, got in zip(logits, kept):
        order = sorted(range(K), key=lambda k: -row[k])[:top_k or K]
        p = row[order].double().softmax(0).tolist()
        expected, held = set(), 0.
        for code, share in zip(order, p):
            if held < top_p: expected.add(code)
            held += share
        assert {k for k in range(K) if got[k].isfinite()} == expected
        assert all(got[k] == row[k] for k in expected)

def test_drawn_tokens_follow_the_distribution():
    p = torch.tensor([.5, .3, .15, .05, 0.])
    drawn = draw_tokens(p.log().expand(40_000, 5), rng())
    assert all(within_binomial_bounds(int((drawn == k).sum()), 40_000, float(p[k])) for k in range(5))

def test_first_token_follows_the_model(labels):
    "Shares of the first token are those of softmax(logits / temperature)."
    model, many = random_model(), torch.full((20_000,), 3)
    with torch.no_grad(): model.head.linear.weight *= .2
    one = RAR(**SIZES | dict(num_tokens=1)).eval()
    for p in one.parameters(): nn.init.normal_(p, std=.1, generator=rng(8))
    drawn = one.sample(many, temperature=.7, generator=rng())[:, 0]
    with torch.no_grad(): p = (one.next_logits(drawn[:1, None][:, :0], many[:1])[0, 0]/.7).double().softmax(0)
    assert all(within_binomial_bounds(int((drawn == k).sum()), 20_000, float(p[k])) for k in range(K))

def test_sampling_restores_the_mode_and_draws_without_dropout(tokens, labels):
    model = random_model(dropout=.5, attention_dropout=.5)
    expected = model.sample(labels, generator=rng())
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.sample(labels, generator=rng()), expected)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError): model.sample(labels, sigma=.5)
    assert [module.training for module in model.modules()] == modes

def test_sampling_under_bf16(tokens, labels):
    model = random_model()
    with torch.autocast('cpu', torch.bfloat16):
        mixed, mask = model.sample(labels, tokens, .5, rng(), return_mask=True, **EVERYTHING)
        decode = CachedDecoding(model.eval(), labels)
        with torch.no_grad(): logits = decode()
    assert torch.equal(mixed[mask], tokens[mask]) and logits.dtype == torch.float32
    assert decode.caches[0].memory.dtype == torch.bfloat16

@pytest.mark.parametrize('copies', [1, 3])
def test_sequences_of_one_class_are_drawn_as_of_several(copies, labels):
    "Many sequences of few classes; each is what greedy choice writes for its class alone."
    model, greedy = random_model(), lambda t, logits: logits.argmax(-1)
    weights = guidance_weights(3., N)
    written = write_tokens(model, labels.repeat(copies), weights, greedy)
    for row, label in zip(written, labels.repeat(copies)):
        assert torch.equal(row, write_tokens(model, label[None], weights, greedy)[0])

def test_packed_weights_compute_the_same(monkeypatch):
    monkeypatch.undo()                                                 # small layers stay as they are
    a = nn.Sequential(nn.Linear(7, 5000, bias=False), nn.GELU(), nn.Linear(5000, 7))
    model = nn.ModuleDict(dict(a=a, b=nn.Linear(300, 301), small=nn.Linear(3, 3)))
    model.register_module('none', None)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    packed = pack_weights(model)
    assert [m.packed for m in packed.modules() if type(m) is PackedLinear] == [True, True, True, False]
    assert packed.none is None
    assert type(model['b']) is nn.Linear and model['a'][1] is not packed['a'][1]
    with torch.no_grad():
        for shape in [(7,), (1, 7), (4, 7), (2, 3, 7), (0, 7), (2, 0, 7)]:
            x = torch.randn(shape, generator=rng())
            expected, got = model['a'](x), packed['a'](x)
            assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5)
        x = torch.randn(300, 50, generator=rng()).T                    # not contiguous
        assert torch.allclose(packed['b'](x), model['b'](x), atol=1e-5)
        model['b'].weight.zero_()                                      # the copy does not follow
        assert packed['b'](x).abs().sum() > model['b'](x).abs().sum() + 1
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items() if name != 'b.weight')

class Adapted(nn.Linear):
    def forward(self, x): return super().forward(x) + 1

def test_only_plain_linear_layers_are_packed():
    module = nn.Sequential(Adapted(4, 4), nn.Linear(4, 4))
    x, packed = torch.randn(2, 4), pack_weights(module)
    assert [type(m) for m in packed] == [Adapted, PackedLinear]
    with torch.no_grad(): assert torch.allclose(packed(x), module(x), atol=1e-6)

def test_packed_precision(monkeypatch):
    linear, x = nn.Linear(256, 128), torch.randn(4, 256)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        packed, expected = PackedLinear(linear), linear(x)
        assert packed.packed == fast_bfloat16(torch.device('cpu'))
        assert packed(x).dtype == expected.dtype == torch.bfloat16 and (packed(x)-expected).abs().max() <= .01
    double = PackedLinear(nn.Linear(256, 128).double())
    assert not double.packed and double(x.double()).dtype == torch.float64
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    plain = PackedLinear(linear)
    assert not plain.packed and torch.equal(plain(x), linear(x).detach())

def test_same_tokens_without_onednn(labels, monkeypatch):
    model = random_model()
    assert pack_weights(model).head.linear.packed
    expected = model.sample(labels, generator=rng(), **EVERYTHING)
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    assert torch.equal(model.sample(labels, generator=rng(), **EVERYTHING), expected)

def test_packed_once_for_many_calls(labels):
    model = random_model()
    packed = pack_weights(model)
    assert pack_weights(packed).head.linear.weight is packed.head.linear.weight
    assert torch.equal(packed.sample(labels, generator=rng(), **EVERYTHING), model.sample(labels, generator=rng(), **EVERYTHING))

def test_weights_may_change_between_two_calls(labels):
    model = random_model()
    first = model.sample(labels, generator=rng())
    with torch.no_grad(): model.blocks[0].mlp[0].weight.mul_(-1)
    second = model.sample(labels, generator=rng())
    assert not torch.equal(first, second) and torch.equal(second, model.sample(labels, generator=rng(), cache=False))

def test_global_generator_decides_without_one(labels):
    model = random_model()
    torch.manual_seed(5); first = model.sample(labels)
    torch.manual_seed(5); assert torch.equal(model.sample(labels), first)

@pytest.mark.parametrize('change, message', [
    (dict(labels=torch.tensor([0, C])), r'labels must be .* in \[0, 5\)'),
    (dict(labels=torch.tensor([0, -1])), 'labels must be'),
    (dict(labels=torch.zeros(2, 1).long()), 'labels must be'),
    (dict(indices=torch.zeros(2, N-1).long()), r'indices must be \(2, 16\), got \(2, 15\)'),
    (dict(indices=torch.full((2, N), K)), r'indices must be in \[0, 23\), got 23 to 23'),
    (dict(indices=torch.full((2, N), -1)), 'indices must be in'),
    (dict(sigma=1.1), r'sigma must be in \[0, 1\], got 1.1'),
    (dict(sigma=-.1), 'sigma must be in'),
    (dict(sigma=float('nan')), 'sigma must be in'),
    (dict(indices=None), 'indices must be given when sigma > 0'),
    (dict(temperature=0.), 'temperature must be above 0, got 0.0'),
    (dict(top_p=0.), r'top_p must be in \(0, 1\], got 0.0'),
    (dict(top_p=1.5), 'top_p must be in'),
    (dict(top_k=-1), r'top_k must be in \[0, 23\], got -1'),
    (dict(guidance_schedule='step'), 'guidance_schedule must be one of'),
    (dict(guidance_power=0.), 'guidance_power must be above 0')])
def test_bad_sampling(change, message):
    good = dict(labels=torch.tensor([0, 1]), indices=torch.zeros(2, N).long(), sigma=.5)
    with pytest.raises(ValueError, match=message): random_model().sample(**good | change)


# training

TRAINING = dict(steps=8, batch_size=12, lr=3e-3, warmup=2, precision='fp32')

@pytest.fixture
def data():
    labels = torch.randint(C, (40,), generator=rng(9))
    return (3*labels[:, None] + torch.arange(N) + torch.randint(2, (40, N), generator=rng(10))) % K, labels

def fresh(seed=0, **options):
    torch.manual_seed(seed)
    return RAR(**SIZES | dict(depth=2) | options)

def state(model): return torch.cat([p.detach().flatten() for p in model.state_dict().values()])

def test_decay_only_on_linear_weights():
    model = fresh()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ([names[id(p)] for p in group['params']] for group in decay_groups(model, .03))
    assert [g['weight_decay'] for g in decay_groups(model, .03)] == [.03, 0.]
    assert sorted(decayed + spared) == sorted(names.values())
    assert all(name.endswith('.weight') for name in decayed)
    ends = ('qkv', 'projection', 'mlp.0', 'mlp.3', 'modulation', 'head.linear')
    assert all(any(f'{end}.weight' in name for end in ends) for name in decayed) and len(decayed) == 2*5 + 2
    assert not any(part in name for name in decayed for part in ('norm', 'embedding', 'position', 'target', 'step', 'cls'))

@pytest.mark.parametrize('options', [{}, PLAIN], ids=['RAR', 'plain'])
def test_training_learns_and_same_seed_gives_same_bytes(options, data):
    models = [fresh(**options) for _ in range(3)]
    rows = [train_generator(model, data, **TRAINING | dict(steps=40, lr=1e-2), seed=seed)
            for model, seed in zip(models, (0, 0, 1))]
    assert torch.equal(state(models[0]), state(models[1])) and rows[0] == rows[1]
    assert not torch.equal(state(models[0]), state(models[2]))
    assert [row['step'] for row in rows[0]] == list(range(40))
    assert sum(r['loss'] for r in rows[0][-5:]) < sum(r['loss'] for r in rows[0][:5]) - .5
    assert not models[0].training

def test_resumed_training_equals_undisturbed(tmp_path, data, monkeypatch):
    undisturbed = fresh()
    expected = train_generator(undisturbed, data, **TRAINING)
    import tokpost.autoregressive as module
    calls, real = [], module.token_loss
    def dies(*args):
        calls.append(1)
        if len(calls) == 6: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(module, 'token_loss', dies)
    with pytest.raises(KeyboardInterrupt):
        train_generator(fresh(), data, **TRAINING, folder=tmp_path, checkpoint_every=3)
    monkeypatch.undo()
    resumed = fresh(seed=99)
    rows = train_generator(resumed, data, **TRAINING, folder=tmp_path, checkpoint_every=3)
    assert rows == expected and torch.equal(state(resumed), state(undisturbed))
    with pytest.raises(ValueError, match='lr'):
        train_generator(fresh(), data, **TRAINING | dict(lr=1e-3), folder=tmp_path)
    with pytest.raises(ValueError, match='width'):
        train_generator(fresh(width=48), data, **TRAINING, folder=tmp_path)

def test_store_and_tensors_train_alike(tmp_path, data):
    indices, labels = data
    store = make_token_store(tmp_path/'tokens', lambda rows: indices[rows], labels, N, K, dict(tokenizer='none'))
    models = fresh(), fresh()
    assert train_generator(models[0], store, **TRAINING) == train_generator(models[1], data, **TRAINING)
    assert torch.equal(state(models[0]), state(models[1]))

def test_orders_of_training(data, monkeypatch):
    "Shuffled before the start of annealing, raster after its stop, and labels dropped at the rate."
    import tokpost.autoregressive as module
    seen, real = [], module.token_loss
    monkeypatch.setattr(module, 'token_loss', lambda *args: seen.append(args) or real(*args))
    train_generator(fresh(class_dropout=.3), data, **TRAINING | dict(steps=20, batch_size=36))
    raster = [float((orders == torch.arange(N)).all(1).float().mean()) for _, _, _, orders in seen]
    assert raster[:10] == [0.]*10 and raster[15:] == [1.]*5 and 0 < sum(raster[10:15]) < 5
    nulls = sum(int((labels == C).sum()) for _, _, labels, _ in seen)
    assert within_binomial_bounds(nulls, 20*36, .3)

def test_training_data_is_checked(data):
    indices, labels = data
    with pytest.raises(ValueError, match=r'indices must be in \[0, 23\)'): train_generator(fresh(), (indices+1, labels), **TRAINING)
    with pytest.raises(ValueError, match=r'labels must be'): train_generator(fresh(), (indices, labels+1), **TRAINING)
    with pytest.raises(ValueError, match='indices must be'): train_generator(fresh(), (indices[:, 1:], labels), **TRAINING)
    with pytest.raises(ValueError, match='labels must be'): train_generator(fresh(), (indices, labels[1:]), **TRAINING)

def test_a_loss_that_is_not_finite_stops_training(data):
    model = fresh()
    with torch.no_grad(): model.head.linear.bias[0] = float('nan')
    with pytest.raises(FloatingPointError, match='generator: the loss is not finite at step 0'):
        train_generator(model, data, **TRAINING)

def test_trained_in_one_step_like_adamw_by_hand(data):
    "First step: clipped gradient, warm-up rate, decay on linear weights only."
    model, before = fresh(dropout=0., attention_dropout=0., class_dropout=0.), {}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_generator(model, data, steps=1, batch_size=40, lr=1e-2, warmup=1, weight_decay=.5, precision='fp32',
                    randomness_start=0., randomness_stop=0.)
    other = fresh(dropout=0., attention_dropout=0., class_dropout=0.)
    token_loss(other, *data, torch.arange(N).expand(40, N))[0].backward()
    decayed = {id(p) for p in decay_groups(other, .5)[0]['params']}
    norm = torch.sqrt(sum(p.grad.square().sum() for p in other.parameters() if p.grad is not None))
    after = dict(model.named_parameters())
    for name, p in other.named_parameters():
        g = p.grad*min(1., 1./float(norm))
        shrunk = before[name]*(1 - 1e-2*.5*(id(p) in decayed))
        large = g.abs() > 1e-5                         # where Adam's epsilon and rounding do not matter
        expected = shrunk - 1e-2*g.sign()
        assert torch.allclose(after[name][large], expected[large], atol=2e-4)
        assert large.any() or g.abs().max() < 1e-5

@pytest.mark.parametrize('clip', [.05, 1e6])
def test_gradients_are_clipped(data, monkeypatch, clip):
    "Norms that the optimizer sees: the clip, or the gradient's own."
    norms, real = [], torch.optim.AdamW.step
    def step(optimizer, *args):
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return real(optimizer, *args)
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    train_generator(fresh(), data, **TRAINING, clip=clip)
    assert len(norms) == TRAINING['steps']
    assert all(abs(norm-.05) < 1e-4 for norm in norms) if clip == .05 else max(norms) > .1
