"The papers' values: schema, what the papers' own arithmetic allows to check, and that none of them stands in a result of ours."
import csv
import math
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from tokpost.paper import PAPER_TABLES, paper_table
from tokpost.results import element_results
from tokpost.pfid import PFID_ALPHAS, pfid_deltas
from tokpost.run import preset_sizes

ROOT = Path(__file__).parent.parent
PAPER = ROOT/'nbs/paper'
VALUES = [name for name in PAPER_TABLES if name != 'elements']

KEYS = dict(
    robustok_tables=['part', 'id', 'type', 'latent', 'codebook_size', 'beta', 'delta', 'anneal_to', 'post_training', 'pairs', 'epochs', 'sigma'],
    robustok_benchmark=['type', 'codebook_size', 'generator'], coda_tables=['type', 'ratio', 'codebook_size', 'steps', 'levels'],
    settings=['codebook_size', 'item'])
METRICS = {'rfid': '', 'pfid': '', 'gfid': '', 'gfid_cfg': '', 'gfid_change': '', 'fid': '', 'is': '', 'precision': 'share', 'recall': 'share',
           'parameters': 'million', 'tokens': 'tokens', 'steps': 'steps', 'sse': '', 'sse_change': '', 'mmd': '', 'generator_loss': '',
           'generator_accuracy': '', 'psnr': 'dB', 'ssim': 'percent', 'usage': 'percent', 'iterations': 'thousand', 'iterations_ratio': '',
           'rfid_ratio': '', 'dots': '', 'quantization_error': '', 'distance': '', 'distance_low': '', 'distance_high': '', 'confidence': '',
           'confidence_low': '', 'confidence_high': '', 'features': '', 'codes': '', 'snapshots': '', 'centre': '', 'bits_per_token': 'bits',
           'bits': 'bits', 'bits_per_pixel': 'bits', 'bits_ratio': ''}
SETTING_UNITS = {'', 'epochs', 'steps', 'images', 'sequences', 'tokens', 'pixels', 'million'}
WITHOUT_VALUE, WITH_VALUE = {'printed as a dash', 'not recovered'}, {'', 'suspicious', 'measured from the image', 'derived'}


def raw(name):
    with (PAPER/f'{name}.csv').open(encoding='utf-8', newline='') as file: return list(csv.DictReader(file, strict=True))


def one(name, **where):
    "The single value that the keys name."
    table = paper_table(name, **where)
    assert len(table) == 1, f'{len(table)} rows of {name} have {where}'
    return table.value.item()


def same(value): return pytest.approx(value, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------- schema

def test_every_file_is_named():
    assert {path.stem for path in PAPER.iterdir()} == {*PAPER_TABLES, 'released_parity'} # the last one is a measurement of ours


@pytest.mark.parametrize('name', VALUES)
def test_schema(name):
    rows = raw(name)
    assert list(rows[0]) == ['source', 'table', 'row', *KEYS[name], 'metric', 'value', 'unit', 'flag', 'note']
    for row in rows:
        assert None not in row and None not in row.values()
        assert all(text == text.strip() for text in row.values())
        assert re.fullmatch(r'arXiv:\d{4}\.\d{5}v\d|[\w.-]+/[\w.-]+(@[0-9a-f]{7})?|arithmetic', row['source'])
        assert row['table'] and row['row'] and row['metric']


@pytest.mark.parametrize('name', VALUES)
def test_every_value_is_a_number_or_flagged(name):
    for row in raw(name):
        kind, _, why = row['flag'].partition(': ')
        assert kind in (WITH_VALUE if row['value'] else WITHOUT_VALUE), row
        assert bool(why) == (kind == 'suspicious'), row
        if row['value']: assert re.fullmatch(r'-?\d+(\.\d+)?(e-\d+)?', row['value']) and math.isfinite(float(row['value'])), row


@pytest.mark.parametrize('name', VALUES)
def test_identifying_keys_are_unique(name):
    "The same setting, by the paper and by the code, is two rows of two sources."
    found = Counter(tuple(row[key] for key in ('source', 'table', 'row', *KEYS[name], 'metric')) for row in raw(name))
    assert max(found.values()) == 1, found.most_common(3)


@pytest.mark.parametrize('name', [name for name in VALUES if name != 'settings'])
def test_metrics_and_units_are_known(name):
    for row in raw(name):
        assert row['unit'] == METRICS[row['metric']], row
        if not row['value']: continue
        value = float(row['value'])
        if row['unit'] == 'share': assert 0 <= value <= 1, row
        if row['unit'] == 'percent': assert 1 < value <= 100, row # a share between 0 and 1 would be another unit
        if row['unit'] == 'dB': assert 10 < value < 50, row
        if not row['metric'].endswith('_change'): assert value > 0, row


def test_settings_are_numbers_with_known_units():
    assert {row['unit'] for row in raw('settings')} == SETTING_UNITS
    assert not {row['flag'] for row in raw('settings')} - {'', 'derived'}


# ---------------------------------------------------------------------------------------------------------------- loader

@pytest.mark.parametrize('name', VALUES)
def test_loader_keeps_every_row(name):
    table, rows = paper_table(name), raw(name)
    assert len(table) == len(rows) and table.value.dtype == float
    for value, row in zip(table.value, rows): assert value == float(row['value']) if row['value'] else math.isnan(value)
    for column in ('source', 'table', 'row', 'metric', 'unit', 'flag', 'note'): assert list(table[column]) == [row[column] for row in rows]


def test_rows_are_chosen_and_idle_keys_left_out():
    table = paper_table('robustok_tables', table='Table 9', part='a', epochs=10, metric='gfid', sigma=(.7, .95))
    assert list(table.sigma) == [.7, .95] and set(table.row) == {'LlamaGen'}
    assert table.epochs.dtype == int and 'codebook_size' not in table
    assert list(table.columns) == ['source', 'table', 'row', 'part', 'post_training', 'epochs', 'sigma', 'metric', 'value', 'unit', 'flag', 'note']
    assert list(table.index) == [0, 1]
    lost = paper_table('robustok_tables', table='Figure 6')
    assert lost.value.isna().all() and lost.value.dtype == float and list(lost.delta) == sorted(lost.delta)


@pytest.mark.parametrize('name, where, message', [
    ('table_3', {}, "name must be one of robustok_tables, .*, elements, got 'table_3'"), ('released_parity', {}, 'name must be one of'),
    ('../../README', {}, 'name must be one of'), ('coda_tables', dict(sigma=.9), "columns of coda_tables are source, .*, got 'sigma'"),
    ('robustok_tables', dict(table='Table 9', sigma=.99), r'sigma must be among \[0.7, .*\], got \[0.99\]'),
    ('robustok_tables', dict(table='Table 9', sigma='0.7'), 'sigma must be among'), ('elements', dict(element='Table 11'), 'element must be among')])
def test_what_is_not_there_is_named(name, where, message):
    with pytest.raises(ValueError, match=message): paper_table(name, **where)


def test_without_a_checkout_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='settings.csv is missing: the papers. values come with the repository'): paper_table('settings')


# ---------------------------------------------------------------------------------------------------------------- elements

def test_every_element_once():
    expected = [*(('RobusTok', f'Table {i}') for i in range(1, 11)), *(('RobusTok', f'Figure {i}') for i in range(1, 17)),
                *(('CODA', f'Table {i}') for i in 'ABC'), *(('CODA', f'Figure F{i}') for i in range(1, 8))]
    elements = raw('elements')
    assert [(row['paper'], row['element']) for row in elements] == expected
    assert {(row['paper'], row['source']) for row in elements} == {('RobusTok', 'arXiv:2509.12474v1'), ('CODA', 'arXiv:2503.17760v1')}
    assert all(row['title'] and row['shows'] for row in elements)


def test_every_element_is_regenerated_by_a_result():
    known = {f"{row['paper']} {row['element']}" for row in raw('elements')}
    assert {row['element'] for row in element_results(ROOT)} == known


def rows_of(element):
    if not element['data']: return []
    names = {'Figure 5': 'Table 7', 'Figure 12': 'Table 8'}
    wanted = names.get(element['element'], element['element']) if element['data'] == 'robustok_benchmark' else element['element']
    shared = ['Tables 7 and 8'] if element['data'] == 'robustok_benchmark' else []
    return [row for row in raw(element['data']) if row['table'] in [wanted, *shared] and row['source'] == element['source']]


@pytest.mark.parametrize('element', raw('elements'), ids=lambda row: f"{row['paper']} {row['element']}")
def test_status_is_that_of_the_values(element):
    rows = rows_of(element)
    lost = sum(row['flag'] == 'not recovered' for row in rows)
    printed = sum(bool(row['value']) and row['flag'] != 'measured from the image' for row in rows)
    held = {'all values': rows and not lost, 'some values': rows and (lost or printed < len(rows)), 'not recovered': lost and not printed,
            'no values': not rows, 'values of a table': printed == len(rows) > 0}
    assert held[element['status']]
    assert bool(element['data']) == bool(rows)


def test_every_row_belongs_to_an_element():
    elements = {row['element'] for row in raw('elements')}
    for name in ('robustok_tables', 'coda_tables', 'robustok_benchmark'):
        assert {row['table'] for row in raw(name)} - elements <= {'Abstract', 'Token counts', 'Tables 7 and 8'}


@pytest.mark.parametrize('name, table, rows, metrics', [
    ('robustok_tables', 'Table 2', 17, 9), ('coda_tables', 'Table A', 21, 5), ('coda_tables', 'Table B', 18, 2), ('coda_tables', 'Table C', 4, 2)])
def test_tables_are_complete(name, table, rows, metrics):
    found = Counter(tuple(row[key] for key in ('row', *KEYS[name])) for row in raw(name) if row['table'] == table)
    assert len(found) == rows and set(found.values()) == {metrics}


# ---------------------------------------------------------------------------------------------------------------- the papers' arithmetic

@pytest.mark.parametrize('table, part', [(9, 'a'), (9, 'b'), (10, 'a'), (10, 'b')])
def test_changes_are_arm_minus_baseline(table, part):
    where = dict(table=f'Table {table}', part=part)
    before = one('robustok_tables', **where, post_training='without')
    arms = paper_table('robustok_tables', **where, post_training='with').pivot(index=['epochs', 'sigma'], columns='metric', values='value')
    assert len(arms) == {9: 8, 10: 6}[table]
    assert list((arms.gfid - before).round(2)) == list(arms.gfid_change)


def test_changes_of_the_squared_error_are_its_differences():
    table = paper_table('robustok_tables', table='Table 6').pivot(index='codebook_size', columns='metric', values='value')
    assert list(table.index) == [512*2**i for i in range(6)]
    assert list(table.sse.diff().fillna(0)) == list(table.sse_change)


def benchmark(row, metric, generator=''): return dict(name='robustok_benchmark', row=row, metric=metric, generator=generator)
def robustok(table, row, metric, **keys): return dict(name='robustok_tables', table=table, row=row, metric=metric, **keys)
def coda(table, row, metric, **keys): return dict(name='coda_tables', table=table, row=row, metric=metric, **keys)


PRINTED_TWICE = [
    *((robustok('Table 3', 'RobusTok-L', m, post_training=p), robustok('Table 2', 'RobusTok (RAR-L)', m, post_training=p))
      for m in ('gfid', 'is') for p in ('without', 'with')),
    *((robustok('Table 3', 'RobusTok-L', 'rfid'), robustok('Table 2', 'RobusTok (RAR-L)', 'rfid', post_training=p)) for p in ('without', 'with')),
    *((robustok('Table 3', 'LlamaGen', m, post_training='without'), robustok('Table 2', 'LlamaGen-L', m)) for m in ('gfid', 'is')),
    (robustok('Table 3', 'LlamaGen', 'rfid'), robustok('Table 2', 'LlamaGen-L', 'rfid')),
    *((robustok('Table 2', row, m), benchmark(other, m)) for row, other in (('LlamaGen-L', 'LlamaGen'), ('MaskGIT', 'MaskGIT')) for m in ('rfid', 'pfid')),
    *((robustok('Table 2', 'RobusTok (RAR-L)', m, post_training='without'), benchmark('RobusTok', m)) for m in ('rfid', 'pfid')),
    *((robustok('Table 5', None, m, id=i), benchmark(row, m)) for i, row in ((1, 'XQGAN-8192'), (2, 'XQGAN-4096'), (6, 'RobusTok')) for m in ('rfid', 'pfid')),
    *((robustok('Table 5', None, m, id=i), benchmark(row, m, 'LlamaGen-L')) for i, row in ((1, 'XQGAN-8192'), (2, 'XQGAN-4096')) for m in ('gfid', 'gfid_cfg')),
    *((robustok('Table 9', row, 'gfid', post_training='without'), robustok('Table 3', row, 'gfid', post_training='without')) for row in ('LlamaGen', 'GigaTok')),
    (robustok('Table 10', None, 'gfid', part='a', post_training='without'), robustok('Table 3', 'MAETok', 'gfid', post_training='without')),
    (robustok('Table 4', 'epochs', 'gfid', epochs=40), robustok('Table 3', 'RobusTok-B', 'gfid', post_training='with')),
    *((coda('Table C', '+ VAE adaptation', m), coda('Table A', 'CODA MAR', m, codebook_size=65536)) for m in ('rfid', 'usage')),
    *((coda('Figure F1', 'CODA MAR', m), coda('Table A', 'CODA MAR', m, codebook_size=65536)) for m in ('rfid', 'usage', 'iterations')),
    *((coda('Figure F1', 'VQGAN', m), coda('Table A', 'VQGAN', m, codebook_size=16384, ratio=16)) for m in ('rfid', 'usage', 'iterations')),
    (coda('Abstract', 'CODA, compression 16', 'rfid'), coda('Table A', 'CODA MAR', 'rfid', codebook_size=65536)),
    (coda('Abstract', 'CODA, compression 8', 'rfid'), coda('Table A', 'CODA FLUX', 'rfid'))]


def row_of(place):
    place = {key: value for key, value in place.items() if value is not None}
    table = paper_table(place.pop('name'), **place)
    assert len(table) == 1, place
    return table.iloc[0]


@pytest.mark.parametrize('a, b', PRINTED_TWICE, ids=lambda place: '-'.join(str(x) for x in place.values() if x))
def test_what_is_printed_twice_agrees_or_is_flagged(a, b):
    a, b = row_of(a), row_of(b)
    if a.value != b.value: assert a.flag.startswith('suspicious') or b.flag.startswith('suspicious'), f'{a.value} in {a.table}, {b.value} in {b.table}'
    else: assert not (a.flag.startswith('suspicious: ') and re.search(r'\d in Table', a.flag))


@pytest.mark.parametrize('row, table, part', [('LlamaGen', 9, 'a'), ('GigaTok', 9, 'b'), ('MAETok', 10, 'a')])
def test_the_reported_arm_is_the_best_one(row, table, part):
    arms = paper_table('robustok_tables', table=f'Table {table}', part=part, metric='gfid', post_training='with')
    assert arms.value.min() == one('robustok_tables', table='Table 3', row=row, metric='gfid', post_training='with')


def test_ladder_ends_where_the_levels_do():
    "The plot of the levels, measured to 0.15, begins and ends at rows of the component ablation."
    levels = paper_table('coda_tables', table='Figure F3', metric='rfid').set_index('levels').value
    assert levels.is_monotonic_decreasing
    for count, row in ((1, 'direct vector quantization'), (10, '+ residual quantization')):
        assert levels[count] == pytest.approx(one('coda_tables', table='Table C', row=row, metric='rfid'), abs=.15)


def test_ratios_of_the_first_figure():
    for metric, digits in (('iterations', 1), ('rfid', 1)):
        ratio = one('coda_tables', table='Figure F1', row='VQGAN', metric=metric)/one('coda_tables', table='Figure F1', row='CODA MAR', metric=metric)
        assert round(ratio, digits) == one('coda_tables', table='Figure F1', metric=f'{metric}_ratio')


def test_token_counts():
    table = paper_table('coda_tables', table='Token counts')
    assert set(table.flag) == {'derived'}
    wide = table[~table.metric.str.endswith('_ratio')].pivot(index=['row', 'ratio', 'codebook_size'], columns='metric', values='value').reset_index()
    assert len(wide) == 5
    for row in wide.itertuples():
        sides = [256//row.ratio] if row.row.startswith('one') else paper_table('settings', row=row.row, metric='side').value
        assert row.tokens == sum(side**2 for side in sides)
        assert row.bits_per_token == math.log2(row.codebook_size) and row.bits == row.tokens*row.bits_per_token
        assert row.bits_per_pixel == round(row.bits/256**2, 3)
    bits = wide.set_index(['row', 'codebook_size', 'ratio']).bits
    for row, K, ratio in (('CODA MAR', 16384, 16), ('CODA FLUX', 65536, 8)):
        printed = one('coda_tables', metric='bits_ratio', row=f'{row} over one code per position')
        assert printed == pytest.approx(bits[row, K, ratio]/bits['one code per position', 16384, ratio], abs=.005)


def test_no_cell_of_pfid_exceeds_its_axis():
    "A tokenizer's pFID is the mean of its cells, so it lies below the mean of the axes' tops."
    tops = paper_table('robustok_tables', table='Figure 14', flag='measured from the image').groupby('codebook_size').value.mean()
    worst = paper_table('robustok_benchmark', metric='pfid').groupby('codebook_size').value.max()
    assert list(tops.index) == list(worst.index) and (worst < tops).all()


# ---------------------------------------------------------------------------------------------------------------- ours beside the papers'

def test_pfid_has_the_strengths_of_the_paper():
    table = paper_table('settings', row='pFID')
    assert tuple(table[table.metric == 'alpha'].value) == PFID_ALPHAS
    for K, group in table[table.metric == 'delta'].groupby('codebook_size'):
        assert tuple(group.value) == pfid_deltas(int(K))
        assert set(group.value) == set(paper_table('robustok_tables', table='Figure 14', codebook_size=K).delta)


def setting(row, metric, **where): return one('settings', row=row, metric=metric, **where)


def test_full_preset_has_the_settings_of_robustok():
    size = preset_sizes('full')
    for name in ('alpha', 'beta', 'delta'): assert size['perturbation'][name] == setting('perturbation', name)
    for name in ('codebook_size', 'code_dim'): assert size['tokenizer'][name] == setting('tokenizer', name)
    assert size['image_size'] == setting('tokenizer', 'image_size')
    main, post = size['main_training'], size['post_training']
    for name in ('batch_size', 'lr', 'discriminator_lr'): assert main[name] == same(setting('main training', name))
    assert main['discriminator_start'] == same(setting('main training', 'discriminator_start')/setting('main training', 'epochs'))
    assert size['pairs']['count'] == setting('post-training', 'pairs')
    assert post['batch_size'] == setting('post-training', 'batch_size')
    assert post['lr']/main['lr'] == same(setting('post-training', 'lr_ratio'))
    epochs = setting('post-training', 'epochs', table='Table 4')
    assert post['steps']*post['batch_size']/size['pairs']['count'] == pytest.approx(epochs, rel=.01)
    for name in ('batch_size', 'steps', 'warmup', 'lr'): assert size['generator_training'][name] == same(setting('RAR training', name))


@pytest.mark.parametrize('preset, row', [('full', 'RAR-B'), ('full+rar-l', 'RAR-L')])
def test_full_preset_has_the_generators(preset, row):
    size = preset_sizes(preset)
    for name in ('depth', 'width', 'heads'): assert size['generator'][name] == setting(row, name)
    for name in ('temperature', 'guidance_scale', 'guidance_power'): assert size['sampling'][name] == setting(row, name)


@pytest.mark.parametrize('preset, row, updates', [('full', 'CODA MAR', 'CODA MAR, 4 GPUs'), ('full+coda-flux', 'CODA FLUX', 'CODA FLUX, 8 GPUs')])
def test_full_preset_has_the_settings_of_coda(preset, row, updates):
    size = preset_sizes(preset)
    assert list(size['coda']['sides']) == list(paper_table('settings', row=row, metric='side').value)
    assert size['coda']['attention_dim'] == setting(row, 'attention_dim') and size['coda_training']['rank'] == setting(row, 'rank')
    assert size['coda_training']['steps'] == setting(updates, 'steps') and size['coda_training']['lr'] == setting('CODA training', 'lr')
    processes = int(re.search(r'\d', updates)[0])
    assert size['coda_training']['batch_size'] == setting(row, 'micro_batch_size')*setting(row, 'accumulation')*processes
    assert size['coda']['codebook_size'] == paper_table('coda_tables', table='Table A', row=row).codebook_size.max()


RESULTS = sorted(path for path in (ROOT/'figures').glob('*/*.csv') if path.parent.name != 'smoke')
SCORES = {'rfid', 'pfid', 'gfid', 'gfid_cfg', 'is', 'psnr', 'ssim'} # precision and recall are shares of counts, which may agree by chance
PRINTED = pd.concat([paper_table(name, metric=[metric for metric in SCORES if metric in set(paper_table(name).metric)])
                     for name in VALUES if name != 'settings']).value.dropna()


def mixed(table):
    "Columns of results that hold a value of the papers, or a text that names them."
    for column in table:
        if column.startswith('paper'): continue # a column of their own is theirs
        if column in SCORES | {'plain', 'robust', 'inception_score'} and table[column].dtype == float and table[column].isin(PRINTED).any(): yield column
        if table[column].astype(str).str.contains(r'arXiv|\bpapers?\b', case=False, regex=True).any(): yield column


@pytest.mark.parametrize('path', RESULTS, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_results_hold_no_value_of_the_papers(path):
    assert list(mixed(pd.read_csv(path))) == []


def test_a_mixed_column_is_found():
    ours = pd.DataFrame(dict(arm=['before', 'after'], gfid=[1.8312345, 1.6543211], n=[3, 3]))
    assert RESULTS and list(mixed(ours)) == []
    theirs = one('robustok_tables', table='Table 3', row='RobusTok-B', metric='gfid', post_training='with')
    assert list(mixed(ours.assign(gfid=[1.8312345, theirs]))) == ['gfid']
    assert list(mixed(ours.assign(paper_gfid=[1.8312345, theirs]))) == []
    assert list(mixed(ours.assign(arm=['ours', 'paper']))) == ['arm']
