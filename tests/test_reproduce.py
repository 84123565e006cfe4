"One command for all notebooks: what runs, what is skipped, and what a failure or an interruption leaves."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import nbformat, pandas as pd, pytest
import tokpost.reproduce
from tokpost.results import check_result, notebook_results
from tokpost.reproduce import HISTORY, check, code_of, imported_modules, main, reason_to_run, reproduce, steps

ROOT = Path(__file__).parents[1]

RESULTS = {'10_first': 'table', '11_second': 'second'}

def write(path, *cells, prose='', results=None):
    "A notebook whose first cells hold parameters and results."
    results = {RESULTS[path.stem]: ('', 'a table')} if results is None else results
    made = [nbformat.v4.new_code_cell(source) for source in
            ("preset = 'smoke'\nout = 'figures'\ndata = ''\nfamily = ''", f'results = {results}', *cells)]
    made[0].metadata['tags'], made[1].metadata['tags'] = ['parameters'], ['results']
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[*made, nbformat.v4.new_markdown_cell(prose)]), path)

TABLE = ("import pandas as pd\nfrom tokpost.run import Run\n"
         "Run('table', preset, data=data, out=out).save_table(pd.DataFrame(dict(a=['x'], b=[1.5])))")

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of two notebooks, executed in this process."
    (tmp_path/'settings.ini').write_text('[DEFAULT]')
    (tmp_path/'tokpost').mkdir()
    for name, text in dict(lower='x = 1', upper='from tokpost.lower import x', other='y = 2').items():
        (tmp_path/f'tokpost/{name}.py').write_text(text)
    write(tmp_path/'nbs/10_first.ipynb', 'from tokpost.upper import x', TABLE)
    write(tmp_path/'nbs/11_second.ipynb', TABLE.replace('table', 'second').replace('save_second', 'save_table'))
    def execute(step, output, token, threads=1, children=None):
        output.write_text(step.path.read_text())
        monkeypatch.setenv('TOKPOST_EXECUTION', token)
        space = dict()
        monkeypatch.chdir(step.path.parent)
        monkeypatch.setenv('TOKPOST_STEP', step.name)
        for cell in (c for c in nbformat.read(step.path, 4).cells if c.cell_type == 'code'):
            if 'import x' in cell.source: continue
            try: exec(cell.source, space)
            except Exception as error: return f'{type(error).__name__}: {error}'
            if 'parameters' in cell.metadata.get('tags', []): space.update(step.parameters)
        return ''
    monkeypatch.setattr(tokpost.reproduce, 'execute_notebook', execute)
    monkeypatch.setattr(tokpost.reproduce, 'number_of_jobs', lambda preset: 1) # one working directory
    return tmp_path

def status(outcomes): return [outcome.status for outcome in outcomes]

def test_every_measuring_notebook_takes_part():
    names = {step.path.stem for step in steps('smoke', root=ROOT)}
    measuring = {path.stem for path in (ROOT/'nbs').glob('[1-9][0-9]_*.ipynb')}
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
    assert list(again[0].files) == ['figures/smoke/table.csv', 'figures/smoke/table.json']
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
    write(project/'nbs/10_first.ipynb', TABLE.replace('1.5', '2.5').replace('Run(', '1/0\nRun('))
    outcomes = reproduce('smoke', root=project)
    assert status(outcomes) == ['failed', 'up to date'] and 'division by zero' in outcomes[0].note
    assert (project/'figures/smoke/table.csv').read_text() == 'a,b\nx,1.5\n'
    write(project/'nbs/10_first.ipynb', TABLE.replace('1.5', '2.5'))
    assert status(reproduce('smoke', root=project)) == ['ran', 'up to date']

@pytest.mark.parametrize('results, said', [({'other': ('', '')}, 'table.json is not among the results that 10_first.ipynb declares'),
                                           ({'table': ('', ''), 'more': ('', '')}, '')])
def test_results_are_those_that_are_declared(project, results, said):
    write(project/'nbs/10_first.ipynb', TABLE, results=results)
    outcome = reproduce('smoke', root=project)[0]
    assert (outcome.status == 'failed') == bool(said) and said in outcome.note

def test_step_without_results_or_with_a_broken_one_fails(project):
    write(project/'nbs/10_first.ipynb', 'pass')
    assert 'wrote none of the results' in reproduce('smoke', root=project)[0].note
    write(project/'nbs/10_first.ipynb', TABLE.replace("dict(a=['x'], b=[1.5])", "dict(a=[], b=[])"))
    assert 'table.csv must have rows, got none' in reproduce('smoke', root=project)[0].note

def test_results_of_an_earlier_execution_do_not_count(project):
    reproduce('smoke', root=project)
    write(project/'nbs/10_first.ipynb', 'pass')
    assert 'wrote none of the results' in reproduce('smoke', root=project)[0].note
    assert check(steps('smoke', root=project), project) == []

def test_damage_is_named_and_the_rest_runs(project):
    "A notebook that cannot be read, a state and a record of another shape, no git."
    reproduce('smoke', root=project)
    write(project/'nbs/10_first.ipynb', 'for x in')
    (project/'runs/smoke/reproduce/11_second.json').write_text('{}')
    (project/'figures/smoke/table.json').write_text('[]')
    outcomes = reproduce('smoke', root=project)
    assert status(outcomes) == ['failed', 'ran'] and 'invalid syntax' in outcomes[0].note
    assert 'is no record but a list' in check(steps('smoke', root=project), project)[0]

def test_without_git_nothing_is_compared(project, monkeypatch):
    reproduce('smoke', root=project)
    def absent(*args, **options): raise FileNotFoundError('git')
    monkeypatch.setattr(subprocess, 'run', absent)
    assert reproduce('smoke', root=project)[0].note == 'git is not here to compare with'

def test_table_without_its_record_is_found_out(project):
    "As a kill between the two leaves them."
    reproduce('smoke', root=project)
    (project/'figures/smoke/table.csv').write_text('a,b\nx,9\n')
    fault, = check(steps('smoke', root=project), project)
    assert 'must be the file that its record was written with' in fault

def test_one_command_at_a_time(project):
    command = ('import time; from tokpost.reproduce import _alone; from pathlib import Path\n'
               f'with _alone("smoke", Path({str(project)!r})): print("held", flush=True); time.sleep(60)')
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))
    other = subprocess.Popen([sys.executable, '-c', command], env=environ, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == 'held\n'
    with pytest.raises(ValueError, match="another tokpost-reproduce is at work on preset 'smoke'"): reproduce('smoke', root=project)
    other.kill()
    other.wait()
    assert status(reproduce('smoke', root=project)) == ['ran', 'ran']

@pytest.mark.parametrize('parameters, said', [
    (dict(out='../elsewhere'), 'out must be a folder under'), (dict(seedz=2), r"parameter must be one of \['data', 'out'\], got 'seedz'"),
    (dict(family='masked'), "got 'family'"), (dict(preset='full'), "got 'preset'")])
def test_parameters_are_checked_before_anything_runs(project, parameters, said):
    with pytest.raises(ValueError, match=said): reproduce('smoke', root=project, parameters=parameters)

def test_an_empty_folder_is_no_project(tmp_path):
    with pytest.raises(ValueError, match='no notebook with a preset'): steps('smoke', root=tmp_path)

def test_other_folder_of_results_is_another_step(project):
    reproduce('smoke', root=project)
    assert status(reproduce('smoke', root=project, parameters=dict(out='other'))) == ['ran', 'ran']
    assert status(reproduce('smoke', root=project)) == ['up to date', 'up to date']

def test_results_of_other_steps_do_not_count(project):
    "Foreign files, of another notebook or copied from another preset."
    reproduce('smoke', root=project)
    folder = project/'figures/smoke'
    foreign = json.loads((folder/'table.json').read_text()) | dict(step='', preset='laptop')
    (folder/'table.json').write_text(json.dumps(foreign))
    assert check(steps('smoke', root=project), project) == [
        f"10_first: {folder/'table.json'} must be of preset 'smoke', got one of 'laptop'"]
    assert reason_to_run(steps('smoke', root=project)[0], project) == 'figures/smoke/table.json was changed by something else'
    assert status(reproduce('smoke', root=project)) == ['ran', 'up to date'] and check(steps('smoke', root=project), project) == []

def test_other_images_are_another_step(project):
    reproduce('smoke', root=project)
    assert status(reproduce('smoke', root=project, parameters=dict(data='mnist'))) == ['ran', 'ran']
    assert (project/'figures/smoke/table_mnist.csv').exists()
    assert status(reproduce('smoke', root=project)) == status(reproduce('smoke', root=project, parameters=dict(data='mnist'))) == ['up to date']*2
    assert check(steps('smoke', root=project, parameters=dict(data='mnist')), project) == []

def test_those_that_read_results_run_last(project, monkeypatch):
    RESULTS['90_claims'] = 'claims'
    write(project/'nbs/90_claims.ipynb', "import pandas as pd\nfrom tokpost.run import Run, read_table\nfound = read_table('table', preset)\n"
          "Run('claims', preset, out=out).save_table(found)")
    order, execute = [], tokpost.reproduce.execute_notebook
    monkeypatch.setattr(tokpost.reproduce, 'execute_notebook', lambda step, *args: order.append(step.name) or execute(step, *args))
    assert status(reproduce('smoke', root=project)) == ['ran']*3 and order[-1] == '90_claims'
    assert status(reproduce('smoke', root=project)) == ['up to date']*3
    write(project/'nbs/10_first.ipynb', TABLE.replace('1.5', '2.5'))
    assert status(reproduce('smoke', root=project)) == ['ran', 'up to date', 'ran']

def test_code_that_changes_while_a_notebook_runs_makes_it_stale(project, monkeypatch):
    execute = tokpost.reproduce.execute_notebook
    def slowly(step, *args):
        (project/'tokpost/lower.py').write_text('x = 3')
        return execute(step, *args)
    monkeypatch.setattr(tokpost.reproduce, 'execute_notebook', slowly)
    reproduce('smoke', root=project)
    assert reason_to_run(steps('smoke', root=project)[0], project) == 'its code, sizes or parameters changed'

def test_the_longest_starts_first(project, monkeypatch):
    reproduce('smoke', root=project)
    record = project/'figures/smoke/second.json'
    record.write_text(json.dumps(json.loads(record.read_text()) | dict(seconds=600.)))
    order, execute = [], tokpost.reproduce.execute_notebook
    monkeypatch.setattr(tokpost.reproduce, 'execute_notebook', lambda step, *args: order.append(step.name) or execute(step, *args))
    assert [outcome.name for outcome in reproduce('smoke', force=True, root=project)] == ['10_first', '11_second']
    assert order == ['11_second', '10_first']

def test_interruption_stops_and_goes_on(project, monkeypatch):
    whole = tokpost.reproduce.as_completed
    def stopped(waiting):
        yield next(whole(waiting))
        raise KeyboardInterrupt
    monkeypatch.setattr(tokpost.reproduce, 'as_completed', stopped)
    begun, execute = [], tokpost.reproduce.execute_notebook
    def slow(step, *args):
        begun.append(step.name)
        if step.name == '11_second': time.sleep(.5) # until it is stopped
        return execute(step, *args)
    monkeypatch.setattr(tokpost.reproduce, 'execute_notebook', slow)
    write(project/'nbs/12_third.ipynb', TABLE.replace('table', 'third').replace('save_third', 'save_table'), results={'third': ('', '')})
    outcomes = reproduce('smoke', root=project)
    assert status(outcomes)[0] == 'ran' and outcomes[2].status == 'not started' and '12_third' not in begun
    monkeypatch.setattr(tokpost.reproduce, 'as_completed', whole)
    assert reproduce('smoke', root=project)[0].status == 'up to date'

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
    capsys.readouterr()
    write(project/'nbs/10_first.ipynb', TABLE)
    assert main([]) == main([]) == 0
    history = pd.read_csv(project/'figures/smoke'/HISTORY)
    assert history[['ran', 'up_to_date', 'others']].values.tolist() == [[1, 0, 1], [1, 1, 0], [0, 2, 0]]
    assert (history.stages_before == 0).all() and (history.seconds < 60).all()

def test_results_of_sizes_that_the_preset_had_once_are_refused(project):
    reproduce('smoke', root=project)
    record = project/'figures/smoke/table.json'
    about = json.loads(record.read_text())
    about['sizes']['main_training']['steps'] += 1
    record.write_text(json.dumps(about))
    fault, = check(steps('smoke', root=project), project)
    assert "must be of the preset's sizes, got" in fault and 'main_training.steps' in fault

# ---------------------------------------------------------------------------------------------------------------- the project's own notebooks

SCHEMA = json.loads((ROOT/'tests/results.json').read_text()) # name of a table -> its columns

def declared(): return {name: step for step in steps('smoke', root=ROOT) for name in notebook_results(step.path)}

@pytest.fixture(scope='module')
def smoke():
    "The command at its smallest preset, as a user runs it; whether the photographs of notebook 15 are there is up to the machine."
    done = subprocess.run([sys.executable, '-c', 'import sys; from tokpost.reproduce import main; sys.exit(main(["--jobs", "2"]))'],
                          cwd=ROOT, env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path])), text=True, capture_output=True)
    return done

def test_every_notebook_runs(smoke):
    assert smoke.returncode == 0, smoke.stdout + smoke.stderr[-2000:]
    rows = {line.split()[0]: line for line in smoke.stdout.splitlines()}
    for step in steps('smoke', root=ROOT): assert re.match(rf'{step.name} +(ran|up to date) ', rows[step.name]), rows[step.name]

def test_every_result_has_its_schema(smoke):
    photographs = (ROOT/'figures/smoke/coda_taef2.json').exists()
    absent = {'coda_small', 'coda_small_levels'} if photographs else {'coda_taef2', 'coda_taef2_levels'}
    tables = {path.stem for path in (ROOT/'figures/smoke').glob('*.csv')} & set(declared())
    assert set(SCHEMA) - tables <= absent | {'coda_small', 'coda_small_levels'}
    for name in set(declared()) - absent:
        about = check_result(ROOT/f'figures/smoke/{name}.json', SCHEMA.get(name))
        assert about['preset'] == 'smoke' and about['commit'] and about['step'] in {step.name for step in steps('smoke', root=ROOT)}
    assert tables <= set(SCHEMA), 'a table without a schema'

def test_committed_results_are_complete():
    "Those of the laptop preset, with the columns of the schema."
    assert check(steps('laptop', root=ROOT), ROOT) == []
    for name in SCHEMA:
        if (ROOT/f'figures/laptop/{name}.csv').exists(): check_result(ROOT/f'figures/laptop/{name}.csv', SCHEMA[name])

def test_committed_results_come_from_the_command():
    names = {step.name for step in steps('laptop', root=ROOT)}
    for path in (ROOT/'figures/laptop').glob('*.json'):
        about = json.loads(path.read_text())
        assert about['step'] in names and about['execution'] and '+' not in about['commit'], path.name

def test_history_of_the_committed_results():
    rows = pd.read_csv(ROOT/'figures/laptop'/HISTORY)
    whole = rows[rows.others == 0]
    assert (whole.stages_before == 0).any() and (whole.ran == 0).any(), 'run from nothing, and once more'

SLOW = "import time\nopen('../begun', 'w').close()\ntime.sleep(600)"

def test_terminated_command_leaves_nothing_at_work(tmp_path):
    "In processes of its own, as it runs for a user: ended in the middle, then started again."
    import psutil
    (tmp_path/'settings.ini').write_text('[DEFAULT]')
    write(tmp_path/'nbs/10_first.ipynb', TABLE)
    write(tmp_path/'nbs/11_second.ipynb', SLOW)
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]), COLUMNS='200')
    command = [sys.executable, '-c', 'import sys; from tokpost.reproduce import main; sys.exit(main())', '--jobs', '2']
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    state = tmp_path/'runs/smoke/reproduce/10_first.json'
    while not ((tmp_path/'begun').exists() and state.exists()):
        assert process.poll() is None, process.communicate()
        time.sleep(.05)
    others = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and '11_second  interrupted' in said and '10_first   ran' in said
    assert psutil.wait_procs(others, timeout=30)[1] == []
    write(tmp_path/'nbs/11_second.ipynb', '1/0')
    done = subprocess.run(command, cwd=tmp_path, env=environ, text=True, capture_output=True)
    assert '10_first   up to date' in done.stdout and 'ZeroDivisionError: division by zero; see runs/smoke/reproduce/failed' in done.stdout

def test_modules_are_those_that_are_imported():
    found = imported_modules(code_of(ROOT/'nbs/14_coda_ladder.ipynb'), ROOT)
    assert {'coda', 'run', 'data', 'quantizer'} <= set(found) and 'released' not in found
    loaded = subprocess.run([sys.executable, '-c', 'import sys, tokpost.coda\nfor m in sys.modules: print(m)'], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split()
    assert set(imported_modules('from tokpost.coda import CODA', ROOT)) == {
        m.split('.')[1] for m in loaded if m.startswith('tokpost.') and m != 'tokpost._modidx'}
