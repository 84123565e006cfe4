"The masked generator against explicit loops, closed forms and an undisturbed run."
import math
import pytest, torch, torch.nn.functional as F
from scipy.stats import beta, binom, kstest
from torch import nn
from tokpost.data import TokenStore, make_token_store
from tokpost.masked import (SCHEDULES, Codes, MaskedTransformer, Places, SkipTransformer, fill_tokens, guided_logits,
                            masked_loss, masked_share, random_mask, rows_at_once, sample_tokens, train_masked, trained_masked,
                            unmask_counts)
from tokpost.networks import decay_groups
from tokpost.run import Run
from tokpost.sampling import guidance_weights

K, N, C = 23, 14, 5
SIZES = dict(codebook_size=K, num_tokens=N, num_classes=C, width=24, depth=3, heads=3, sides=[1, 2, 3])
TABLE = torch.randn(K, 4, generator=torch.Generator().manual_seed(5))
ONE_LEVEL = dict(num_tokens=16, sides=None)
VARIANTS = [{}, dict(code_table=TABLE), dict(skips=False), dict(qk_norm=True), dict(depth=4), ONE_LEVEL]
variants = pytest.mark.parametrize('options', VARIANTS, ids=lambda o: ' '.join(o) or 'plain')


def rng(seed=0): return torch.Generator().manual_seed(seed)

def within_binomial_bounds(count, n, p):
    return binom.ppf(5e-7, n, p) <= count <= binom.isf(5e-7, n, p)

def random_model(seed=0, **options):
    "Every weight random, attention sharp enough for each token to matter."
    model, draws = MaskedTransformer(**SIZES | options).eval(), rng(seed)
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=1. if 'norm' in name and name.endswith('weight') else 0., std=.4, generator=draws)
    return model

def some_tokens(model, seed=1): return torch.randint(K, (6, model.num_tokens), generator=rng(seed))

@pytest.fixture
def tokens(): return torch.randint(K, (6, N), generator=rng(1))

@pytest.fixture
def labels(): return torch.tensor([0, 1, 2, 3, 4, 2])


# masks and schedules

def test_beta_ratio_is_beta():
    "Shares of a long sequence follow Beta(12, 3)."
    shares = random_mask(2000, 1000, generator=rng()).double().mean(1)
    assert kstest(shares.numpy(), beta(12, 3).cdf).pvalue > 1e-3
    assert abs(shares.mean() - .8) < 5*math.sqrt(.8*.2/16/2000)

@pytest.mark.parametrize('ratio', SCHEDULES)
def test_schedule_ratio_is_the_schedule_at_uniform_progress(ratio):
    shares = random_mask(2000, 200, ratio, generator=rng()).double().mean(1)
    mean = masked_share((torch.arange(100_000).double()+.5)/100_000, ratio).mean()
    assert abs(shares.mean() - mean) < 5*.35/math.sqrt(2000)
    assert ((shares*200).round() >= 1).all()

def test_masked_positions_are_uniform_and_never_none():
    mask = random_mask(20_000, 5, 'linear', rng())
    assert mask.dtype == torch.bool and mask.any(1).all()
    share = float(mask.float().mean())
    assert all(abs(float(m)-share) < .02 for m in mask.float().mean(0))
    pairs = {tuple(row) for row in mask[mask.sum(1) == 2].tolist()}
    assert len(pairs) == 10                                            # any two of five
    assert random_mask(50, 1, generator=rng()).all()
    assert torch.equal(random_mask(9, 5, generator=rng()), random_mask(9, 5, generator=rng()))

def test_shares_of_the_schedules():
    for r in (0., .2, .5, .9, 1.):
        at = lambda name: float(masked_share(torch.tensor(r, dtype=torch.float64), name))
        expected = dict(cosine=math.cos(math.pi*r/2), arccos=2*math.acos(r)/math.pi, linear=1-r, square=1-r*r,
                        root=1-math.sqrt(r))
        for name, value in expected.items(): assert abs(at(name) - value) < 1e-12
    with pytest.raises(ValueError, match='schedule must be one of'): masked_share(torch.zeros(1), 'exp')
    with pytest.raises(ValueError, match="ratio must be 'beta' or one of"): random_mask(2, 4, 'gamma')

def counts_by_hand(unknown, steps, share):
    "MaskGIT's rule with exact fractions where the share is rational: tokens left, then differences."
    left, counts = unknown, []
    for t in range(steps):
        wanted = math.floor(unknown*share((t+1)/steps) + 1e-9) if t < steps-1 else 0
        wanted = max(wanted, steps-1-t)              # one for each step to come
        after = max(0, min(wanted, left-1))          # at least one now, while there are any
        counts.append(left-after)
        left = after
    return counts

SHARES = dict(cosine=lambda r: math.cos(math.pi*r/2), arccos=lambda r: 2*math.acos(r)/math.pi, linear=lambda r: 1-r,
              square=lambda r: 1-r*r, root=lambda r: 1-math.sqrt(r))

@pytest.mark.parametrize('steps', [1, 2, 8, 32, 100])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_unmask_counts_by_hand(schedule, steps):
    unknown = torch.tensor([0, 1, 2, 7, 8, 9, 64, 100, 256, 680, 2240])
    counts = unmask_counts(unknown, steps, schedule)
    assert counts.shape == (11, steps)
    for n, row in zip(unknown.tolist(), counts.tolist()):
        assert row == counts_by_hand(n, steps, SHARES[schedule])
        assert sum(row) == n and all(count >= 1 for count in row[:min(n, steps)]) and not any(row[min(n, steps):])

def test_linear_schedule_in_equal_steps():
    assert unmask_counts(torch.tensor([10]), 10, 'linear').tolist() == [[1]*10]
    assert unmask_counts(torch.tensor([640]), 32, 'linear').tolist() == [[20]*32]
    for steps in (0, -3):
        with pytest.raises(ValueError, match=f'steps must be at least 1, got {steps}'): unmask_counts(torch.tensor([4]), steps)


# the network

def by_hand(model, tokens, label, mask):
    "Logits of one image in plain formulas, double precision."
    p = {name: value.double() for name, value in model.state_dict().items()}
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], p.get(f'{name}.weight'), p.get(f'{name}.bias'), 1e-6)
    linear = lambda x, name: x @ p[f'{name}.weight'].T + p[f'{name}.bias']
    x, t = [p['classes.weight'][label]], 0
    for level, side in enumerate(model.sides):
        full = p['places.position']
        grid = full if side == full.shape[-1] else F.interpolate(full, size=(side, side), mode='bicubic')
        for row in range(side):
            for column in range(side):
                if mask[t]: token = p['mask_token']
                elif 'codes.table' in p: token = linear(p['codes.table'][tokens[t]], 'codes.enter')
                else: token = p['codes.embedding.weight'][tokens[t]]
                x.append(token + grid[0, :, row, column] + p['places.level'][level])
                t += 1
    x, kept, depth, skips = torch.stack(x), {}, len(model.body.blocks), len(model.body.skips)
    for i in range(depth):
        b = f'body.blocks.{i}'
        if i >= depth-skips: x = linear(torch.cat([x, kept[depth-1-i]], -1), f'body.skips.{i-depth+skips}')
        h, heads = linear(norm(x, f'{b}.norm1'), f'{b}.attention.qkv'), []
        for q, k, v in zip(*(part.chunk(3, -1) for part in h.chunk(3, -1))):
            if f'{b}.attention.q_norm.weight' in p: q, k = norm(q, f'{b}.attention.q_norm'), norm(k, f'{b}.attention.k_norm')
            heads.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f'{b}.attention.projection')
        x = x + linear(F.gelu(linear(norm(x, f'{b}.norm2'), f'{b}.mlp.0')), f'{b}.mlp.3')
        kept[i] = x
    x = norm(x, 'body.norm')[1:]
    x = norm(F.gelu(linear(x, 'codes.transform.0')), 'codes.transform.2')
    if 'codes.table' in p: x, table = linear(x, 'codes.leave')/math.sqrt(p['codes.table'].shape[1]), p['codes.table']
    else: table = p['codes.embedding.weight']
    return x @ table.T + p['codes.bias']

@variants
def test_forward_equals_formulas(options, labels):
    model = random_model(**options)
    tokens, mask = some_tokens(model), random_mask(6, model.num_tokens, 'linear', rng(2))
    with torch.no_grad(): logits = model(tokens, labels, mask)
    assert logits.shape == (6, model.num_tokens, K) and logits.dtype == torch.float32
    for b in (0, 3):
        expected = by_hand(model, tokens[b], labels[b], mask[b])
        assert (logits[b]-expected).abs().max() < 1e-4*expected.std()

@variants
def test_every_logit_depends_on_every_known_token_and_on_no_hidden_one(options, labels):
    model = random_model(**options)
    tokens, mask = some_tokens(model), random_mask(6, model.num_tokens, 'linear', rng(3))
    reached = []
    model.codes.register_forward_hook(lambda module, args, out: reached.append(out.detach().requires_grad_()) or reached[0])
    logits = model(tokens, labels, mask)
    for position in range(model.num_tokens):
        model.zero_grad()
        reached[0].grad = None
        logits[:, position].square().sum().backward(retain_graph=True)
        assert torch.equal(reached[0].grad.abs().sum(-1) > 0, ~mask)
    changed = torch.where(mask, (tokens+1) % K, tokens)
    with torch.no_grad(): assert torch.equal(model(changed, labels, mask), logits)

def test_null_class_is_a_class_of_its_own(tokens, labels):
    model, mask = random_model(), torch.ones(6, N).bool()
    with torch.no_grad():
        null = model(tokens, torch.full_like(labels, C), mask)
        for c in range(C): assert (null - model(tokens, torch.full_like(labels, c), mask)).abs().amax() > .01

def test_images_do_not_depend_on_their_batch(tokens, labels):
    model, mask = random_model(), random_mask(6, N, 'linear', rng(4))
    with torch.no_grad():
        together = model(tokens, labels, mask)
        alone = torch.cat([model(tokens[b:b+1], labels[b:b+1], mask[b:b+1]) for b in range(6)])
    assert (together-alone).abs().max() < 1e-4*together.std()

def test_places_of_plain_residual_levels_differ_by_the_level_alone():
    places = Places([4, 4, 4], 8)
    for p in places.parameters(): nn.init.normal_(p, generator=rng())
    first, second, third = places()[0].split(16)
    test = second - first - (places.level[1]-places.level[0])
    assert test.abs().max() < 1e-6 and not torch.equal(second, third)

def test_code_table_is_standardised_and_not_trained():
    codes = Codes(K, 24, 50 + 7*TABLE)
    assert torch.allclose(codes.codes.mean(0), torch.zeros(4), atol=1e-5)
    assert abs(codes.codes.square().mean() - 1) < 1e-5
    assert not any(p.shape == (K, 4) for p in codes.parameters()) and 'table' in codes.state_dict()
    shifted = Codes(K, 24, TABLE)
    assert torch.allclose(codes.codes, shifted.codes, atol=1e-4)
    assert torch.isfinite(Codes(K, 24, torch.ones(K, 4)).codes).all()

def test_fresh_model_has_small_logits(tokens, labels):
    for table in (None, TABLE):
        torch.manual_seed(0)
        model = MaskedTransformer(**SIZES | dict(code_table=table))
        loss, accuracy = masked_loss(model, tokens, labels, torch.ones(6, N).bool())
        assert abs(loss.item() - math.log(K)) < .5 and 0 <= accuracy <= 1
        assert not any(p.any() for name, p in model.named_parameters() if name.endswith('bias'))

def count(**options):
    with torch.device('meta'): model = MaskedTransformer(**options)
    return sum(p.numel() for p in model.parameters())

def test_parameter_counts_of_a_maskgit_l():
    "Counted by hand; the paper's 195 M within 1.5 % with the tokenizer's codes, and well above without."
    W, sides = 768, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
    block = 12*W*W + 9*W + 4*W
    body = 25*block + 12*(2*W*W + W) + 2*W
    around = 1001*W + W + 256*W + 10*W                                 # classes, mask, positions, levels
    head = W*W + W + 2*W + 16384
    own = count(codebook_size=16384, num_tokens=680, sides=sides)
    assert own == body + around + head + 16384*W
    with torch.device('meta'): codes = Codes(16384, W, torch.empty(16384, 16))
    read = sum(p.numel() for p in codes.parameters())
    assert read == head + 16*W + W + 16*W + 16
    assert abs((body+around+read)/195e6 - 1) < .015 and own/195e6 > 1.05

@pytest.mark.parametrize('change, message', [
    (dict(sides=[1, 2, 4]), r'squares add up to num_tokens=14, got \[1, 2, 4\]'),
    (dict(sides=[]), 'sides must be at least 1'), (dict(sides=None), r'num_tokens=14, got \[3\]'),
    (dict(sides=[0, 1, 2, 3]), 'sides must be at least 1'), (dict(sides=[-1, 2, 3]), 'sides must be at least 1'),
    (dict(code_table=TABLE[:5]), r'code_table must be \(23, D\), got \(5, 4\)'),
    (dict(code_table=TABLE[:, 0]), r'code_table must be \(23, D\), got \(23,\)'),
    (dict(heads=5), 'width must be a multiple of heads=5, got 24')])
def test_bad_architecture(change, message):
    with pytest.raises(ValueError, match=message): MaskedTransformer(**SIZES | change)


# loss

@pytest.mark.parametrize('smoothing', [0., .1])
def test_loss_equals_loop(smoothing, tokens, labels):
    model, mask = random_model(), random_mask(6, N, 'linear', rng(5))
    loss, accuracy = masked_loss(model, tokens, labels, mask, smoothing)
    with torch.no_grad(): logits = model(tokens, labels, mask).double()
    nats, right = [], []
    for b in range(6):
        for t in range(N):
            if not mask[b, t]: continue
            log_p = logits[b, t].log_softmax(-1)
            nats.append(-float((1-smoothing)*log_p[tokens[b, t]] + smoothing*log_p.mean()))
            right.append(float(log_p.argmax() == tokens[b, t]))
    assert abs(loss.item() - sum(nats)/len(nats)) < 1e-4*abs(loss.item())
    assert abs(accuracy.item() - sum(right)/len(right)) < 1e-6

@pytest.mark.parametrize('table', [None, TABLE], ids=['own table', 'code table'])
def test_chunked_loss_and_gradients_equal_dense(table, tokens, labels):
    model, mask = random_model(code_table=table), random_mask(6, N, generator=rng(6))
    def gradients(chunk):
        model.zero_grad()
        loss, accuracy = masked_loss(model, tokens, labels, mask, chunk=chunk)
        loss.backward()
        return loss.item(), accuracy.item(), [p.grad.clone() for p in model.parameters()]
    (loss, accuracy, dense), (same, right, chunked) = gradients(2**27), gradients(5*K)
    assert abs(loss-same) < 1e-5*loss and accuracy == right
    for a, b in zip(dense, chunked): assert (a-b).abs().max() <= 1e-4*(1e-3 + a.abs().max())


# sampling

EVERYTHING = dict(steps=5, guidance_scale=3., guidance_power=1.5, temperature=1.1, top_k=9, top_p=.9, coarse_first=2.)

def fill_by_hand(model, tokens, labels, mask, weights, counts, scores):
    "Greedy tokens, given confidences; one image and one step at a time."
    tokens, mask = tokens.clone(), mask.clone()
    filled = torch.full_like(tokens, -1)
    for t in range(len(weights)):
        new_tokens, new_mask = tokens.clone(), mask.clone()
        for b in range(len(tokens)):
            c = model(tokens[b:b+1], labels[b:b+1], mask[b:b+1])[0]
            u = model(tokens[b:b+1], torch.tensor([C]), mask[b:b+1])[0]
            drawn = (u + weights[t]*(c-u)).argmax(-1)
            unknown = sorted((i for i in range(N) if mask[b, i]), key=lambda i: -scores[t, b, i])
            for i in unknown[:counts[b][t]]: new_tokens[b, i], new_mask[b, i], filled[b, i] = drawn[i], False, t
        tokens, mask = new_tokens, new_mask
    return tokens, filled

def test_filling_by_hand(tokens, labels):
    model, scores = random_model(), torch.randn(5, 6, N, generator=rng(7))
    mask = torch.rand(6, N, generator=rng(8)) < .7
    weights = guidance_weights(4., 5, 1.3, 'linear')
    counts = unmask_counts(mask.sum(1), 5)
    got, steps = fill_tokens(model, tokens, labels, mask, weights, counts, lambda t, logits: (logits.argmax(-1), scores[t]))
    with torch.no_grad():
        expected, filled = fill_by_hand(model, tokens, labels, mask, weights.tolist(),
                                        [counts_by_hand(int(n), 5, SHARES['cosine']) for n in mask.sum(1)], scores)
    assert torch.equal(got, expected) and torch.equal(steps, filled)

@variants
@pytest.mark.parametrize('sampling', [{}, EVERYTHING, dict(steps=1), dict(steps=40)],
                         ids=['plain', 'everything', 'one step', 'more steps than tokens'])
def test_counts_kept_tokens_and_range(options, sampling, labels):
    model = random_model(**options)
    true = some_tokens(model)
    for sigma in (0., .5):
        drawn, steps = model.sample(labels, true, sigma, rng(), return_steps=True, **sampling)
        total, kept = sampling.get('steps', 8), steps == -1
        assert drawn.dtype == torch.long and drawn.shape == true.shape and 0 <= drawn.min() and drawn.max() < K
        assert torch.equal(drawn[kept], true[kept]) and (kept.any() if sigma else not kept.any())
        for b in range(6):
            found = torch.bincount(steps[b][~kept[b]], minlength=total).tolist()
            assert found == counts_by_hand(int((~kept[b]).sum()), total, SHARES['cosine'])
        assert torch.equal(drawn, model.sample(labels, true, sigma, rng(), **sampling))

@variants
def test_images_are_sampled_some_at_a_time(options, labels):
    "As many as the bound on logits allows; which are together decides the draws, and nothing else."
    model, seen = random_model(**options), []
    true, greedy = some_tokens(model), dict(temperature=1e-4, choice_temperature=0., guidance_scale=2.)
    model.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))
    chunk = 2*2*model.num_tokens*K
    drawn, steps = model.sample(labels, true, .5, rng(), return_steps=True, chunk=chunk, **greedy)
    assert rows_at_once(model, 2., chunk) == 2 and max(seen) == 4
    for found, whole in zip((drawn, steps), model.sample(labels, true, .5, rng(), return_steps=True, **greedy)): assert torch.equal(found, whole)
    one = model.sample(labels, true, .5, rng(), chunk=1, **greedy)
    assert torch.equal(one, drawn) and seen[-1] == 2

@pytest.mark.parametrize('schedule', SCHEDULES)
def test_schedule_of_sampling(schedule, labels):
    _, steps = random_model().sample(labels, generator=rng(), steps=6, mask_schedule=schedule, return_steps=True)
    for row in steps: assert torch.bincount(row, minlength=6).tolist() == counts_by_hand(N, 6, SHARES[schedule])

def test_sigma_one_returns_the_tokens(tokens, labels):
    same = random_model().sample(labels, tokens, 1., rng(), **EVERYTHING)
    assert torch.equal(same, tokens) and same.data_ptr() != tokens.data_ptr()

def test_sigma_zero_is_plain_sampling(tokens, labels):
    model = random_model()
    assert torch.equal(model.sample(labels, tokens, 0., rng()), model.sample(labels, generator=rng()))
    assert not torch.equal(model.sample(labels, generator=rng()), model.sample(labels, generator=rng(1)))

def test_true_tokens_are_not_changed_in_place(tokens, labels):
    before = tokens.clone()
    random_model().sample(labels, tokens, .5, rng())
    assert torch.equal(before, tokens)

def test_kept_where_the_mask_says_and_only_there(labels):
    "True tokens that the sampler can never draw by itself show where they were kept."
    model = random_model()
    with torch.no_grad(): model.codes.bias[K-1] = -1e4
    true = torch.full((600, N), K-1)
    mixed, steps = sample_tokens(model, labels.repeat(100), true, .3, steps=3, generator=rng(), return_steps=True)
    assert torch.equal(mixed == K-1, steps == -1)
    assert within_binomial_bounds(int((steps == -1).sum()), steps.numel(), .3)
    assert all(within_binomial_bounds(int(n), 600, .3) for n in (steps == -1).sum(0))

def test_hidden_true_tokens_never_matter(tokens, labels):
    "Only kept true tokens reach the network."
    model = random_model()
    mixed, steps = model.sample(labels, tokens, .5, rng(), return_steps=True)
    others = torch.where(steps == -1, tokens, (tokens+3) % K)
    assert torch.equal(model.sample(labels, others, .5, rng()), mixed)

def test_kept_tokens_condition_the_others(tokens, labels):
    model = random_model()
    _, steps = model.sample(labels, tokens, .5, rng(), return_steps=True)
    others = torch.where(steps == -1, (tokens+3) % K, tokens)
    a, b = (model.sample(labels, true, .5, rng()) for true in (tokens, others))
    assert (a != b)[steps >= 0].any()

def test_one_image_depends_on_others_by_draws_only(tokens, labels):
    "Other classes and other true tokens beside it leave an image as it is."
    model, others = random_model(), (tokens+1) % K
    others[2] = tokens[2]
    classes = (labels+1) % C
    classes[2] = labels[2]
    for sigma, sampling in ((0., {}), (.5, EVERYTHING)):
        a, b = model.sample(labels, tokens, sigma, rng(), **sampling), model.sample(classes, others, sigma, rng(), **sampling)
        assert torch.equal(a[2], b[2]) and not torch.equal(a, b)

def test_global_generator_when_none_is_given(labels):
    model, drawn = random_model(), []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(model.sample(labels))
    assert torch.equal(*drawn) and not torch.equal(drawn[0], model.sample(labels))

def test_nothing_equal_is_computed_twice(tokens, labels):
    "Blank images once per class; no branch without class where its weight is 1."
    model, widths = random_model(), []
    model.body.register_forward_hook(lambda module, args, out: widths.append(len(out)))
    model.sample(labels, steps=3, generator=rng())
    assert widths == [5, 6, 6]                                         # two labels of six are equal
    widths.clear()
    model.sample(labels, steps=3, guidance_scale=2., guidance_schedule='constant', generator=rng())
    assert widths == [6, 12, 12]
    widths.clear()
    model.sample(labels, steps=3, guidance_scale=2., guidance_schedule='linear', generator=rng())
    assert widths == [5, 12, 12]                                       # its weight starts at 1
    widths.clear()
    model.sample(labels, tokens, 1., steps=3)
    assert widths == []

def test_guided_logits_by_formula(tokens, labels):
    model = random_model()
    for mask in (torch.ones(6, N).bool(), random_mask(6, N, 'linear', rng(9))):
        with torch.no_grad(): c, u = model(tokens, labels, mask), model(tokens, torch.full_like(labels, C), mask)
        for weight in (0., 1., 2.5):
            expected = u + weight*(c-u)
            assert (guided_logits(model, tokens, labels, mask, weight) - expected).abs().max() < 1e-4*expected.abs().max()

def test_first_tokens_follow_the_model():
    "With one step and no noise, shares at each place are those of softmax(logits / temperature)."
    model, many = random_model(), torch.full((20_000,), 3)
    with torch.no_grad():
        for p in (model.codes.embedding.weight, model.codes.bias): p *= .3
        logits = model(torch.zeros(1, N).long(), many[:1], torch.ones(1, N).bool())[0]
    drawn = model.sample(many, steps=1, temperature=1.4, generator=rng())
    p = (logits/1.4).softmax(-1)
    for position in (0, 5, N-1):
        for k in range(0, K, 4):
            assert within_binomial_bounds(int((drawn[:, position] == k).sum()), 20_000, float(p[position, k]))

def test_surest_first_without_noise(labels):
    "Without noise, what a step keeps is at least as probable as what it leaves."
    model = random_model()
    seen, real = [], model.forward
    model.forward = lambda *args: seen.append(real(*args)) or seen[-1]
    _, steps = model.sample(labels[:5], generator=rng(), steps=4, choice_temperature=0., top_k=1, return_steps=True)
    first = seen[0].log_softmax(-1).amax(-1)                           # five classes, in order
    for b in range(5): assert first[b][steps[b] == 0].min() >= first[b][steps[b] > 0].max()

def test_noise_makes_the_order_random(labels):
    model = random_model()
    def order(seed, temperature): return model.sample(labels, generator=rng(seed), top_k=1, choice_temperature=temperature,
                                                      return_steps=True)[1]
    assert torch.equal(order(0, 0.), order(1, 0.)) and not torch.equal(order(0, 50.), order(1, 50.))

def test_coarse_levels_first(labels):
    model = random_model()
    _, steps = model.sample(labels, generator=rng(), steps=7, coarse_first=1e4, return_steps=True)
    coarse, middle, fine = steps.split([1, 4, 9], 1)
    assert (coarse.amax(1) <= middle.amin(1)).all() and (middle.amax(1) <= fine.amin(1)).all()
    _, steps = model.sample(labels, generator=rng(), steps=7, coarse_first=-1e4, return_steps=True)
    coarse, middle, fine = steps.split([1, 4, 9], 1)
    assert (coarse.amin(1) >= middle.amax(1)).all() and (middle.amin(1) >= fine.amax(1)).all()

def test_modes_are_restored(labels):
    model = random_model(dropout=.5).train()
    model.body.norm.eval()
    first, second = (model.sample(labels, generator=rng()) for _ in range(2))
    assert torch.equal(first, second) and model.training and model.body.blocks[0].training and not model.body.norm.training

@pytest.mark.parametrize('change, message', [
    (dict(steps=0), 'steps must be at least 1, got 0'), (dict(steps=-1), 'steps must be at least 1, got -1'),
    (dict(sigma=-.1), r'sigma must be in \[0, 1\], got -0.1'), (dict(sigma=1.1), 'sigma must be in'),
    (dict(sigma=float('nan')), 'sigma must be in'), (dict(indices=None), 'indices must be given when sigma > 0'),
    (dict(indices=torch.zeros(2, N+1).long()), r'indices must be \(2, 14\), got \(2, 15\)'),
    (dict(indices=torch.full((2, N), K)), r'indices must be in \[0, 23\), got 23 to 23'),
    (dict(indices=torch.full((2, N), -1)), r'indices must be in \[0, 23\)'),
    (dict(labels=torch.tensor([0, C])), r'labels must be \(B,\) in \[0, 5\)'),
    (dict(temperature=0.), 'temperature must be above 0, got 0.0'), (dict(top_p=0.), r'top_p must be in \(0, 1\]'),
    (dict(top_k=K+1), r'top_k must be in \[0, 23\]'), (dict(choice_temperature=-1.), 'choice_temperature must be at least 0'),
    (dict(coarse_first=math.inf), 'coarse_first finite'), (dict(mask_schedule='exp'), 'schedule must be one of'),
    (dict(guidance_schedule='step'), 'guidance_schedule must be one of')])
def test_bad_sampling(change, message):
    good = dict(labels=torch.tensor([0, 1]), indices=torch.zeros(2, N).long(), sigma=.5)
    with pytest.raises(ValueError, match=message): random_model().sample(**good | change)

def test_bad_sampling_at_sigma_one_too(tokens, labels):
    with pytest.raises(ValueError, match='steps must be at least 1'): random_model().sample(labels, tokens, 1., steps=0)


# training

TRAINING = dict(steps=8, batch_size=12, lr=3e-3, warmup=2, precision='fp32')

@pytest.fixture
def data():
    labels = torch.randint(C, (40,), generator=rng(9))
    return (3*labels[:, None] + torch.arange(N) + torch.randint(2, (40, N), generator=rng(10))) % K, labels

def fresh(seed=0, **options):
    torch.manual_seed(seed)
    return MaskedTransformer(**SIZES | options)

def state(model): return torch.cat([p.detach().flatten() for p in model.state_dict().values()])

def test_decay_only_on_linear_weights():
    model = fresh(code_table=TABLE)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = [names[id(p)] for p in decay_groups(model, .03)[0]['params']]
    assert all(name.endswith('.weight') for name in decayed) and len(decayed) == 3*4 + 1 + 3
    assert not any(part in name for name in decayed for part in ('norm', 'classes', 'position', 'level', 'mask_token', 'transform.2'))

@pytest.mark.parametrize('options', [{}, dict(code_table=TABLE)], ids=['own table', 'code table'])
def test_training_learns_and_same_seed_gives_same_bytes(options, data):
    models = [fresh(**options) for _ in range(3)]
    rows = [train_masked(model, data, **TRAINING | dict(steps=40, lr=1e-2), betas=(.9, .96), label_smoothing=0., seed=seed)
            for model, seed in zip(models, (0, 0, 1))]
    assert torch.equal(state(models[0]), state(models[1])) and rows[0] == rows[1]
    assert not torch.equal(state(models[0]), state(models[2]))
    assert [row['step'] for row in rows[0]] == list(range(40))
    assert sum(r['loss'] for r in rows[0][-5:]) < sum(r['loss'] for r in rows[0][:5]) - .5
    assert not models[0].training

def test_learned_classes_are_drawn(data):
    "Tokens of a class are one of two per place; a trained model draws mostly these, and more so with guidance."
    model = fresh()
    train_masked(model, data, **TRAINING | dict(steps=120, batch_size=32, lr=1e-2, warmup=10), betas=(.9, .96))
    labels = torch.arange(C).repeat(40)
    def right(**sampling):
        drawn = model.sample(labels, generator=rng(), **sampling)
        offset = (drawn - 3*labels[:, None] - torch.arange(N)) % K
        return float((offset < 2).float().mean())
    assert right() > .6 and right(guidance_scale=3.) > right()

def test_resumed_training_equals_undisturbed(tmp_path, data, monkeypatch):
    undisturbed = fresh()
    expected = train_masked(undisturbed, data, **TRAINING)
    import tokpost.masked as module
    calls, real = [], module.masked_loss
    def dies(*args):
        calls.append(1)
        if len(calls) == 6: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(module, 'masked_loss', dies)
    with pytest.raises(KeyboardInterrupt):
        train_masked(fresh(), data, **TRAINING, folder=tmp_path, checkpoint_every=3)
    monkeypatch.undo()
    resumed = fresh(seed=99)
    rows = train_masked(resumed, data, **TRAINING, folder=tmp_path, checkpoint_every=3)
    assert rows == expected and torch.equal(state(resumed), state(undisturbed))
    finished = fresh(seed=98)
    assert train_masked(finished, data, **TRAINING, folder=tmp_path, checkpoint_every=3) == expected
    assert torch.equal(state(finished), state(undisturbed))
    with pytest.raises(ValueError, match='lr'):
        train_masked(fresh(), data, **TRAINING | dict(lr=1e-3), folder=tmp_path)
    with pytest.raises(ValueError, match='width'):
        train_masked(fresh(width=48), data, **TRAINING, folder=tmp_path)
    with pytest.raises(ValueError, match='mask_ratio'):
        train_masked(fresh(), data, **TRAINING, mask_ratio='cosine', folder=tmp_path)

def test_checkpoint_of_another_code_table_is_refused(tmp_path, data):
    train_masked(fresh(code_table=TABLE), data, **TRAINING, folder=tmp_path)
    with pytest.raises(ValueError, match='code_table'):
        train_masked(fresh(code_table=TABLE+torch.eye(K, 4)), data, **TRAINING, folder=tmp_path)

def test_average_of_the_weights_comes_back(data, monkeypatch):
    import tokpost.masked as module
    seen, real = [], module.EMA.update
    monkeypatch.setattr(module.EMA, 'update', lambda ema, model: (real(ema, model), seen.append(state(model)))[0])
    start, model = state(fresh()), fresh()
    train_masked(model, data, **TRAINING, ema_horizon=.5)
    decay, average = 1 - 1/(.5*TRAINING['steps']), seen[0]
    for weights in seen[1:]: average = decay*average + (1-decay)*weights
    assert torch.allclose(state(model), average, atol=1e-5) and not torch.allclose(state(model), seen[-1], atol=1e-4)
    assert not torch.equal(start, seen[0])

def test_store_and_tensors_train_alike(tmp_path, data):
    indices, labels = data
    store = make_token_store(tmp_path/'tokens', lambda rows: indices[rows], labels, N, K, dict(tokenizer='none'))
    models = fresh(), fresh()
    assert train_masked(models[0], store, **TRAINING) == train_masked(models[1], data, **TRAINING)
    assert torch.equal(state(models[0]), state(models[1]))

def test_masks_and_labels_of_training(data, monkeypatch):
    import tokpost.masked as module
    seen, real = [], module.masked_loss
    monkeypatch.setattr(module, 'masked_loss', lambda *args: seen.append(args) or real(*args))
    train_masked(fresh(class_dropout=.3), data, **TRAINING | dict(steps=30, batch_size=36))
    share = torch.cat([mask for _, _, _, mask, _ in seen]).float().mean()
    assert abs(share - .8) < 5*.1/math.sqrt(30*36) + .5/N/10
    assert within_binomial_bounds(sum(int((labels == C).sum()) for _, _, labels, _, _ in seen), 30*36, .3)
    assert len({tuple(mask.flatten().tolist()) for _, _, _, mask, _ in seen}) == 30
    assert all(smoothing == .1 for *_, smoothing in seen)

def test_training_data_is_checked(data):
    indices, labels = data
    with pytest.raises(ValueError, match=r'indices must be in \[0, 23\)'): train_masked(fresh(), (indices+1, labels), **TRAINING)
    with pytest.raises(ValueError, match='labels must be'): train_masked(fresh(), (indices, labels+1), **TRAINING)
    with pytest.raises(ValueError, match='indices must be'): train_masked(fresh(), (indices[:, 1:], labels), **TRAINING)
    with pytest.raises(ValueError, match="ratio must be 'beta'"): train_masked(fresh(), data, **TRAINING, mask_ratio='none')

def test_a_loss_that_is_not_finite_stops_training(data):
    model = fresh()
    with torch.no_grad(): model.codes.bias[0] = float('nan')
    with pytest.raises(FloatingPointError, match='masked generator: the loss is not finite at step 0'):
        train_masked(model, data, **TRAINING)

def rates(data, monkeypatch, **options):
    found, real = [], torch.optim.AdamW.step
    def step(optimizer, *args):
        found.append((optimizer.param_groups[0]['lr'], optimizer.param_groups[0]['betas']))
        return real(optimizer, *args)
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    train_masked(fresh(), data, **TRAINING, **options)
    return found

def test_rate_warms_up_and_stays(data, monkeypatch):
    found = rates(data, monkeypatch)
    assert [rate for rate, _ in found] == pytest.approx([1.5e-3] + [3e-3]*7)
    assert {betas for _, betas in found} == {(.99, .99)}

def test_stage_is_trained_once_and_kept(tmp_path, data, monkeypatch):
    "Trained, then read; another code table or other sides are another stage."
    monkeypatch.setattr('tokpost.run.project_root', lambda: tmp_path)
    indices, labels = data
    store = make_token_store(tmp_path/'tokens', lambda rows: indices[rows], labels, N, K, dict(tokenizer='none'))
    run = Run('masked', 'smoke', changes={'masked_training.steps': 3, 'masked.tied': True})
    model, name = trained_masked(run, store, C, [1, 2, 3], TABLE)
    assert isinstance(store, TokenStore) and not model.training and model.sides == [1, 2, 3]
    assert (tmp_path/'runs'/'smoke'/name/'checkpoint.safetensors').exists()
    import tokpost.masked as module
    monkeypatch.setattr(module, 'masked_loss', lambda *args: pytest.fail('trained again'))
    again, same = trained_masked(run, store, C, [1, 2, 3], TABLE)
    assert same == name and torch.equal(state(again), state(model))
    monkeypatch.undo()
    monkeypatch.setattr('tokpost.run.project_root', lambda: tmp_path)
    def stage(sides, codes, tied):
        changes = {'masked_training.steps': 1, 'masked.tied': tied}
        return trained_masked(Run('masked', 'smoke', changes=changes), store, C, sides, codes)[1]
    names = {stage([1, 2, 3], TABLE, False), stage([3, 2, 1], None, False), stage([1, 2, 3], TABLE+torch.eye(K, 4), True)}
    assert len(names | {name}) == 4
