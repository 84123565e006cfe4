"Every stage in two processes of torchrun and Papermill: killed on the way, they end with the result of an undisturbed run."
import json, os, random, shlex, shutil, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
import numpy as np, pandas as pd, psutil, pytest, tokpost.run, torch
from safetensors.torch import load_file
from tokpost.data import make_token_store
from tokpost.run import Loop, Processes, cached, claim, load_state, save_state, write_atomic

ROOT = Path(__file__).parent.parent
SEED = 0                                                     # decides in which stages the runs below are killed
CHANGES = {'evaluation.classifier_steps': 22, 'main_training.steps': 12, 'generator_training.steps': 8,
           'autoencoder_training.steps': 24, 'coda_quantizer_training.steps': 24, 'coda_training.steps': 8,
           'masked_training.steps': 8, 'diffusion_training.steps': 8, 'post_training.steps': 8, 'sigmas': [1., .2]}
ROBUST = dict(seeds=[0], codebook_sizes=[16, 32], changes=CHANGES | {'main_training.steps': 8, 'pairs.count': 32})
JOBS = {family: ('05_post_train', dict(family=family, changes=CHANGES)) for family in ('autoregressive', 'masked', 'diffusion')}
JOBS['robust'] = '10_robust_tokenizers', ROBUST
STAGES = dict(autoregressive=('tokenizer', 'tokens', 'generator', 'pairs', 'post_training', 'samples'),
              masked=('autoencoder', 'tokens', 'coda_quantizer', 'coda', 'masked', 'pairs', 'post_training', 'samples'),
              diffusion=('diffusion', 'pairs', 'post_training', 'samples'), robust=('tokenizer', 'generator', 'samples'))
STORES = 'tokens', 'pairs', 'samples'

# A copy of the project, with a checkpoint every four steps

def copy_project(folder):
    for name in ('nbs', 'tokpost'): shutil.copytree(ROOT/name, folder/name)
    shutil.copy(ROOT/'settings.ini', folder)
    (folder/'runs').mkdir()
    module = folder/'tokpost/run.py'
    assert module.read_text().count('checkpoint_every:int=500') == 1
    module.write_text(module.read_text().replace('checkpoint_every:int=500', 'checkpoint_every:int=4'))
    return folder

def start(folder, job, restarts=3):
    "The command of the README; what each rank finds to save goes to a folder of its own."
    notebook, parameters = JOBS[job]
    papermill = (f'{shlex.quote(sys.executable)} -m papermill nbs/{notebook}.ipynb runs/{job}.$RANK.ipynb --no-progress-bar '
                 f'-p preset smoke -p out figures.$RANK -y "$0"')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--max-restarts', str(restarts), '--no-python',
               '--nproc-per-node', '2', 'bash', '-c', papermill, json.dumps(parameters)]
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join([str(folder), *sys.path]), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    with open(folder/f'{job}.log', 'a') as log:
        return subprocess.Popen(command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                start_new_session=True)

def finish(folder, job, process=None):
    process = process or start(folder, job)
    try: code = process.wait(900)
    finally: kill(tree(process))
    assert code == 0, (folder/f'{job}.log').read_text()[-4000:]

def tree(process):
    try: return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess: return []

def kernel(process, rank):
    for child in tree(process):
        if 'ipykernel_launcher' in ' '.join(child.cmdline()) and child.environ()['RANK'] == str(rank): return child

def kill(processes):
    for process in processes:
        try: process.kill()
        except psutil.NoSuchProcess: pass
    assert not psutil.wait_procs(processes, timeout=60)[1]

def tables(folder): return sorted((folder/'figures.0/smoke').glob('*.csv'))

def started_and_met(folder, job, restarts=3):
    "Start a job and return it in the middle of a stage, which is drawn among those that it will come to."
    stage = random.Random(f'{SEED} {job}').choice(STAGES[job])
    pattern = f'{stage}-*/.tokens.partial/store.json' if stage in STORES else f'{stage}-*/checkpoint.safetensors'
    find = lambda: set((folder/'runs/smoke').glob(pattern))
    before, process, log = find(), start(folder, job, restarts), folder/f'{job}.log'
    while not find() - before:
        if process.poll() and restarts == 0 and 'Kernel died before replying' in log.read_text():
            log.unlink()                                     # two kernels chose one port, which Jupyter cannot exclude
            process = start(folder, job, restarts)
        assert process.poll() is None, (stage, log.read_text()[-4000:])
        time.sleep(.01)
    return stage, process

# What has to be the same

def saved_tables(folder):
    "Of every table: all but the times."
    found = {path.name: pd.read_csv(path, dtype=str) for path in tables(folder)}
    return {name: table.drop(columns='seconds', errors='ignore').to_csv() for name, table in found.items()}

def saved_records(folder):
    found = {}
    for path in (folder/'figures.0/smoke').glob('*.json'):
        record = json.loads(path.read_text())
        for key in ('seconds', 'peak_memory_gib'): assert record.pop(key) > 0
        for stage in record['stages'].values(): assert stage.pop('seconds') >= 0
        found[path.name] = record
    return found

def saved_tensors(folder, job):
    "Bytes of every checkpoint and store of the runs that the job's records name."
    found = {}
    for path in (folder/'runs/smoke').glob('*/checkpoint.safetensors'):
        for name, tensor in load_file(path).items(): found[path.parent.name, name] = tensor.numpy().tobytes()
    for path in (folder/'runs/smoke').glob('*/tokens/*.npy'): found[path.parent.parent.name, path.name] = path.read_bytes()
    return found

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Folder of the undisturbed runs, in the order of the tests below; they are on their way while others are killed."
    folder = copy_project(tmp_path_factory.mktemp('undisturbed'))
    with ThreadPoolExecutor(1) as pool:
        runs = {job: pool.submit(lambda job: finish(folder, job) or (saved_tables(folder), saved_records(folder),
                                                                     saved_tensors(folder, job)), job) for job in JOBS}
        yield folder, runs
        for run in runs.values(): run.cancel()

@pytest.fixture(scope='module')
def disturbed(tmp_path_factory): return copy_project(tmp_path_factory.mktemp('disturbed'))

def assert_same_end(disturbed, undisturbed, job):
    folder, runs = undisturbed
    expected_tables, expected_records, expected_tensors = runs[job].result()
    assert len(expected_tables) == len(tables(disturbed)) and saved_tables(disturbed) == expected_tables
    assert saved_records(disturbed) == expected_records
    assert all(record['processes'] == 2 and record['stages'] for record in expected_records.values())
    found = saved_tensors(disturbed, job)
    assert found.keys() == expected_tensors.keys() and [k for k in found if found[k] != expected_tensors[k]] == []
    for project in (disturbed, folder):
        assert not (project/'figures.1').exists()            # rank 0 alone saves
        for rank in range(2):
            cells = json.loads((project/f'runs/{job}.{rank}.ipynb').read_text())['cells']
            assert not any(output['output_type'] == 'error' for cell in cells for output in cell.get('outputs', ()))
    left = [path.name for path in (disturbed/'runs').rglob('.*') if path.name != '.lock']
    assert left == []

def test_killed_job_goes_on_to_the_same_end(disturbed, undisturbed):
    "As a batch system kills: all processes at once."
    stage, process = started_and_met(disturbed, 'autoregressive')
    kill(tree(process))
    assert tables(disturbed) == [], stage
    finish(disturbed, 'autoregressive')
    assert_same_end(disturbed, undisturbed, 'autoregressive')

def test_terminated_job_leaves_nothing_behind_and_goes_on_to_the_same_end(disturbed, undisturbed):
    "As a batch system takes a machine back: torchrun is asked to end, and ends its processes."
    before = tables(disturbed)
    stage, process = started_and_met(disturbed, 'masked')
    others = tree(process)
    process.terminate()
    assert process.wait(120) != 0
    assert psutil.wait_procs(others, timeout=60)[1] == []
    assert tables(disturbed) == before, stage
    finish(disturbed, 'masked')
    assert_same_end(disturbed, undisturbed, 'masked')

def test_job_ends_when_a_process_dies_and_goes_on_to_the_same_end(disturbed, undisturbed):
    "The other process must not wait for the dead one, nor stay behind."
    before = tables(disturbed)
    stage, process = started_and_met(disturbed, 'diffusion', restarts=0)
    others = tree(process)
    kill([kernel(process, 1)])
    assert process.wait(120) != 0
    assert psutil.wait_procs(others, timeout=60)[1] == []
    assert tables(disturbed) == before, stage
    finish(disturbed, 'diffusion')
    assert_same_end(disturbed, undisturbed, 'diffusion')

def test_job_started_again_while_the_killed_one_lives(disturbed, undisturbed):
    "Whoever kills torchrun alone leaves its processes at work; the next job comes to the same stages."
    stage, process = started_and_met(disturbed, 'robust')
    orphans = tree(process)[1:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert any(orphan.is_running() for orphan in orphans)
    try: finish(disturbed, 'robust')
    finally: gone, alive = psutil.wait_procs(orphans, timeout=300)
    assert alive == []
    assert_same_end(disturbed, undisturbed, 'robust')

# Processes that lose each other, and jobs that meet

def step(loop, stop=None):
    for number in loop:
        if number == stop: break
        loop.log(loop.parts['layer'](torch.ones(2)).sum())

def make_loop(folder, layer=None):
    return Loop(folder, 8, dict(layer=layer or torch.nn.Linear(2, 1)), checkpoint_every=2)

def folders_apart(here, folder):
    "A checkpoint that only the first process sees, as on nodes without a shared folder."
    if here.is_main: shutil.copytree(folder/'half', folder/'apart/0')
    here.wait()
    with pytest.raises(ValueError, match=r'different checkpoints at .*apart.* of steps \[4, 0\]; let all of them see one'):
        make_loop(folder/f'apart/{here.rank}')

def result_unseen(here, folder):
    "A result that only the first process sees."
    ask = lambda: cached(folder/f'unseen/{here.rank}/x.safetensors', lambda: dict(x=1))
    if here.is_main: assert ask() == dict(x=1)
    else:
        with pytest.raises(FileNotFoundError, match='process 1 of 2 does not see .*x.safetensors.*one shared folder'): ask()

def peer_is_late(here, folder):
    "As a frozen or cut-off node is."
    if here.rank == 1: time.sleep(600)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match='process 0 of 2 could not join the others: .*Start the same command again'):
        here.mean_gradients([torch.nn.Parameter(torch.ones(2))])
    assert 10 < time.monotonic() - began < 60

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "Folder of two processes that lived through the three functions above, what they said, and how they ended."
    folder = tmp_path_factory.mktemp('two')
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__, folder],
                          env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    return folder, done

def test_processes_that_lose_each_other_say_so(two):
    folder, done = two
    assert done.returncode != 0
    assert sorted(path.name for path in folder.glob('*.passed')) == [
        'folders_apart.0.passed', 'folders_apart.1.passed', 'peer_is_late.0.passed', 'result_unseen.0.passed',
        'result_unseen.1.passed'], done.stdout[-4000:]

def test_one_process_goes_on_where_two_were_killed(two):
    loop = make_loop(two[0]/'half')
    assert loop.start == 4
    step(loop)
    assert load_state(two[0]/'half/checkpoint.safetensors')['step'] == 8 and [row['step'] for row in loop.rows] == list(range(8))

HOLDS = """
import sys, time
from tokpost.run import Processes, claim
with claim(sys.argv[1] + '/.lock', Processes()):
    print('held', flush=True)
    if sys.stdin.readline(): open(sys.argv[1] + '/made', 'w').close()
    if len(sys.argv) > 2: time.sleep(600)
"""

@pytest.mark.parametrize('dies', [False, True], ids=['ends', 'dies'])
def test_a_job_waits_for_another_at_the_same_stage(tmp_path, dies):
    command = [sys.executable, '-c', HOLDS, tmp_path, *['and waits']*dies]
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    other = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == 'held\n'
    def let_go():
        other.stdin.write('\n')
        other.stdin.flush()
        while not (tmp_path/'made').exists(): time.sleep(.01)
        if dies: other.kill()
    with ThreadPoolExecutor(1) as pool, pytest.warns(UserWarning, match=f'another job is at work in {tmp_path}; this one waits'):
        pool.submit(lambda: time.sleep(1) or let_go())
        with claim(tmp_path/'.lock', Processes()): assert (tmp_path/'made').exists()
    other.wait()

def test_a_job_waits_for_nobody_where_there_are_no_locks(tmp_path, monkeypatch):
    "The same process twice, a file system without locks, and a folder to read from only."
    with claim(tmp_path/'.lock', Processes()), claim(tmp_path/'.lock', Processes()): pass
    def refuse(*args): raise OSError(95, 'Operation not supported')
    monkeypatch.setattr('fcntl.lockf', refuse)
    with claim(tmp_path/'.lock', Processes()): pass
    monkeypatch.setattr('builtins.open', refuse)
    with claim(tmp_path/'.lock', Processes()): pass

# What a kill leaves behind

def test_leftovers_of_killed_writers_go(tmp_path):
    host, dead = os.uname().nodename, subprocess.Popen(['true'])
    dead.wait()
    names = {f'.{dead.pid}@{host}.x.txt': 'of a dead process', f'.{os.getppid()}@{host}.x.txt': 'of a living one',
             f'.{dead.pid}@elsewhere.x.txt': 'of another machine', f'.{dead.pid}@elsewhere.old.x.txt': 'old',
             f'.{dead.pid}@{host}.y.x.txt': 'of another file', '.notes@home.x.txt': 'not ours'}
    for name, text in names.items(): (tmp_path/name).write_text(text)
    os.utime(tmp_path/f'.{dead.pid}@elsewhere.old.x.txt', (time.time() - 2*86_400,)*2)
    write_atomic(tmp_path/'x.txt', lambda path: path.write_text('whole'))
    kept = {path.read_text() for path in tmp_path.iterdir()}
    assert kept == {'whole', 'of a living one', 'of another machine', 'of another file', 'not ours'}

def killed_while_saving(folder):
    os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    save_state(folder/'x.safetensors', dict(x=torch.ones(1000)))

def test_no_half_file_stays_after_the_next_write(tmp_path):
    code = f'import sys, test_torchrun, pathlib; test_torchrun.killed_while_saving(pathlib.Path({str(tmp_path)!r}))'
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    assert subprocess.run([sys.executable, '-c', code], env=environ).returncode == -signal.SIGKILL
    left, = tmp_path.iterdir()
    assert left.stat().st_size > 4000
    save_state(tmp_path/'x.safetensors', dict(x=torch.zeros(3)))
    assert [path.name for path in tmp_path.iterdir()] == ['x.safetensors']

def tokens(rows): return torch.as_tensor(rows)[:, None]*torch.tensor([1, 2, 3]) % 64

def test_disk_that_fills_up_while_a_store_is_made(tmp_path, monkeypatch):
    "The batches before are kept, the one that failed is made again."
    made, plan = [], dict(labels=torch.zeros(20), num_tokens=3, codebook_size=64, made_by={}, batch_size=4)
    def fail(number):
        if len(made) == 3: raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fail)
        with pytest.raises(OSError, match='could not write .*indices.npy: .*No space left.*batches before are kept'):
            make_token_store(tmp_path/'store', lambda rows: made.append(int(rows[0])) or tokens(rows), **plan)
    store = make_token_store(tmp_path/'store', lambda rows: made.append(int(rows[0])) or tokens(rows), **plan)
    assert made == [0, 4, 8, 8, 12, 16] and torch.equal(store[:], tokens(np.arange(20)))

if __name__ == '__main__':
    torch.set_num_threads(1)
    tokpost.run.TIMEOUT = timedelta(seconds=20)
    here, folder = Processes('fp32'), Path(sys.argv[1])
    step(make_loop(folder/'half'), stop=5)
    for check in (folders_apart, result_unseen, peer_is_late):
        check(here, folder)
        (folder/f'{check.__name__}.{here.rank}.passed').touch()
    sys.exit(1)                                              # which ends the other, as an error does
