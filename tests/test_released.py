"""Released weights: key maps against names, shapes and outputs of the official modules, stored as small fixtures."""
import dataclasses, json
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from tokpost import released as module
from tokpost.autoregressive import train_generator
from tokpost.released import RELEASED, download, fill, load_released, read_checkpoint, register, released, seeded_weights

FIXTURES = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent/'released').glob('*.json'))}
FULL = {name: names for fixture in FIXTURES.values() for name, names in fixture['names'].items()}
FULL['robustok-post'] = FULL['robustok-main']

def expand(names):
    "A fixture's names: of blocks that are alike only one is stored, with their number."
    return {name.replace('*', str(i)): shape for name, (count, shape) in names.items() for i in range(count)}

def small_state(fixture): return seeded_weights(expand(fixture['small']))

def images(count, side):
    noise = np.random.default_rng(0).uniform(-1, 1, (count, 3, side//8 or 1, side//8 or 1)).astype('float32')
    return torch.nn.functional.interpolate(torch.from_numpy(noise), size=side, mode='bilinear')

def check(fixture, **outputs):
    assert set(outputs) == set(fixture['outputs'])
    for name, value in outputs.items():
        expected = torch.tensor(fixture['outputs'][name])
        if value.dtype == torch.long:
            assert len(expected.unique()) > 3 and torch.equal(value.flatten(), expected)
            continue
        value = value.detach().flatten()[::max(1, value.numel()//64)][:64]
        assert expected.std() > 1e-3
        torch.testing.assert_close(value, expected, rtol=0, atol=2e-5*float(expected.abs().max()))

def converted(name, fixture, model):
    row = RELEASED[name]
    return fill(model, small_state(fixture), row.rules, row.ignore, row.arrange_fn, name)

def test_every_row_has_a_fixture(): assert set(FULL) == set(RELEASED)

@pytest.mark.parametrize('name', RELEASED)
def test_true_names_and_shapes_fit(name):
    row, names = RELEASED[name], expand(FULL[name])
    try:
        with torch.device('meta'): model = row.build()
    except NotImplementedError: model = row.build()
    ours = dict(model.named_parameters())
    asked = {module.renamed(own, row.rules): own for own in ours}
    assert len(asked) == len(ours)
    for there, own in asked.items():
        assert [s for s in names[there] if s != 1] == [s for s in ours[own].shape if s != 1], (there, own)
    left = set(names) - set(asked)
    assert all(module.re.fullmatch(row.ignore, key) for key in left), left

@pytest.mark.parametrize('family,name', [('rar', 'rar-b'), ('llamagen', 'llamagen-b')])
def test_generators_compute_what_the_official_ones_do(family, name):
    fixture = FIXTURES[family]
    model = converted(name, fixture, RELEASED[name].build(**fixture['inputs']))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 256)))
    with torch.no_grad(): check(fixture, logits=model(tokens, torch.tensor([3, 1000])))

@pytest.mark.parametrize('name', ['robustok-main', 'maskgit-vq', 'llamagen-vq16'])
@torch.no_grad()
def test_tokenizers_compute_what_the_official_ones_do(name):
    fixture = FIXTURES[name.removesuffix('-main')]
    if name == 'robustok-main':
        model = RELEASED[name].build(image_size=16, patch_size=4, model='vit_small_patch14_dinov2.lvd142m',
                                     codebook_size=128, code_dim=8)
        for part in (model.encoder, model.decoder): part.vit.blocks = part.vit.blocks[:2]
    else:
        model = RELEASED[name].build(**fixture['inputs']['changes'])
        model.image_size = fixture['inputs']['image_size']
    model = converted(name, fixture, model)
    x = images(2, model.image_size)
    indices = model.encode(x)
    check(fixture, features=model.features(x), indices=indices, images=model.decode(indices))

@pytest.mark.parametrize('name,factor', [('coda-mar', 16), ('coda-flux', 8)])
@torch.no_grad()
def test_coda_computes_what_the_official_one_does(name, factor):
    fixture = FIXTURES[name]
    model = converted(name, fixture, RELEASED[name].build(**fixture['inputs']))
    x = images(2, factor*fixture['inputs']['sides'][-1])
    indices = model.encode(x)
    check(fixture, latents=model.features(x), indices=indices, images=model.decode(indices))

def test_a_wrong_map_is_seen():
    "The fixtures can fail: without the reordering of pixels, or with two weights exchanged."
    fixture, row = FIXTURES['rar'], RELEASED['rar-b']
    swapped = (*row.rules, (r'norm1', 'norm0'), (r'norm2', 'norm1'), (r'norm0', 'norm2'))
    model = fill(row.build(**fixture['inputs']), small_state(fixture), swapped)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 256)))
    with torch.no_grad(), pytest.raises(AssertionError): check(fixture, logits=model(tokens, torch.tensor([3, 1000])))

def small_llamagen():
    fixture, row = FIXTURES['llamagen'], RELEASED['llamagen-b']
    model = row.build(**fixture['inputs'], num_tokens=16, num_classes=3)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.linear.weight)
    return model.eval()

def test_llamagen_samples_as_the_other_generators_do():
    model, labels = small_llamagen(), torch.tensor([0, 2])
    draw = lambda **options: model.sample(labels, generator=torch.Generator().manual_seed(1), guidance_scale=3., **options)
    drawn = draw()
    assert drawn.shape == (2, 16) and len(drawn.unique()) > 4 and torch.equal(drawn, draw(cache=False))
    true = torch.arange(32).view(2, 16)
    assert torch.equal(draw(indices=true, sigma=1.), true)
    kept, mask = draw(indices=true, sigma=.5, return_mask=True)
    assert torch.equal(kept[mask], true[mask]) and not torch.equal(kept[~mask], true[~mask])

def test_llamagen_does_not_look_ahead():
    model = small_llamagen()
    a, labels = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    b = a.clone()
    b[:, 9] = (b[:, 9]+1) % 64
    with torch.no_grad(): difference = (model(a, labels)-model(b, labels)).abs().amax(-1)[0]
    assert difference[:10].max() < 1e-5 and difference[10:].min() > 1e-4

def test_llamagen_trains_in_raster_order_only():
    model, data = small_llamagen(), (torch.randint(64, (8, 16)), torch.randint(3, (8,)))
    train = partial(train_generator, model, data, steps=2, batch_size=4, warmup=0)
    rows = train(randomness_start=0., randomness_stop=0.)
    assert np.isfinite([row['loss'] for row in rows]).all()
    with pytest.raises(ValueError, match='raster order'): train()

# --- files

@pytest.fixture
def rar_file(tmp_path):
    state = small_state(FIXTURES['rar'])
    torch.save(state, tmp_path/'rar_b.bin')
    return tmp_path/'rar_b.bin'

SMALL = FIXTURES['rar']['inputs'] if 'rar' in FIXTURES else {}

def test_load_by_name_from_a_folder_and_from_the_data_folder(rar_file, tmp_path, monkeypatch):
    by_path = load_released('rar-b', rar_file, **SMALL)
    assert not by_path.training
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path/'data'))
    (tmp_path/'data/released/rar-b').mkdir(parents=True)
    (tmp_path/'data/released/rar-b/rar_b.bin').write_bytes(rar_file.read_bytes())
    by_name = load_released('rar-b', **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(by_path.parameters(), by_name.parameters()))

def test_two_files_are_joined(tmp_path):
    fixture = FIXTURES['coda-mar']
    state, row = small_state(fixture), RELEASED['coda-mar']
    for prefix, file in row.files.items():
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        torch.save(part, tmp_path/Path(file).name)
    model = load_released('coda-mar', tmp_path, **fixture['inputs'])
    assert torch.equal(model.quantizer.quantizer.embedding, state['quantizer.codebooks.weight'])

def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"must be one of \['coda-flux'.*'robustok-main'.*got 'robustok'"): load_released('robustok')

@pytest.mark.parametrize('share', [.3, .9])
def test_half_a_download(rar_file, share):
    data = rar_file.read_bytes()
    rar_file.write_bytes(data[:int(share*len(data))])
    with pytest.raises(ValueError, match='rar_b.bin cannot be read as weights.*delete it'): load_released('rar-b', rar_file, **SMALL)

def test_wrong_checksum(rar_file, monkeypatch):
    monkeypatch.setitem(RELEASED, 'rar-b', dataclasses.replace(RELEASED['rar-b'], sha256={'rar_b.bin': '0'*64}))
    with pytest.raises(ValueError, match=f"must have sha256 {'0'*64}, got .*delete .*rar_b.bin"): load_released('rar-b', rar_file, **SMALL)

def test_the_hubs_own_checksum_is_used(tmp_path, monkeypatch, rar_file):
    import huggingface_hub
    blob = tmp_path/('0'*64)
    rar_file.rename(blob)
    (tmp_path/'link.bin').symlink_to(blob)
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path/'empty'))
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda *args, **options: str(tmp_path/'link.bin'))
    with pytest.raises(ValueError, match=f"must have sha256 {'0'*64}.*delete {blob}"): download('rar-b')

def test_without_a_network(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path))
    def offline(*args, **options): raise huggingface_hub.errors.LocalEntryNotFoundError('no network')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', offline)
    with pytest.raises(FileNotFoundError, match='huggingface.co/yucornetto/RAR/resolve/main/rar_b.bin.*put it at .*released/rar-b/rar_b.bin'):
        load_released('rar-b')

def test_shapes_that_do_not_fit_name_the_first_key(rar_file):
    with pytest.raises(ValueError, match=r'cls_token has \(1, 1, 32\) there, \(1, 1, 48\) here'):
        load_released('rar-b', rar_file, **SMALL | dict(width=48))

def test_missing_and_extra_keys_are_named(rar_file):
    state = torch.load(rar_file)
    torch.save({k: v for k, v in state.items() if k != 'blocks.1.attn.proj.bias'}, rar_file)
    with pytest.raises(ValueError, match='blocks.1.attn.proj.bias has nothing there'): load_released('rar-b', rar_file, **SMALL)
    torch.save(dict(state, surprise=torch.zeros(2)), rar_file)
    with pytest.raises(ValueError, match=r'surprise has \(2,\) there, nothing here'): load_released('rar-b', rar_file, **SMALL)

def test_nothing_of_a_file_is_run(tmp_path):
    class Bad:
        def __reduce__(self): return (exec, ("raise SystemExit('ran')",))
    torch.save(dict(model=Bad()), tmp_path/'bad.pt')
    with pytest.raises(ValueError, match='cannot be read as weights'): read_checkpoint(tmp_path/'bad.pt')

def test_a_new_model_is_a_row_and_a_map(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'RELEASED', dict(RELEASED))
    rules = ((r'^weight', 'out.weight'), (r'^bias', 'out.bias'))
    register(module.Released('new', 'tokenizer', 'someone/new', {'': 'new.pt'}, partial(torch.nn.Linear, 3, 2), rules, 'someone/new'))
    torch.save({'out.weight': torch.ones(2, 3), 'out.bias': torch.zeros(2)}, tmp_path/'new.pt')
    assert torch.equal(load_released('new', tmp_path).weight, torch.ones(2, 3))
