"Released pairs: what fits, what is refused, and the notebook that measures them, run and not run."
import json, shutil, subprocess, sys
from functools import partial
from pathlib import Path
import matplotlib, numpy as np, pandas as pd, pytest, torch
from tokpost.autoregressive import RAR
from tokpost.metrics import weights_fingerprint
from tokpost.paper import paper_table
from tokpost import released as module
from tokpost.released import (RELEASED, RELEASED_PAIRS, SAMPLING, Released, pair_names, released_system, seeded_weights,
                              token_format)
from tokpost.tokenizer import build_tokenizer
matplotlib.use('Agg')

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT/'nbs/16_released_pairs.ipynb'
METRICS = ['rfid', 'pfid', 'gfid', 'inception_score', 'precision', 'recall']
PAPER = [f'paper_{name}' for name in ('rfid', 'pfid', 'gfid', 'is', 'precision', 'recall')]

SMALL_TOKENIZER = dict(image_size=16, architecture='cnn', codebook_size=32, code_dim=4, width=16, multipliers=(1, 2, 2), blocks=1)
SMALL_GENERATOR = dict(codebook_size=32, num_tokens=16, num_classes=10, width=32, depth=2, heads=2)

@pytest.fixture
def small(tmp_path, monkeypatch):
    "A small tokenizer and generator whose files are there, and others whose files are not."
    monkeypatch.setattr('tokpost.released.RELEASED', dict(RELEASED))
    monkeypatch.setattr('tokpost.released.SAMPLING', SAMPLING | {'small-rar': dict(temperature=.9, guidance_scale=2.)})
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path/'data'))
    def offline(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', offline)
    tokenizer, generator = partial(build_tokenizer, **SMALL_TOKENIZER), partial(RAR, **SMALL_GENERATOR)
    row = lambda name, family, build: Released(name, family, 'nobody/nothing', {'': 'weights.pt'}, build, (), 'nobody/nothing')
    module.register(row('small-vq', 'tokenizer', tokenizer), row('small-rar', 'generator', generator),
                    row('absent-rar', 'generator', generator), row('damaged-rar', 'generator', generator),
                    row('classes-rar', 'generator', partial(generator, num_classes=12)),
                    row('large-vq', 'tokenizer', partial(tokenizer, image_size=32)),
                    row('large-rar', 'generator', partial(generator, num_tokens=64)))
    for name, build in (('small-vq', tokenizer), ('small-rar', generator), ('damaged-rar', generator)):
        place = tmp_path/'data/released'/name/'weights.pt'
        place.parent.mkdir(parents=True)
        shapes = {key: tuple(value.shape) for key, value in build().state_dict().items()}
        torch.save(seeded_weights(shapes, seed=1), place)
    place.write_bytes(place.read_bytes()[:3000])
    return tmp_path

def test_all_released_pairs_fit():
    formats = {name: token_format(name) for name in dict.fromkeys('+'.join(RELEASED_PAIRS).split('+'))}
    for pair in RELEASED_PAIRS:
        tokenizer, generator = (formats[name] for name in pair.split('+'))
        assert tokenizer['codebook_size'] == generator['codebook_size'] in (1024, 4096, 16_384)
        assert tokenizer['num_tokens'] == generator['num_tokens'] == 256 and tokenizer['image_size'] == 256
        assert generator['num_classes'] == 1000
    assert set(formats) == {name for name in RELEASED if not name.startswith('coda')}
    assert pair_names(RELEASED_PAIRS[0]) == ('robustok-main', 'robustok-rar-b')

@pytest.mark.parametrize('name,tokens', [('coda-mar', 680), ('coda-flux', 2240)])
def test_residual_tokens_are_counted(name, tokens): assert token_format(name)['num_tokens'] == tokens

@pytest.mark.parametrize('pair,message', [
    ('robustok-main+llamagen-b', "same codebook_size, got 4096 in 'robustok-main' and 16384 in 'llamagen-b'"),
    ('maskgit-vq+robustok-rar-l', "same codebook_size, got 1024 in 'maskgit-vq' and 4096 in 'robustok-rar-l'"),
    ('coda-mar+llamagen-l', "same num_tokens, got 680 in 'coda-mar' and 256 in 'llamagen-l'"),
    ('rar-b+maskgit-vq', "pair must be 'tokenizer\\+generator', such as .*, got 'rar-b\\+maskgit-vq'"),
    ('maskgit-vq', "pair must be 'tokenizer\\+generator'"), ('a+rar-b', r"name must be one of \['coda-flux'"),
    ('maskgit-vq+rar-b+rar-b', "pair must be 'tokenizer\\+generator'")])
def test_what_does_not_fit_is_named(pair, message):
    with pytest.raises(ValueError, match=message): pair_names(pair)

@pytest.mark.parametrize('name', ['rar-b', 'llamagen-b'])
def test_sampling_settings_are_arguments_of_the_generator(name):
    model = RELEASED[name].build(width=32, depth=1, heads=2, codebook_size=16).eval()
    drawn = model.sample(torch.tensor([3]), generator=torch.Generator().manual_seed(0), **SAMPLING[name])
    assert drawn.shape == (1, 256)

def test_system(small):
    system = released_system('small-vq+small-rar')
    assert system.sampling == dict(temperature=.9, guidance_scale=2.) and system.adversary is None
    assert system.made_by == {kind: f'{name}-{weights_fingerprint(getattr(system, kind))}' for kind, name in
                              (('tokenizer', 'small-vq'), ('generator', 'small-rar'))}
    tokens = system.generator.sample(torch.tensor([1, 7]), **system.sampling)
    images = system.tokenizer.decode(tokens)
    assert images.shape == (2, 3, 16, 16) and not (system.tokenizer.training or system.generator.training)
    with pytest.raises(FileNotFoundError, match='could not download weights.pt of .absent-rar.'):
        released_system('small-vq+absent-rar')

# The notebook

def check(table, record):
    "What every table of the notebook must be."
    assert list(table.columns[:3]) == ['pair', 'status', 'reason']
    assert list(table.columns[3:15]) == [name for both in zip(METRICS, PAPER) for name in both]
    assert table.pair.is_unique and set(table.status) <= {'run', 'not run'} and set(RELEASED_PAIRS) <= set(table.pair)
    other = table[table.status == 'not run']
    assert other[[*METRICS, 'n', 'n_validation', 'n_reference']].isna().all(axis=None) and other.reason.ne('').all()
    printed = table.set_index('pair')
    large = paper_table('robustok_tables', table='Table 2', row='RobusTok (RAR-L)', post_training='with')
    large = large.set_index('metric').value
    for name in ('rfid', 'pfid', 'gfid', 'is', 'precision', 'recall'):
        assert printed[f'paper_{name}']['robustok-post+robustok-rar-l'] == large[name]
    base = paper_table('robustok_tables', table='Table 3', row='RobusTok-B').set_index(['metric', 'post_training']).value
    for stage, column in (('main', 'without'), ('post', 'with')):
        assert printed.paper_gfid[f'robustok-{stage}+robustok-rar-b'] == base['gfid', column]
        assert printed.paper_is[f'robustok-{stage}+robustok-rar-b'] == base['is', column]
    assert np.isnan(printed.paper_rfid['robustok-post+robustok-rar-b'])      # the table has it before post-training only
    assert printed.paper_flag['llamagen-vq16+llamagen-l'].startswith('is: suspicious')
    assert printed.paper_source['maskgit-vq+rar-b'].startswith('bytedance/1d-tokenizer')
    assert table[~table.pair.isin(RELEASED_PAIRS)][PAPER].isna().all(axis=None)
    assert set(record['counts']) == {'samples', 'validation', 'reference'} and record['seeds'] == [0]
    return printed

def read(folder):
    table = pd.read_csv(folder/'released_pairs.csv', keep_default_na=False, na_values=[''])
    table[['reason', 'paper_flag']] = table[['reason', 'paper_flag']].fillna('')
    assert (folder/'released_pairs.png').stat().st_size > 2000
    return table, json.loads((folder/'released_pairs.json').read_text())

def test_notebook_at_smoke(tmp_path):
    "As a reader runs it: no network, a pair of the preset and a released one of other images."
    command = [sys.executable, '-m', 'papermill', NOTEBOOK, tmp_path/'out.ipynb', '--no-progress-bar', '-p', 'preset', 'smoke',
               '-p', 'out', tmp_path/'figures', '-p', 'pairs', 'preset,robustok-main+robustok-rar-b']
    done = subprocess.run([*map(str, command)], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table, record = read(tmp_path/'figures/smoke')
    rows = check(table, record)
    assert list(rows.index[:3]) == ['(reference images)', 'preset', 'robustok-main+robustok-rar-b'] and len(rows) == 12
    assert list(rows.status[:3]) == ['run', 'run', 'not run'] and set(rows.status[3:]) == {'not run'}
    assert rows.reason['robustok-main+robustok-rar-b'] == 'image_size is 256 for this pair, 16 in this run'
    assert set(rows.reason[3:]) == {'not asked for'}
    ours = rows.loc['preset']
    assert ours[METRICS].notna().all() and ours.pfid > 0 and 1 < ours.inception_score < 10
    assert (ours.n, ours.n_validation, ours.n_reference, ours.reference) == (64, 359, 1438, 'train')
    assert ours.features == 'digits classifier' and "'guidance_scale': 1.5" in ours.sampling
    assert rows.gfid['(reference images)'] < 1e-6 and rows.inception_score['(reference images)'] > 8
    assert record['pairs'] == ['preset', 'robustok-main+robustok-rar-b']

def cells():
    "Code cells of the notebook, without its parameters."
    found = [cell for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']
    return [''.join(cell['source']) for cell in found if 'parameters' not in cell['metadata'].get('tags', [])]

def execute(**parameters):
    space = dict(preset='smoke', reference='', seed=0, data='', changes={}, out='figures') | parameters
    for source in cells(): exec(compile(source, 'cell', 'exec'), space)
    return space

@pytest.fixture
def project(small, monkeypatch):
    "A project of its own."
    (small/'settings.ini').touch()
    shutil.copytree(ROOT/'nbs/paper', small/'nbs/paper')
    monkeypatch.chdir(small)
    return small

def test_pairs_that_run_and_pairs_that_cannot(project):
    pairs = ['small-vq+absent-rar', 'small-vq+damaged-rar', 'small-vq+small-rar', 'small-vq+classes-rar', 'large-vq+large-rar']
    execute(pairs=pairs)
    rows = check(*read(project/'figures/smoke'))
    assert rows.status[pairs].to_dict() == {pair: 'run' if 'small-rar' in pair else 'not run' for pair in pairs}
    for pair, reason in zip(pairs, ('could not download weights.pt', 'cannot be read as weights', None,
                                    'num_classes is 12 for this pair, 10 in this run', 'image_size is 32 for this pair')):
        assert reason is None or reason in rows.reason[pair]
    ours = rows.loc['small-vq+small-rar']
    assert ours[METRICS].notna().all() and ours.sampling == "{'temperature': 0.9, 'guidance_scale': 2.0}"
    made = {path.name.split('-')[0]: path for path in (project/'runs/smoke').iterdir()}
    assert not (made['pfid']/'partial').exists()
    with pytest.MonkeyPatch.context() as patch:                              # a second run makes nothing again
        for name in ('tokpost.pfid.pfid', 'tokpost.autoregressive.RAR.sample', 'tokpost.metrics.ClassifierFeatures.extract'):
            patch.setattr(name, None)
        execute(pairs=pairs[2:3], out='again')
    again = check(*read(project/'again/smoke')).loc['small-vq+small-rar']
    pd.testing.assert_series_equal(again, ours)

def test_nothing_to_run_is_a_table_too(project):
    execute(pairs='small-vq+absent-rar')
    table, record = read(project/'figures/smoke')
    assert check(table, record).status.tolist() == ['run'] + ['not run']*11 and record['pairs'] == ['small-vq+absent-rar']

def test_a_network_without_logits_says_so(project, monkeypatch):
    import tokpost.metrics as metrics
    made = metrics.ClassifierFeatures.__init__
    def without_head(self, *args):
        made(self, *args)
        self.head = None
    monkeypatch.setattr(metrics.ClassifierFeatures, '__init__', without_head)
    execute(pairs=['small-vq+small-rar'])
    row = check(*read(project/'figures/smoke')).loc['small-vq+small-rar']
    assert row.reason == 'no inception score: digits classifier has no logits' and np.isnan(row.inception_score)
    assert row.status == 'run' and row[['gfid', 'precision', 'recall', 'pfid']].notna().all()

def test_bad_input_stops_before_anything_is_made(project):
    for parameters, message in ((dict(pairs=['small-vq+rar-b']), "got 32 in 'small-vq' and 1024 in 'rar-b'"),
                                (dict(pairs=['nothing']), 'name must be one of'),
                                (dict(pairs=[], reference='adm-imagenet-256'), "features must be 'inception'")):
        with pytest.raises(ValueError, match=message): execute(**parameters)
    assert not (project/'figures').exists()
