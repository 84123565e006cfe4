"Seeds, schedules, averages, checkpoints and records; runs that are really killed and files that do not fit."
import hashlib, json, multiprocessing, os, re, resource, shutil, signal, subprocess, sys
from importlib.metadata import version
from pathlib import Path
import matplotlib.figure, numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from scipy.stats import binom
from torch import nn
from tokpost.run import (EMA, PRESETS, Loop, Processes, Run, cached, ema_decay, environment, fingerprint,
                         fold, generator, load_state, project_root, read_table, save_state,
                         warmup_cosine, write_atomic)

def network(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(.5), nn.Linear(width, 1))

def train(folder, kill=None, width=8, config=None, steps=12, seed=3, spoil=None, averaged=True):
    "Dropout, AdamW, a schedule and an average: all that a resumed run has to carry on."
    torch.manual_seed(0)
    model = network(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=.05)
    parts = dict(model=model, optimizer=optimizer) | (dict(ema=EMA(model, .8)) if averaged else {})
    loop = Loop(folder, steps, parts, seed, config, checkpoint_every=4, schedule=warmup_cosine(steps, 3, .1))
    for step in loop:
        x = torch.randn(16, 4)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        if step == (spoil or {}).get('loss'): loss = loss*float('nan')
        optimizer.zero_grad()
        loss.backward()
        if step == (spoil or {}).get('gradient'): model[0].weight.grad.fill_(float('nan'))
        if step == kill: os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        if averaged: parts['ema'].update(model)
        loop.log(loss)
    return loop

def killed_in_step(folder): train(folder, kill=6)

def killed_in_save(folder):
    "Dies when the second checkpoint is written and not yet in its place."
    replace, places = os.replace, []
    def dying(source, place):
        places.append(place)
        if len(places) == 2: os.kill(os.getpid(), signal.SIGKILL)
        replace(source, place)
    os.replace = dying
    train(folder)

def full_disk(folder):
    "No file may grow beyond 64 KiB; says what the writers say."
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    for write in (lambda: save_state(f'{folder}/state.safetensors', dict(x=torch.ones(2**20))),
                  lambda: write_atomic(f'{folder}/text.txt', lambda path: path.write_text('x'*2**20))):
        try: write()
        except OSError as error: print(error, flush=True)

@pytest.fixture(scope='module')
def children(tmp_path_factory):
    "Folder and exit code of the three functions above, each in a process of its own, and what was printed."
    functions = killed_in_step, killed_in_save, full_disk
    folders = {function.__name__: tmp_path_factory.mktemp(function.__name__) for function in functions}
    save_state(folders['full_disk']/'state.safetensors', dict(x=torch.arange(3)))
    command = [sys.executable, __file__, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    return {name: (folder, code, done.stdout) for (name, folder), code in zip(folders.items(), codes)}

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project as working directory."
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path

def tensors(folder):
    found = load_file(folder/'checkpoint.safetensors')
    return {name: (value.dtype, value.numpy().tobytes()) for name, value in found.items()}

def visible(folder): return sorted(p.name for p in folder.iterdir() if p.name[0] != '.')

# Seeds

def test_fold_is_stable_across_versions():
    digest = hashlib.blake2b(b'[0, "data", 3]', digest_size=8).digest()
    assert fold(0, 'data', 3) == int.from_bytes(digest, 'big') >> 1
    assert fold(0, 'data', 3) == 572712993707798963
    assert torch.randint(1000, (4,), generator=generator(0, 'data', 3)).tolist() == [528, 840, 21, 830]

def test_fold_is_independent():
    seeds = [fold(seed, name, n) for seed in range(10) for name in ('flip', 'order') for n in range(200)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):
        count = sum(seed >> bit & 1 for seed in seeds)
        assert binom.ppf(1e-7, len(seeds), .5) <= count <= binom.isf(1e-7, len(seeds), .5)
    others = fold(0, 'ab'), fold(0, 'a', 'b'), fold(0, 'a'), fold(0), fold(0, 1), fold(0, '1'), fold(1, 0)
    assert len(set(others)) == 7

# Schedules and averages

@pytest.mark.parametrize('steps, warmup, final',
                         [(100, 10, .1), (50, 0, 0.), (7, 7, 0.), (5, 10, .5), (1, 0, 0.)])
def test_warmup_cosine_equals_formula(steps, warmup, final):
    t = np.arange(2*steps)
    progress = np.clip((t-warmup)/max(steps-warmup, 1), 0, 1)
    expected = np.where(t < warmup, (t+1)/max(warmup, 1), final + (1-final)*np.cos(np.pi*progress/2)**2)
    factors = [warmup_cosine(steps, warmup, final)(step) for step in t]
    assert factors == pytest.approx(expected, abs=1e-12)
    assert 0 <= min(factors) <= max(factors) <= 1

def test_schedule_multiplies_every_group():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    first = torch.optim.SGD([dict(params=weights[:1], lr=.5), dict(params=weights[1:2], lr=.1)])
    second, rates = torch.optim.SGD(weights[2:], lr=2.), []
    for _ in Loop(None, 4, dict(a=first, b=second), schedule=lambda step: 1/(step+1)):
        rates.append([group['lr'] for optimizer in (first, second) for group in optimizer.param_groups])
    assert np.array(rates) == pytest.approx(np.outer(1/np.arange(1, 5), [.5, .1, 2.]))

def test_ema_equals_loop():
    torch.manual_seed(0)
    module, decay = network(), .9
    ema, expected = EMA(module, decay), None
    for step in range(5):
        module(torch.randn(16, 4))                           # moves the running statistics
        for p in module.parameters(): p.data.add_(torch.randn_like(p))
        ema.update(module)
        new = {k: v.double().clone() for k, v in module.state_dict().items() if v.is_floating_point()}
        expected = new if expected is None else {k: decay*expected[k] + (1-decay)*new[k] for k in new}
    found = ema.module.state_dict()
    for name, value in expected.items(): assert torch.allclose(found[name].double(), value, atol=1e-6), name
    assert not ema.module.training and module.training
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for p in module.parameters())

def test_ema_horizon_is_the_share_of_the_run():
    assert ema_decay(1000, .1) == pytest.approx(1-1/100) and ema_decay(1000, .5) == pytest.approx(1-1/500)
    assert ema_decay(10**9) == .9999 and 0 <= ema_decay(1) < 1

# Files

@pytest.mark.parametrize('make', [lambda p: torch.optim.AdamW(p, lr=.1, amsgrad=True),
                                  lambda p: torch.optim.SGD(p, lr=.1, momentum=.9)], ids=['adamw', 'sgd'])
def test_optimizer_goes_on_after_a_round_trip(tmp_path, make):
    def step(weight, optimizer):
        optimizer.zero_grad()
        (weight.cos()*torch.arange(6.)).sum().backward()
        optimizer.step()
    whole = nn.Parameter(torch.linspace(-1, 1, 6))
    optimizer = make([whole])
    for _ in range(3): step(whole, optimizer)
    state = dict(weight=whole, optimizer=optimizer.state_dict())
    loaded = load_state(save_state(tmp_path/'x.safetensors', state))
    resumed = nn.Parameter(loaded['weight'])
    fresh = make([resumed])
    fresh.load_state_dict(loaded['optimizer'])
    for _ in range(3): step(whole, optimizer), step(resumed, fresh)
    assert torch.equal(whole, resumed)

def test_nested_state_round_trip(tmp_path):
    shared = torch.randn(4, 3)
    state = {'view': shared.T, 'same': shared, 'half': shared.bfloat16(), 'mask': shared > 0,
             'step': torch.tensor(7),
             'none': torch.empty(0, 2), 3: {'x': [1, 2.5, None, True, 'text', {'deep': torch.arange(2)}]},
             'a.b': torch.zeros(1), 'a': {'b': torch.ones(1)}}
    loaded = load_state(save_state(tmp_path/'new/folder/x.safetensors', state))
    def same(a, b):
        if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list): return len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and a == b
    assert same(state, loaded)

@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b[:5], lambda b: b[:-1], lambda b: b + b'0',
                                    lambda b: b'\xff'*len(b), lambda b: b[:8] + b'{' + b[8:]])
def test_damaged_state_is_refused(tmp_path, damage):
    path = save_state(tmp_path/'checkpoint.safetensors', dict(x=torch.ones(9)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r'checkpoint\.safetensors is damaged.*delete it'): load_state(path)
    with pytest.raises(ValueError, match='delete it'): train(tmp_path)

def test_someone_elses_file_is_refused(tmp_path):
    save_file(dict(x=torch.ones(2)), tmp_path/'checkpoint.safetensors')
    with pytest.raises(ValueError, match=r'checkpoint\.safetensors.*delete it'): train(tmp_path)
    with pytest.raises(FileNotFoundError, match='no saved state at .*nothing'): load_state(tmp_path/'nothing')

@pytest.mark.parametrize('error', [OSError('No space left'), KeyboardInterrupt(), ZeroDivisionError()])
def test_failed_write_leaves_the_old_file_alone(tmp_path, error):
    def write(path):
        path.write_text('half')
        raise error
    (tmp_path/'a.txt').write_text('old')
    with pytest.raises(type(error)): write_atomic(tmp_path/'a.txt', write)
    with pytest.raises(type(error)): write_atomic(tmp_path/'b.txt', write)
    assert [p.name for p in tmp_path.iterdir()] == ['a.txt'] and (tmp_path/'a.txt').read_text() == 'old'

def test_full_disk_is_a_clear_error(children):
    folder, code, said = children['full_disk']
    assert code == 0, said
    for name in ('state.safetensors', 'text.txt'):
        assert re.search(rf'could not write .*{name}: .*File too large.*free some disk space', said), said
    assert [p.name for p in folder.iterdir()] == ['state.safetensors']
    assert load_state(folder/'state.safetensors')['x'].tolist() == [0, 1, 2]

def test_cached_makes_once(tmp_path):
    calls = []
    make = lambda: calls.append(0) or dict(x=torch.ones(2), n=len(calls))
    first, second = (cached(tmp_path/'a/b.safetensors', make) for _ in range(2))
    assert len(calls) == 1 and first['n'] == second['n'] == 1 and torch.equal(first['x'], second['x'])

# The loop

@pytest.mark.parametrize('death, kept', [('killed_in_step', 4), ('killed_in_save', 4)])
def test_killed_run_ends_with_the_bytes_of_an_undisturbed_one(children, tmp_path, death, kept):
    folder, code, said = children[death]
    assert code == -signal.SIGKILL, said
    assert visible(folder) == ['checkpoint.safetensors']
    assert load_state(folder/'checkpoint.safetensors')['step'] == kept
    whole, resumed = train(tmp_path), train(folder)
    assert (whole.start, resumed.start) == (0, kept)
    assert tensors(folder) == tensors(tmp_path) and resumed.rows == whole.rows
    assert len(tensors(folder)) > 20                         # weights, moments, averages
    assert len(whole.rows) == 12 and np.isfinite([row['loss'] for row in whole.rows]).all()

def test_complete_run_is_not_run_again(tmp_path):
    train(tmp_path)
    before = (tmp_path/'checkpoint.safetensors').read_bytes()
    again = train(tmp_path)
    assert again.start == 12 and len(again.rows) == 12
    assert (tmp_path/'checkpoint.safetensors').read_bytes() == before

def test_same_seed_same_bytes_other_seed_others(tmp_path):
    for name, seed in (('a', 3), ('b', 3), ('c', 4)): train(tmp_path/name, seed=seed)
    assert tensors(tmp_path/'a') == tensors(tmp_path/'b') != tensors(tmp_path/'c')

@pytest.mark.parametrize('change, message', [
    (dict(config=dict(lr=.2, k=[1, 2])), r'made with lr=0\.1, this run has lr=0\.2'),
    (dict(config=dict(lr=.1, k=[1])), r'k=\[1, 2\]'), (dict(steps=8), 'steps=12'),
    (dict(config=dict(lr=.1)), r'k=\[1, 2\], this run has k=None'),
    (dict(seed=4), 'seed=3, this run has seed=4'), (dict(width=9), 'model'), (dict(averaged=True), 'ema')])
def test_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    usual = dict(config=dict(lr=.1, k=[1, 2]), averaged=False)
    train(tmp_path, **usual)
    before = tensors(tmp_path)
    with pytest.raises(ValueError, match=message) as error: train(tmp_path, **usual | change)
    assert str(tmp_path) in str(error.value) and 'delete the checkpoint' in str(error.value)
    assert tensors(tmp_path) == before

@pytest.mark.parametrize('spoil', [dict(loss=6), dict(gradient=6), dict(gradient=7)], ids=str)
def test_nan_stops_and_the_last_good_checkpoint_stays(tmp_path, spoil):
    "A gradient that spoils the weights just before they are saved leaves the older checkpoint."
    with pytest.raises(FloatingPointError, match='not finite') as error: train(tmp_path, spoil=spoil)
    if 'loss' in spoil: assert 'step 6' in str(error.value)
    assert re.search(r'checkpoint\.safetensors holds step 4', str(error.value))
    assert all(x.isfinite().all() for x in load_file(tmp_path/'checkpoint.safetensors').values())
    assert train(tmp_path).start == 4

def test_steps_are_checked():
    with pytest.raises(ValueError, match='steps must be at least 1, got 0'): Loop(None, 0, {})
    with pytest.raises(ValueError, match="got 'fp8'"): Processes('fp8')

# Runs and their records

@pytest.mark.parametrize('changes', [{'main.steps': 3}, {'nothing': 3}, {'main_training.steps.more': 3},
                                     {'seed': 1}])
def test_unknown_changes_are_refused(project, changes):
    with pytest.raises(ValueError, match=f'changes must name .*{list(changes)[0]}'): Run('x', changes=changes)

def test_unknown_preset_is_refused(project):
    with pytest.raises(ValueError, match=r"\['smoke', 'laptop', 'small', 'full'\], got 'huge'"):
        Run('x', 'huge')

def test_changes_leave_the_preset_alone(project):
    run = Run('x', changes={'main_training.steps': 3, 'sigmas': [1.]})
    assert run.size['main_training']['steps'] == 3 != PRESETS['smoke']['main_training']['steps']
    assert run.size['sigmas'] == [1.] != PRESETS['smoke']['sigmas']

def test_folders_are_found_again_and_never_shared(project):
    stages = [Run('x').folder('a', n=1), Run('y').folder('a', n=1), Run('x').folder('a', n=2),
              Run('x').folder('b', n=1), Run('x', seed=1).folder('a', n=1),
              Run('x', data='mnist').folder('a', n=1), Run('x', 'laptop').folder('a', n=1)]
    assert stages[0] == stages[1] and len(set(stages)) == 6
    assert all(stage.is_relative_to(project/'runs') for stage in stages)
    assert Run('x').folder('a', m=1, n=2) == Run('x').folder('a', n=2, m=1)
    assert fingerprint(a=1, b=2) == fingerprint(b=2, a=1) != fingerprint(a=2, b=1)

def test_table_and_record(project):
    run = Run('result', seed=5, changes={'main_training.steps': 3})
    train(run.folder('tokenizer', steps=12))
    table = pd.DataFrame([dict(sigma=1., gfid=3.5, n=3), dict(sigma=.9, gfid=3.25, n=3)])
    assert run.save_table(table) is table
    pd.testing.assert_frame_equal(read_table('result'), table)
    record = json.loads((project/'figures/smoke/result.json').read_text())
    assert record == read_table('result', 'smoke').attrs['record']
    kinds = dict(name=str, preset=str, seed=int, data=str, changes=dict, sizes=dict, processes=int,
                 precision=str, commit=str, python=str, versions=dict, device=str, threads=int,
                 seconds=float, stages=dict, peak_memory_gib=float)
    for key, kind in kinds.items(): assert type(record[key]) is kind, key
    assert (record['preset'], record['seed'], record['data']) == ('smoke', 5, 'digits')
    assert record['sizes'] == json.loads(json.dumps(run.size))
    assert record['sizes']['main_training']['steps'] == 3
    assert record['versions']['torch'] == version('torch') and .05 < record['peak_memory_gib'] < 1000
    (stage, kept), = record['stages'].items()
    assert stage.startswith('tokenizer-') and kept['steps'] == 12
    assert 0 <= kept['seconds'] < record['seconds'] + .1

def test_figure_and_record(project, tmp_path_factory):
    out = tmp_path_factory.mktemp('elsewhere')
    run = Run('result', data='ylecun/mnist', out=str(out))
    figure = matplotlib.figure.Figure()
    figure.subplots().plot([1, 2])
    run.save_figure(figure)
    run.save_figure(figure, 'other')
    names = ['other_mnist.json', 'other_mnist.png', 'result_mnist.json', 'result_mnist.png']
    assert visible(out/'smoke') == names
    assert (out/'smoke/result_mnist.png').read_bytes().startswith(b'\x89PNG')
    assert json.loads((out/'smoke/result_mnist.json').read_text())['data'] == 'ylecun/mnist'
    assert visible(project) == ['settings.ini']

def test_largest_preset_is_read(project):
    for preset in ('laptop', 'small', 'smoke'):
        Run('result', preset, out='tables').save_table(pd.DataFrame([dict(preset=preset)]))
    assert read_table('result', out='tables').preset[0] == 'small'
    assert read_table('result', 'smoke', out='tables').preset[0] == 'smoke'
    with pytest.raises(FileNotFoundError, match="no result 'other'"): read_table('other', out='tables')

def test_project_root(project, monkeypatch, tmp_path_factory):
    (project/'nbs/deep').mkdir(parents=True)
    monkeypatch.chdir(project/'nbs/deep')
    assert project_root() == project
    outside = tmp_path_factory.mktemp('outside')
    monkeypatch.chdir(outside)
    assert project_root() == outside

@pytest.mark.skipif(not shutil.which('git'), reason='git is not installed')
def test_commit_says_whether_the_code_was_changed(project):
    assert environment()['commit'] == ''
    author = '-c', 'user.name=a', '-c', 'user.email=a@b.c'
    git = lambda *args: subprocess.run(['git', *author, *args], check=True, stdout=subprocess.DEVNULL)
    (project/'tokpost').mkdir()
    (project/'tokpost/run.py').write_text('old')
    for args in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'first']): git(*args)
    assert re.fullmatch('[0-9a-f]{40}', environment()['commit'])
    (project/'tokpost/run.py').write_text('new')
    assert re.fullmatch(r'[0-9a-f]{40}\+changes', environment()['commit'])

def test_record_without_git(project, monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert Run('x').record()['commit'] == ''

if __name__ == '__main__':
    torch.set_num_threads(1)
    Processes()
    fork, codes = multiprocessing.get_context('fork'), []
    for function, folder in zip((killed_in_step, killed_in_save, full_disk), sys.argv[1:]):
        child = fork.Process(target=function, args=(Path(folder),))
        child.start()
        child.join()
        codes.append(child.exitcode)
    print(json.dumps(codes))
