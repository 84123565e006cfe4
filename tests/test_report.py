"The report: every element, what was run and what was not, pages that need nothing from elsewhere, and foreign folders."
import base64, io, json, os, re, shutil
from pathlib import Path
import nbformat, pytest
from bs4 import BeautifulSoup
from PIL import Image
from tokpost.paper import paper_table
from tokpost.report import (MARKER, build_report, clean_page, found_results, main, math_svg, notebook_page, prepare_cells, read_book,
                            shown_cell, write_report)

ROOT = Path(__file__).parents[1]
made = nbformat.v4

def picture():
    "A small PNG."
    file = io.BytesIO()
    Image.new('RGB', (60, 60), 'red').save(file, 'PNG')
    return file.getvalue()

def cell(source, *outputs, tags=()):
    if source.startswith('# ') or source.startswith('## '): return made.new_markdown_cell(source)
    return made.new_code_cell(source, outputs=list(outputs), metadata=dict(tags=list(tags)) if tags else {})

def shown(**data): return made.new_output('display_data', data={key.replace('_', '/'): value for key, value in data.items()})

def write(path, *cells, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(made.new_notebook(cells=list(cells), metadata=metadata), path)

HOSTILE = ('<script src="https://a.org/a.js"></script><link rel="stylesheet" href="https://a.org/a.css"><iframe src="https://a.org"></iframe>'
           '<img src="https://a.org/a.png" alt="far"><img src="//a.org/b.png"><p onclick="go()" style="background: url(https://a.org/c.png)">kept</p>'
           '<table border="1" class="dataframe"><thead><tr><th></th><th>rate</th></tr></thead><tr><th>a</th><td>1.5</td></tr></table>')
SPEEDS = [cell('# Speeds\n> Images per second, see `00_rates` and [the readme](../README.md)'),
          cell("preset = 'smoke'\nfamily = ''", tags=['parameters']),
          cell("results = {'speeds': ('RobusTok Table 5; CODA Figure F3', 'a rate'), 'hidden_speeds': ('', 'another')}", tags=['results']),
          cell('#| hide\nsecret = 1'), cell('#| echo: false\nunshown = 2', shown(text_plain='the value')),
          cell('## Rates'), cell("#| export\ndef rate(x): return x\n", shown(image_png=base64.b64encode(picture()).decode())),
          cell("run.save_table(rates, 'speeds')", shown(text_html=HOSTILE, text_plain='x'))]

def save(root, preset, stem, data='digits', png=True, rows='reader,rate\nours,20.123456\n'):
    "A result, its picture and its record."
    folder = root/'figures'/preset
    folder.mkdir(parents=True, exist_ok=True)
    (folder/f'{stem}.csv').write_text(rows)
    if png: (folder/f'{stem}.png').write_bytes(picture())
    (folder/f'{stem}.json').write_text(json.dumps(dict(name=stem, preset=preset, data=data, seed=0, device='a device', commit='abcdef0123',
                                                       versions=dict(torch='2.9'))))

def execute(root, preset, step, *stems):
    "What a run of a step leaves."
    folder = root/'runs'/preset/'reproduce'
    for stem in stems: save(root, preset, stem)
    write(folder/f'{step}.ipynb', *SPEEDS, papermill=dict(parameters=dict(preset=preset)))
    files = {f'figures/{preset}/{stem}.csv': '' for stem in stems}
    (folder/f'{step}.json').write_text(json.dumps(dict(seconds=75.5, fingerprint='f00d', files=files)))

def two_notebooks(root):
    "A project of two notebooks, one of them executed at smoke."
    (root/'settings.ini').write_text('[DEFAULT]')
    shutil.copytree(ROOT/'nbs/paper', root/'nbs/paper')
    write(root/'nbs/00_rates.ipynb', cell('# rates\n> Half of $x^2$ and $$\\frac{1}{2}$$'), cell('#| export\ndef half(x): return x/2'))
    write(root/'nbs/10_speeds.ipynb', *SPEEDS)
    execute(root, 'smoke', '10_speeds', 'speeds')
    return root

@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return two_notebooks(tmp_path)

@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "Where the report of such a project is, and its index."
    root = two_notebooks(tmp_path_factory.mktemp('project'))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return build_report()[0].parent

def parsed(path): return BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')

def pages(folder): return {path: parsed(path) for path in folder.rglob('*.html')}

def test_every_element_is_in_the_index(report):
    index = parsed(report/'index.html')
    for row in paper_table('elements').to_dict('records'):
        place = index.find(id=f"{row['paper']}-{row['element'].replace(' ', '-')}")
        assert row['title'] in place.get_text()
        declared = f"{row['paper']} {row['element']}" in ('RobusTok Table 5', 'CODA Figure F3')
        assert bool(place.find(class_='ours')) == declared
        if not declared: assert 'Nothing here regenerates it' in place.get_text() or 'shown in' in place.get_text()

def test_it_says_what_was_run_and_where(report):
    place = parsed(report/'index.html').find(id='RobusTok-Table-5')
    states = {td['data-preset']: ' '.join(td.get_text().split()) for td in place.find_all('td', attrs={'data-preset': True})}
    assert states.pop('smoke').startswith('run csv png json a device · abcdef0 · 20')
    assert states == dict(laptop='not run', small='not run', full='not run')
    assert place.select_one('a[href="smoke/10_speeds.html#cell-7"]')
    assert place.img['src'] == 'figures/smoke/speeds.png'

def test_results_of_no_element_and_times_are_listed(project):
    (project/'runs/laptop/reproduce/failed').mkdir(parents=True)
    (project/'runs/laptop/reproduce/failed/10_speeds-masked_mnist.ipynb').write_text('')
    index = parsed(build_report()[0])
    rows = lambda table: [[' '.join(cell.get_text().split()) for cell in row.find_all(['th', 'td'])] for row in index.select(f'{table} tr')]
    assert ['hidden_speeds another 10_speeds', *['not run']*4] in rows('.elements')
    about = 'Images per second, see 00_rates and the readme'
    assert rows('.notebooks')[2:] == [['10_speeds', about, '75.5 s', *['not run']*3],
                                      ['10_speeds-masked_mnist', about, 'not run', 'did not finish', 'not run', 'not run']]

def test_all_links_and_pictures_resolve(project):
    execute(project, 'laptop', '10_speeds', 'speeds')
    index, problems = build_report()
    assert not problems
    found = pages(index.parent)
    assert len(found) == 4
    for path, soup in found.items():
        for tag in soup.find_all(['a', 'img', 'link']):
            url = tag.get('href') or tag.get('src')
            if url.startswith('data:'): continue
            target, _, anchor = url.partition('#')
            to = (path.parent/target).resolve() if target else path
            assert to.is_file(), (path, url)
            if anchor: assert found[to].find(id=anchor), (path, url)

def test_pages_load_nothing_from_elsewhere(report):
    for path, soup in pages(report).items():
        assert not soup.find_all(['script', 'iframe', 'style'])
        for tag in soup.find_all(['img', 'link', 'image', 'use', 'source']):
            assert not re.match(r'\w+:(?!image/)|//', (tag.get('src') or tag.get('href')).replace('data:,', '')), (path, tag)
        assert not soup.find_all(style=re.compile(r'url\('))
    assert not re.search(r'url\(|@import|http', (report/'style.css').read_text())
    page = parsed(report/'smoke/10_speeds.html')
    assert page.find('p', string='kept') and not page.find('p', onclick=True) and '[picture far]' in page.get_text()

def test_directives_and_hidden_cells_do_not_show(report):
    for path in report.rglob('*.html'): assert not re.search(r'#\||default_exp|secret', path.read_text())
    text = (report/'smoke/10_speeds.html').read_text()
    assert 'unshown' not in text and 'the value' in text

def test_code_is_folded_outputs_are_not(report):
    page = parsed(report/'smoke/10_speeds.html')
    folded = page.select('details.code')
    assert [d.summary.get_text() for d in folded][:3] == ['parameters', 'results', 'rate'] and not any(d.has_attr('open') for d in folded)
    assert page.select_one('main img[alt=Rates]').find_parent('details') is None
    assert page.select_one('.wide > table.dataframe td.number').get_text() == '1.5'
    assert not page.select('table[border]')

def test_pages_lead_to_each_other_and_carry_their_record(project):
    execute(project, 'laptop', '10_speeds', 'speeds')
    folder = build_report()[0].parent
    page = parsed(folder/'laptop/10_speeds.html')
    assert page.find('a', rel='prev')['href'] == '../nbs/00_rates.html' and not page.find('a', rel='next')
    assert [(a.get_text(), a['href']) for a in page.select('.presets a')] == [('smoke', '../smoke/10_speeds.html')]
    record = {row.th.get_text(): row.td.get_text() for row in page.select('.record tr')}
    assert record['preset'] == 'laptop' and record['commit'] == 'abcdef0123' and record['fingerprint'] == 'f00d'
    assert record['time'] == '75.5 s' and record['device'] == 'a device' and record['results'] == 'speeds'
    assert page.select_one('blockquote a[href="../nbs/00_rates.html"]') and 'the readme' in page.blockquote.get_text()
    assert parsed(folder/'nbs/00_rates.html').find('a', rel='next')['href'] == '../laptop/10_speeds.html'

def test_only_presets_that_are_asked_for_get_pages(project):
    execute(project, 'laptop', '10_speeds', 'speeds')
    folder = build_report(['laptop'])[0].parent
    assert not (folder/'smoke').exists() and (folder/'laptop/10_speeds.html').exists()
    states = parsed(folder/'index.html').find(id='RobusTok-Table-5').select('td.run')
    assert [td['data-preset'] for td in states] == ['smoke', 'laptop']

def test_claims_are_shown_as_they_are(project):
    write(project/'nbs/90_claims.ipynb', cell('# Claims'), cell("preset = 'smoke'", tags=['parameters']),
          cell("results = {'claims': ('', 'claims')}", tags=['results']))
    save(project, 'smoke', 'claims', png=False, rows='claim,verdict,difference\npFID < 3 & more,holds,0.123456789\n')
    table = parsed(build_report()[0]).select_one('table.claims')
    assert [cell.get_text() for cell in table.find_all(['th', 'td'])] == ['claim', 'verdict', 'difference', 'pFID < 3 & more', 'holds', '0.1235']

def test_other_data_and_newer_results(project):
    save(project, 'smoke', 'speeds_mnist', data='mnist')
    save(project, 'smoke', 'speeds_all')
    find = lambda: {f['stem']: f for f in found_results(read_book(), 'speeds', 'smoke', '10_speeds')}
    assert list(find()) == ['speeds', 'speeds_mnist'] and find()['speeds']['page']
    later = (project/'runs/smoke/reproduce/10_speeds.ipynb').stat().st_mtime + 100
    os.utime(project/'figures/smoke/speeds.json', (later, later))
    assert find()['speeds']['page'] == '' == find()['speeds']['day']

@pytest.mark.parametrize('name, damage', [('runs/smoke/reproduce/11_more.ipynb', '{"cells": ['), ('nbs/11_more.ipynb', '{"cells": [')] + [
    ('nbs/11_more.ipynb', damage) for damage in ('', '[]', '{}', '{"cells": [{"cell_type": "code"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')])
def test_damaged_notebook_is_named_and_the_rest_built(project, name, damage, capsys):
    (project/name).write_text(damage)
    assert main([]) == 1
    said = capsys.readouterr()
    assert name in said.err and said.out.strip() == str(project/'runs/report/index.html')
    assert (project/'runs/report/smoke/10_speeds.html').exists()
    assert name in (project/'runs/report/index.html').read_text()

def test_damaged_record_and_declaration_are_named(project):
    (project/'figures/smoke/speeds.json').write_text('{"name": ')
    write(project/'nbs/11_more.ipynb', cell('# More'), cell("preset = 'smoke'", tags=['parameters']), cell("results = {'a': 'b'}", tags=['results']))
    index, problems = build_report()
    assert len(problems) == 2 and 'speeds.json is no record' in problems[0] and '11_more.ipynb must declare' in problems[1]
    assert not parsed(index).find(id='RobusTok-Table-5').select('td.run')

@pytest.mark.parametrize('arguments, said', [(['--preset', 'huge'], "got 'huge'"), (['--preset', 'laptop'], 'tokpost-reproduce --preset laptop'),
                                             (['--preset', 'smoke', 'full+rar-l'], 'tokpost-reproduce --preset full+rar-l')])
def test_what_cannot_be_reported_is_said(project, arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped: main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err and not (project/'runs/report').exists()

def test_nothing_was_executed(project, capsys):
    shutil.rmtree(project/'runs')
    with pytest.raises(SystemExit) as stopped: main([])
    assert stopped.value.code == 2 and 'tokpost-reproduce --preset laptop' in capsys.readouterr().err

def test_foreign_folder_is_left_alone(project, capsys):
    with pytest.raises(SystemExit) as stopped: main(['--out', 'nbs'])
    assert stopped.value.code == 2 and 'out must be a new or empty folder' in capsys.readouterr().err
    assert sorted(p.name for p in (project/'nbs').iterdir()) == ['00_rates.ipynb', '10_speeds.ipynb', 'paper']
    with pytest.raises(ValueError, match='out must be'): build_report(folder=project/'settings.ini')
    assert main(['--out', 'site']) == 0 and (project/'site/index.html').exists()

def test_stale_pages_go_and_nothing_else(project):
    index = build_report()[0]
    (index.parent/'smoke/mine.html').write_text('')
    marker = index.parent/MARKER
    marker.write_text(json.dumps(dict(files=[*json.loads(marker.read_text())['files'], '../../settings.ini', str(project/'nbs/00_rates.ipynb'), 3])))
    shutil.move(project/'runs/smoke/reproduce/10_speeds.ipynb', project/'runs/smoke/reproduce/11_faster.ipynb')
    build_report()
    assert sorted(p.name for p in (index.parent/'smoke').iterdir()) == ['11_faster.html', 'mine.html']
    assert (project/'settings.ini').exists() and (project/'nbs/00_rates.ipynb').exists()
    marker.write_text('damaged')
    build_report()

def test_unchanged_files_are_not_written_again(project):
    index = build_report()[0]
    before = {path: path.stat().st_mtime_ns for path in index.parent.rglob('*.html')}
    build_report()
    assert {path: path.stat().st_mtime_ns for path in index.parent.rglob('*.html')} == before

def test_write_that_fails_leaves_the_old_page(project, monkeypatch):
    write_report(project/'site', {'index.html': 'old'})
    monkeypatch.setattr(os, 'replace', lambda *paths: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'): write_report(project/'site', {'index.html': 'new'})
    assert (project/'site/index.html').read_text() == 'old'

def test_formulas_of_the_notebooks_are_typeset():
    formulas = set()
    for path in (ROOT/'nbs').glob('[0-9]*.ipynb'):
        for c in json.loads(path.read_text())['cells']:
            text = ''.join(c['source']) if c['cell_type'] == 'markdown' else ''
            formulas |= set(re.findall(r'\$\$(.+?)\$\$', text, re.S)) | set(re.findall(r'(?<!\$)\$([^$]+?)\$(?!\$)', text))
    assert len(formulas) > 50
    assert [tex for tex in formulas if '<svg' not in math_svg(tex)] == []

def test_dollars_in_code_are_no_formulas():
    page = made.new_notebook(cells=[made.new_markdown_cell('`cost $5` and `$6`'), cell('price = "$5 or $6"')])
    body = notebook_page(page)[0]
    assert '<svg' not in body and 'cost $5' in body

def test_streams_and_errors():
    bar = 'train:  50%|##  | 1/2 [00:01<00:01, 1.0it/s]\rtrain: 100%|####| 2/2 [00:02<00:00, 1.0it/s]\n'
    outputs = [made.new_output('stream', name='stderr', text=text) for text in (bar, 'a warning\n', bar)]
    kept = prepare_cells(made.new_notebook(cells=[cell('1', *outputs)])).cells[0].outputs
    assert [output.text for output in kept] == ['a warning']
    error = made.new_output('error', ename='ValueError', evalue='<b>', traceback=['\x1b[31mValueError\x1b[0m: <b>'])
    assert '&lt;b&gt;' in notebook_page(made.new_notebook(cells=[cell('1', error)]))[0]

@pytest.mark.parametrize('body, gone', [('<img src="x" srcset="https://a.org/1x.png">', 'a.org'), ('<svg><image href="https://a.org/x.png"></image></svg>', 'a.org'),
                                        ('<a href="javascript:go()">a</a>', 'javascript'), ('<a href="../../secret.html">a</a>', 'secret'),
                                        ('<img src="file:///etc/x.png">', '<img')])
def test_what_leads_elsewhere_is_taken_out(body, gone):
    cleaned = clean_page(body, 'nbs', {'nbs/x'})[0]
    assert gone not in cleaned

def test_numbers_have_four_digits():
    assert [shown_cell(text) for text in ('12', '0.5', '-3.14159265', '1.23456e-07', 'nan', '2.13.1')] == ['12', '0.5', '-3.142', '1.235e-07', 'nan', '2.13.1']
