"One command for all notebooks: what runs, what is skipped, and what a failure or an interruption leaves."
import json, os, subprocess, sys
from pathlib import Path
import nbformat, papermill, pytest
import tokpost.reproduce
from tokpost.reproduce import (code_of, imported_modules, main, notebook_parameters, reason_to_run, reproduce,
                               step_fingerprint, steps, table_difference)

ROOT = Path(__file__).parents[1]

def write(path, *cells, prose=''):
    "A notebook whose first cell holds the parameters."
    made = [nbformat.v4.new_code_cell(source) for source in ("preset = 'smoke'\nout = 'figures'\nfamily = ''", *cells)]
    made[0].metadata['tags'] = ['parameters']
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[*made, nbformat.v4.new_markdown_cell(prose)]), path)

TABLE = ("from pathlib import Path\nfolder = Path('../'+out)/preset\nfolder.mkdir(parents=True, exist_ok=True)\n"
         "(folder/'table.csv').write_text('a,b\\nx,1.5\\n')")

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of two notebooks, executed in this process."
    (tmp_path/'settings.ini').write_text('[DEFAULT]')
    (tmp_path/'tokpost').mkdir()
    for name, text in dict(lower='x = 1', upper='from tokpost.lower import x', other='y = 2').items():
        (tmp_path/f'tokpost/{name}.py').write_text(text)
    write(tmp_path/'nbs/10_first.ipynb', 'from tokpost.upper import x', TABLE)
    write(tmp_path/'nbs/11_second.ipynb', TABLE.replace('table', 'second'))
    def execute(source, output, parameters, cwd, **options):
        Path(output).write_text(Path(source).read_text())
        space, old = dict(), os.getcwd()
        os.chdir(cwd)
        try:
            for cell in (c for c in nbformat.read(source, 4).cells if c.cell_type == 'code'):
                if 'import x' in cell.source: continue
                exec(cell.source, space)
                if 'parameters' in cell.metadata.get('tags', []): space.update(parameters)
        finally: os.chdir(old)
    monkeypatch.setattr(papermill, 'execute_notebook', execute)
    return tmp_path

def status(outcomes): return [outcome.status for outcome in outcomes]

def test_every_measuring_notebook_takes_part():
    names = {step.path.stem for step in steps('smoke', root=ROOT)}
    measuring = {path.stem for path in (ROOT/'nbs').glob('1[0-9]_*.ipynb')}
    assert measuring <= names and '05_post_train' in names
    order = [step.path.stem for step in steps('smoke', root=ROOT)]
    assert order == sorted(order)

def test_repeated_notebooks_differ_in_their_parameters():
    found = {step.name: step.parameters for step in steps('laptop', root=ROOT)}
    assert found['05_post_train-masked'] == dict(found['05_post_train'], family='masked')
    assert len({json.dumps(p, sort_keys=True)+n.split('-')[0] for n, p in found.items()}) == len(found)

def test_second_time_nothing_runs(project):
    assert status(reproduce('smoke', root=project)) == ['ran', 'ran']
    again = reproduce('smoke', root=project)
    assert status(again) == ['up to date', 'up to date']
    assert list(again[0].files) == ['figures/smoke/table.csv']
    assert status(reproduce('smoke', force=True, root=project)) == ['ran', 'ran']

@pytest.mark.parametrize('change, stale', [
    (lambda p: write(p/'nbs/10_first.ipynb', 'from tokpost.upper import x', TABLE, prose='other words'), False),
    (lambda p: write(p/'nbs/10_first.ipynb', 'from tokpost.upper import x', TABLE + '\n1+1'), True),
    (lambda p: (p/'tokpost/lower.py').write_text('x = 3'), True),     # imported by what it imports
    (lambda p: (p/'tokpost/other.py').write_text('y = 3'), False),
    (lambda p: (p/'figures/smoke/table.csv').unlink(), True),
    (lambda p: (p/'figures/smoke/table.csv').write_text('a,b\nx,9\n'), True),
    (lambda p: (p/'runs/smoke/reproduce/10_first.json').write_text('{"half'), True)],
    ids=['prose', 'code', 'module', 'foreign_module', 'missing_result', 'changed_result', 'damaged_record'])
def test_what_makes_a_result_stale(project, change, stale):
    reproduce('smoke', root=project)
    change(project)
    assert status(reproduce('smoke', root=project)) == ['ran' if stale else 'up to date', 'up to date']

def test_another_preset_is_another_result(project):
    reproduce('smoke', root=project)
    assert status(reproduce('laptop', root=project)) == ['ran', 'ran']
    assert status(reproduce('smoke', root=project)) == ['up to date', 'up to date']

def test_failure_leaves_the_others_and_the_old_result(project):
    reproduce('smoke', root=project)
    write(project/'nbs/10_first.ipynb', TABLE.replace('1.5', '2.5').replace('(folder/', '1/0\n(folder/'))
    outcomes = reproduce('smoke', root=project)
    assert status(outcomes) == ['failed', 'up to date'] and 'division by zero' in outcomes[0].note
    assert (project/'figures/smoke/table.csv').read_text() == 'a,b\nx,1.5\n'
    write(project/'nbs/10_first.ipynb', TABLE.replace('1.5', '2.5'))
    assert status(reproduce('smoke', root=project)) == ['ran', 'up to date']

def test_interruption_stops_and_goes_on(project, monkeypatch):
    whole = papermill.execute_notebook
    def stopped(source, *args, **options):
        if '11' in Path(source).name: raise KeyboardInterrupt
        whole(source, *args, **options)
    monkeypatch.setattr(papermill, 'execute_notebook', stopped)
    assert status(reproduce('smoke', root=project)) == ['ran', 'interrupted']
    monkeypatch.setattr(papermill, 'execute_notebook', whole)
    assert status(reproduce('smoke', root=project)) == ['up to date', 'ran']

def test_difference_from_the_committed_result_is_said(project):
    git = lambda *args: subprocess.run(['git', '-C', project, '-c', 'user.name=a', '-c', 'user.email=a@b', *args], check=True,
                                       capture_output=True)
    reproduce('smoke', root=project)
    git('init'), git('add', '-f', 'figures/smoke/table.csv'), git('commit', '-m', 'results')
    write(project/'nbs/10_first.ipynb', TABLE.replace('1.5', '1.2'))
    first, second = reproduce('smoke', root=project)
    assert first.note == 'table.csv: 1 numbers, by up to 20.0%'
    assert second.note == 'second.csv: not committed'

@pytest.mark.parametrize('arguments, said', [(['--preset', 'huge'], "got 'huge'"), (['--only', 'nothing'], "got 'nothing'")])
def test_unknown_names_are_named(arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped: main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err

def test_command(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    assert main(['--list']) == 0
    assert capsys.readouterr().out.count('never ran to its end') == 2
    assert main(['--only', '11_second', '--out', 'elsewhere']) == 0
    assert '11_second  ran' in capsys.readouterr().out and (project/'elsewhere/smoke/second.csv').exists()
    write(project/'nbs/10_first.ipynb', '1/0')
    assert main([]) == 1

def test_modules_are_those_that_are_imported():
    found = imported_modules(code_of(ROOT/'nbs/14_coda_ladder.ipynb'), ROOT)
    assert {'coda', 'run', 'data', 'quantizer'} <= set(found) and 'released' not in found
    loaded = subprocess.run([sys.executable, '-c', 'import sys, tokpost.coda\nfor m in sys.modules: print(m)'], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split()
    assert set(imported_modules('from tokpost.coda import CODA', ROOT)) == {
        m.split('.')[1] for m in loaded if m.startswith('tokpost.') and m != 'tokpost._modidx'}
