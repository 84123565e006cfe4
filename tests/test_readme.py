"The README is the index notebook, its examples run, and its numbers stand in files."
import re
import runpy
from pathlib import Path

import pytest

from tokpost.paper import paper_table
from tokpost.run import read_table

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text(encoding='utf-8')


def test_readme_is_the_index():
    assert README == runpy.run_path(str(ROOT/'.ci/readme.py'))['readme']()


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', README, re.S)
    assert len(blocks) >= 4
    names = {}
    for block in blocks: exec(compile(block, 'README.md', 'exec'), names)
    assert names['result'].pfid > 0 and len(names['pairs']) == 256


def test_pictures_and_notebooks_exist():
    for path in re.findall(r'\]\((figures/[^)]+)\)', README): assert (ROOT/path).exists(), path
    for name in set(re.findall(r'`(\d\d_\w+)`', README)): assert (ROOT/f'nbs/{name}.ipynb').exists(), name


@pytest.mark.parametrize('name, seeds', [('post_training_arms', 3), ('post_training_arms_masked', 3), ('coda_ladder', 3),
                                         ('post_training_arms_diffusion', 3), ('robust_tokenizers', 3), ('coda_taef2', 1),
                                         ('coda_codebook_size', 0), ('speed', 0), ('quantizer_speed', 0), ('sampling_speed', 0), ('data_speed', 0)])
def test_numbers_are_those_of_the_files(name, seeds):
    table = read_table(name, 'laptop')
    record = table.attrs['record']
    assert record['commit'] and record['device'] and len(record.get('seeds', ())) >= seeds
    assert f"commit `{record['commit'][:10]}`" in README
    if name == 'robust_tokenizers': table = table[table.metric.isin(['rfid', 'pfid', 'gfid_guided'])]
    shown = dict(gfid=3, difference=3, psnr=2, ratio=3, time_ratio=2, memory_ratio=3, seconds_per_image=2, images_per_second=0)
    if name == 'data_speed': shown['ratio'] = 2
    if name == 'coda_codebook_size': table = table.groupby(['codebook_size', 'assignment'])[['psnr']].mean()
    columns = {column: digits for column, digits in shown.items() if column in table}
    assert columns
    for column, digits in columns.items():
        for value in table[column].dropna(): assert f'{value:.{digits}f}' in README


def test_every_claim_and_its_verdict_stand_in_the_readme():
    claims = read_table('claims', 'laptop')
    assert len(claims) >= 40 and set(claims.paper) == {'RobusTok', 'CODA'}
    for row in claims.itertuples(): assert re.search(rf'\| {re.escape(row.claim)} \|.*\| {row.verdict} \|', README), row.claim


def test_every_element_of_the_papers_stands_in_the_readme():
    for element in paper_table('elements').itertuples(): assert f'| {element.paper}, {element.element} | {element.title} |' in README
