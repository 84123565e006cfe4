"Class folders, ImageNet's layouts and class order, WebDataset shards: what must be read, and what must be refused."
import gzip, io, json, os, pickle, tarfile, threading, zlib
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from tokpost import data
from tokpost.data import Images, check_classes, find_shards, image_batches, index_shard, load_images, to_pixels

@pytest.fixture(autouse=True)
def nothing_kept(tmp_path_factory, monkeypatch):
    "`datasets` and the index of shards keep nothing of another test; nobody asks the hub."
    import datasets, huggingface_hub
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('kept')))
    for module in (datasets.config, huggingface_hub.constants): monkeypatch.setattr(module, 'HF_HUB_OFFLINE', True)

def grey(value, kind='png', size=(12, 10)):
    file = io.BytesIO()
    Image.new('L', size, value).save(file, kind)
    return file.getvalue()

def write_tar(path, *members): # (name, bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path

def write_shard(path, values, labels=None):
    "Grey images and their classes, by default the grey level modulo 3."
    members = [[(f'{value:05}.cls', b'%d' % (labels or {}).get(value, value % 3)), (f'{value:05}.png', grey(value))] for value in values]
    return write_tar(path, *(member for pair in members for member in pair))

def greys(images, rows=slice(None)): return to_pixels(images[rows])[:, 0, 0, 0].tolist()

def load(source, split='train', size=8, **options):
    return load_images(source if isinstance(source, list) else str(source), split, size, **options)

def take(batches, count): return [batch for batch, _ in zip(batches, range(count))]

def imagenet(): return data._imagenet()

# Shards

@pytest.mark.parametrize('layout', ['{split}-{i:04}.tar', 'imagenet1k-{split}-{i:02}.tar', '{split}/{i:04}.tar'])
@pytest.mark.parametrize('validation', ['validation', 'val', 'test'])
def test_folder_of_shards(tmp_path, layout, validation):
    for i in range(3): write_shard(tmp_path/layout.format(split='train', i=i), range(10*i, 10*i+4))
    write_shard(tmp_path/layout.format(split=validation, i=0), [200, 201])
    train, held_out = load(tmp_path), load(tmp_path, 'validation')
    assert greys(train) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23] and greys(held_out) == [200, 201]
    assert train.labels.tolist() == [value % 3 for value in greys(train)] and held_out.labels.tolist() == [2, 0]

def test_shards_of_the_test_split_are_never_read(tmp_path):
    write_shard(tmp_path/'train-0.tar', [1, 2])
    write_shard(tmp_path/'validation-0.tar', [3])
    write_tar(tmp_path/'test-0.tar', ('9.png', grey(9)))
    assert [greys(load(tmp_path, split)) for split in data.SPLITS] == [[1, 2], [3]]

def test_members_of_every_form(tmp_path):
    "Folders inside, capital letters, labels before, behind and in JSON, files of no concern, hidden files."
    write_tar(tmp_path/'set.tar', ('a/n1.cls', b'2\n'), ('a/n1.JPEG', grey(10, 'jpeg')), ('a/n2.webp', grey(20, 'webp')),
              ('a/n2.json', json.dumps(dict(width=3, label=1)).encode()), ('b/n1.png', grey(30)), ('b/n1.json', b'{"label": 7}'),
              ('b/n1.cls', b'0'), ('b/n1.seg.png', b''), ('b/n1.txt', b'a pike'), ('b/._n1.jpg', b'not an image'),
              ('c.jpg', grey(40, 'jpeg')), ('c.json', b'{"class_id": 3}'))
    found = index_shard(tmp_path/'set.tar')
    assert found['names'].tolist() == [b'a/n1.JPEG', b'a/n2.webp', b'b/n1.png', b'c.jpg'] and found['labels'].tolist() == [2, 1, 0, 3]
    rows, labels, classes = data._shards('set', [tmp_path/'set.tar'])
    assert classes == 4 and [Image.open(io.BytesIO(rows[i]['bytes'])).convert('L').getpixel((0, 0)) for i in range(4)] == [10, 20, 30, 40]

def test_patterns_of_shards(tmp_path, monkeypatch):
    paths = [write_shard(tmp_path/f'shards/train-{i:04}.tar', [i]) for i in range(12)]
    under = f'{tmp_path}/shards'
    for pattern, chosen in [('train-{0000..0011}.tar', range(12)), ('train-00{07..09}.tar', (7, 8, 9)), ('train-*.tar', range(12)),
                            ('train-000?.tar', range(10)), ('train-{0003,0001}.tar', (3, 1)), ('train-0{00,01}{1..1}.tar', (1, 11))]:
        assert find_shards(f'{under}/{pattern}') == [paths[i] for i in chosen]
    assert find_shards([f'{under}/train-000{{7..8}}.tar', paths[5]]) == [paths[i] for i in (7, 8, 5)]
    with pytest.raises(ValueError, match='must name every shard once'): find_shards([f'{under}/train-*.tar', paths[5]])
    assert find_shards(f'{paths[4]}::{under}/train-000{{0..1}}.tar') == [paths[i] for i in (4, 0, 1)]
    monkeypatch.setenv('TOKPOST_DATA', str(tmp_path))
    assert find_shards('shards/train-{0000..0011}.tar') == paths
    assert sorted(greys(load('shards/train-{0000..0011}.tar')) + greys(load('shards/train-{0000..0011}.tar', 'validation'))) == list(range(12))
    assert sorted(greys(load(paths)) + greys(load(paths, 'validation'))) == list(range(12)) and load(paths).name == 'train-0000'
    for source in ('mnist', 'ILSVRC/imagenet-1k', 'a folder'): assert find_shards(source) == []
    with pytest.raises(FileNotFoundError, match=r'no shard .*train-0012\.tar') as error: load(f'{under}/train-{{0000..0013}}.tar')
    assert '{0000..1023}' in str(error.value)

@pytest.mark.parametrize('workers', [0, 2])
def test_shards_give_the_batches_of_other_sources(tmp_path, workers):
    "Also in worker processes, and in two processes of a run."
    from datasets import Dataset, Features, ClassLabel, Image as Picture
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (14, 20, 3), dtype=np.uint8)) for i in range(20)]
    files = [io.BytesIO() for _ in noise]
    for picture, file in zip(noise, files): picture.save(file, 'png')
    features = Features(image=Picture(), label=ClassLabel(num_classes=2))
    Dataset.from_dict(dict(image=noise, label=[i % 2 for i in range(20)]), features).to_parquet(tmp_path/'set.parquet')
    for k in range(4):
        write_tar(tmp_path/f'shards/{k}.tar', *(member for i in range(5*k, 5*k+5) for member in
                                              ((f'{i:02}.png', files[i].getvalue()), (f'{i:02}.cls', b'%d' % (i % 2)))))
    table, shards = load(tmp_path/'set.parquet', memory=0), load(tmp_path/'shards', memory=0)
    assert shards.fingerprint == table.fingerprint and shards.pixels is None
    for options in (dict(augment=True), dict(augment='crop'), dict(start=3), dict(rank=1, world=2, augment=True)):
        ours = take(image_batches(shards, 6, seed=4, workers=workers, **options), 4)
        theirs = take(image_batches(table, 6, seed=4, workers=0, **options), 4)
        for (a, k), (b, m) in zip(ours, theirs, strict=True): assert torch.equal(a, b) and torch.equal(k, m)

def test_rows_survive_pickling_and_threads(tmp_path):
    "A spawned process gets a pickled copy; more shards than may stay open are read by many threads."
    for i in range(210): write_shard(tmp_path/f'{i:03}.tar', [i])
    rows, *_ = data._shards('set', sorted(tmp_path.glob('*.tar')))
    images, found, errors = Images(rows, np.zeros(210, int), 1, 8, memory=0), [None]*4, []
    def read(k):
        try: found[k] = greys(images)
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert errors == [] and found == [list(range(210))]*4 and 0 < len(rows.files) <= 200
    again = pickle.loads(pickle.dumps(rows))
    assert again.files == {} and again[209] == rows[209] and again.select(np.array([5, 3]))[1] == rows[3]

# The index of a shard

@pytest.fixture
def counted(monkeypatch):
    made = []
    monkeypatch.setattr(data, 'index_shard', lambda path: made.append(Path(path).name) or index_shard(path))
    return made

def kept(): return list(Path(os.environ['XDG_CACHE_HOME']).rglob('*.npz'))

def test_a_shard_is_indexed_once(tmp_path, counted):
    for i in range(3): write_shard(tmp_path/f'train-{i}.tar', [i, i+5])
    first = load(tmp_path)
    again = load(tmp_path)
    assert sorted(counted) == ['train-0.tar', 'train-1.tar', 'train-2.tar'] and len(kept()) == 3
    assert greys(first) == greys(again) and torch.equal(first.labels, again.labels) and first.fingerprint == again.fingerprint

@pytest.mark.parametrize('change', ['size', 'time', 'damaged', 'emptied', 'another array'])
def test_an_index_that_does_not_fit_is_made_anew(tmp_path, counted, change):
    shard = write_shard(tmp_path/'set.tar', range(10))
    before = os.stat(shard)
    load(shard)
    if change == 'size':
        write_shard(shard, range(50, 80))
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    if change == 'time':
        write_shard(shard, range(50, 60))
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns+1))
    path, = kept()
    if change == 'damaged': path.write_bytes(path.read_bytes()[:-300])
    if change == 'emptied': path.write_bytes(b'')
    if change == 'another array': np.savez(path, other=np.arange(3))
    now = greys(load(shard)) + greys(load(shard, 'validation'))
    assert sorted(now) == list({'size': range(50, 80), 'time': range(50, 60)}.get(change, range(10))) and len(counted) == 2 and kept() == [path]

def test_an_index_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    shard = write_shard(tmp_path/'set.tar', range(10))
    def full(*_): raise OSError('No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(data.os, 'replace', full)
        with pytest.warns(UserWarning, match='could not be kept in .*No space left'): assert len(load(shard)) == 8
    assert not [path for path in Path(os.environ['XDG_CACHE_HOME']).rglob('*') if path.is_file() or path.name.startswith('tmp')]
    monkeypatch.setenv('XDG_CACHE_HOME', str(shard)) # a file, where no folder can be made
    with pytest.warns(UserWarning, match='could not be kept'): assert len(load(shard)) == 8

# Damaged shards

def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path):
    "Between members, inside them, inside headers; a tar file says where it ends."
    whole = write_shard(tmp_path/'whole.tar', range(4)).read_bytes()
    used = len(whole.rstrip(b'\0'))
    ends, cut = -(-used//512)*512, tmp_path/'cut.tar'
    for length in (0, 1, 511, 512, 700, *range(1024, ends+1, 512), *range(1300, ends, 977), ends+1, ends+511):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r'cut\.tar: .* cut off, damaged'): index_shard(cut)
    cut.write_bytes(whole[:ends+512])
    assert len(index_shard(cut)['labels']) == 4
    cut.write_bytes(whole[:ends])
    with pytest.raises(ValueError, match=r'cut off, damaged or compressed after 00003\.png'): load(cut)
    cut.write_bytes(whole[:2048] + b'x'*600 + whole[2648:])
    with pytest.raises(ValueError, match='after 0000[0-3]'): index_shard(cut)

def test_compressed_shards_are_refused(tmp_path):
    shard = write_shard(tmp_path/'set.tar', range(4))
    packed = tmp_path/'set.tar.gz'
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    for source in (packed, f'{tmp_path}/set.{{tar.gz,tar}}'):
        with pytest.raises(ValueError, match=r'set\.tar\.gz: .*unpack a compressed one'): load(source)

@pytest.mark.parametrize('members, message', [
    ([('a.cls', b'1'), ('a.png', b''), ('b.png', b'')], r'b\.png has no label, neither a \.cls nor a \.json'),
    ([('a.png', b''), ('a.txt', b'a pike')], r'a\.png has no label'),
    ([('a.png', b''), ('b.cls', b'1')], r'a\.png has no label'),
    ([('a.png', b''), ('a.cls', b'pike')], r"a\.cls must hold a label of 0 or more, got b'pike'"),
    ([('a.png', b''), ('a.cls', b'')], r"a\.cls must hold a label"),
    ([('a.png', b''), ('a.cls', b'-1')], r"a\.cls must hold a label of 0 or more, got b'-1'"),
    ([('a.png', b''), ('a.json', b'{"width": 3}')], r'a\.json must hold a label'),
    ([('a.png', b''), ('a.json', b'{"label": ')], r'a\.json must hold a label'),
    ([('a.png', b''), ('a.json', b'{"label": 1.5}')], r'a\.json must hold a label'),
    ([('a.png', b''), ('a.cls', b'1'), ('a.jpg', b'')], r'a\.jpg and a\.png are two images of one key'),
    ([('a.cls', b'1'), ('n01440764.tar', b'')], 'none of its 2 members is an image'),
    ([], 'none of its 0 members is an image')])
def test_members_that_cannot_be_used_are_named(tmp_path, members, message):
    write_tar(tmp_path/'train-7.tar', *members)
    with pytest.raises(ValueError, match=r'train-7\.tar: ' + message): load(tmp_path)

def test_shards_of_mixed_splits_are_refused(tmp_path):
    for name in ('train-0.tar', 'train-1.tar', 'more.tar'): write_shard(tmp_path/name, [1, 2])
    for _ in range(2): # without and with a validation split
        with pytest.raises(ValueError, match=r'the shard more\.tar must say its split, as train-0\.tar does'): load(tmp_path)
        write_shard(tmp_path/'val-0.tar', [3])

def test_a_validation_split_is_not_trained_on(tmp_path):
    for i in range(2): write_shard(tmp_path/f'set/imagenet1k-validation-{i:02}.tar', [5*i, 5*i+1])
    assert greys(load(tmp_path/'set', 'validation')) == [0, 1, 5, 6]
    for source in (tmp_path/'set', f'{tmp_path}/set/imagenet1k-validation-{{00..01}}.tar'):
        with pytest.raises(ValueError, match="of the split 'validation' alone, there is no train split"): load(source)

@pytest.mark.filterwarnings('ignore:.*passed over')
def test_damage_that_comes_later_is_named(tmp_path):
    "An image that is no image, and a shard that is cut after it was indexed."
    shard = write_tar(tmp_path/'set.tar', *(member for i in range(40) for member in
                                            ((f'{i:02}.png', b'broken' if i == 3 else grey(i)), (f'{i:02}.cls', b'0'))))
    rows, labels, _ = data._shards('set', [shard])
    with pytest.warns(UserWarning, match=r'passed over .*set\.tar:03\.png'): images = Images(rows, labels, 1, 8, 'set')
    assert len(images) == 39
    lazy = Images(rows, labels, 1, 8, 'set', memory=0)
    os.truncate(shard, int(rows.offsets[36])+20)
    with pytest.warns(UserWarning, match=r'set\.tar:36\.png: the shard ends \d+ bytes before'): assert greys(lazy, [36, 5]) == [0, 5]
    os.truncate(shard, int(rows.offsets[20])+20)
    with pytest.raises(ValueError, match=r'\d+ images could not be read, the limit is 10; the last was .*set\.tar:\d\d\.png'): lazy[range(18, 40)]

@pytest.mark.filterwarnings("ignore:.*passed over")
def test_a_shard_that_is_gone_is_named(tmp_path):
    shard = write_shard(tmp_path/'set.tar', range(40))
    rows, labels, _ = data._shards('set', [shard])
    images = Images(rows, labels, 3, 8, 'set', memory=0)
    images.rows.files.clear()
    shard.unlink()
    with pytest.warns(UserWarning, match='passed over .*set.tar:00000.png: .*No such file'), pytest.raises(ValueError, match='could not be read'):
        images[range(12)]

# Class folders

def write_folders(root, names, count=1, suffix='png'):
    for c, name in enumerate(names):
        (root/name).mkdir(parents=True)
        for i in range(count): (root/name/f'{i}.{suffix}').write_bytes(grey((40*c+i) % 256, 'jpeg' if suffix == 'JPEG' else suffix, (4, 4)))
    return root

def test_folders_named_by_numbers_are_in_the_order_of_the_numbers(tmp_path):
    names = ['0', '1', '10', '11', '2', '3', '9']
    for split in ('train', 'val'): write_folders(tmp_path/split, names)
    for split in data.SPLITS:
        images = load(tmp_path, split, 4)
        assert [names[value//40] for value in greys(images, np.argsort(images.labels.numpy()))] == sorted(names, key=int)

def test_labels_are_those_of_the_top_folder(tmp_path):
    "As torchvision reads them: Tiny ImageNet keeps its images one folder deeper."
    write_folders(tmp_path/'train', ['n01443537/images', 'n01629819/images'], 2, 'JPEG')
    write_folders(tmp_path/'val', ['n01629819/images'], suffix='JPEG')
    train, held_out = load(tmp_path, size=4), load(tmp_path, 'validation', 4)
    assert train.labels.tolist() == [0, 0, 1, 1] and held_out.labels.tolist() == [1] and held_out.num_classes == 2

@pytest.mark.parametrize('damage, message', [
    (lambda root: (root/'train/owl').mkdir(), 'class folder .*owl must hold an image'),
    (lambda root: write_folders(root/'val', ['wolf']), r"val/wolf/0\.png is of class 'wolf', which train does not have"),
    (lambda root: (root/'train/1.png').write_bytes(grey(1)), r'train/1\.png must lie in a class folder'),
    (lambda root: (root/'val/1.png').write_bytes(grey(1)), r'val/1\.png must lie in a class folder')])
def test_incomplete_class_folders_are_refused(tmp_path, damage, message):
    for split in ('train', 'val'): write_folders(tmp_path/split, ['cat', 'dog'])
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        for split in data.SPLITS: load(tmp_path, split, 4)

def test_folders_without_classes_or_without_training_images_are_refused(tmp_path):
    (tmp_path/'flat').mkdir()
    (tmp_path/'flat/1.png').write_bytes(grey(1))
    with pytest.raises(ValueError, match='must lie in class folders'): load(tmp_path/'flat')
    write_folders(tmp_path/'half/val', ['cat', 'dog'])
    with pytest.raises(ValueError, match="holds the split 'val' alone"): load(tmp_path/'half')
    (tmp_path/'nothing/train').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='no images, shards or Parquet files under'): load(tmp_path/'nothing')
    write_folders(tmp_path/'whole/train', ['cat', 'dog'], 5)
    assert (len(load(tmp_path/'whole', size=4)), len(load(tmp_path/'whole', 'validation', 4))) == (8, 2)

def test_archives_beside_what_was_unpacked_from_them_are_left_alone(tmp_path):
    for split in ('train', 'val'): write_folders(tmp_path/split, ['cat', 'dog'])
    write_tar(tmp_path/'ILSVRC2012_img_val.tar', ('ILSVRC2012_val_00000001.JPEG', grey(1, 'jpeg')))
    assert len(load(tmp_path, size=4)) == 2
    (tmp_path/'alone').mkdir()
    os.replace(tmp_path/'ILSVRC2012_img_val.tar', tmp_path/'alone/ILSVRC2012_img_val.tar')
    with pytest.raises(ValueError, match=r'ILSVRC2012_img_val\.tar: ILSVRC2012_val_00000001\.JPEG has no label'): load(tmp_path/'alone', 'validation')

# ImageNet

@pytest.fixture
def flat(tmp_path):
    "Class folders for training, three images in one folder for validation; their classes are 2, 0 and 1."
    wnids, root = imagenet()[0][:3], tmp_path/'ILSVRC/Data/CLS-LOC'
    write_folders(root/'train', wnids, suffix='JPEG')
    (root/'val').mkdir()
    (root/'test').mkdir()
    for i in (1, 2, 3): (root/f'val/ILSVRC2012_val_{i:08}.JPEG').write_bytes(grey(i, 'jpeg'))
    (root/'test/ILSVRC2012_test_00000001.JPEG').write_bytes(grey(99, 'jpeg'))
    return root, [wnids[2], wnids[0], wnids[1]]

def write_truth(kind, place, wnids):
    place.mkdir(exist_ok=True, parents=True)
    if kind == 'kaggle':
        lines = [f'ILSVRC2012_val_{i:08},{name} 111 108 4 5 ' for i, name in enumerate(wnids, 1)]
        (place/'LOC_val_solution.csv').write_text('ImageId,PredictionString\n' + '\n'.join(reversed(lines)) + '\n')
    if kind == 'tensorflow': (place/'imagenet_2012_validation_synset_labels.txt').write_text('\n'.join(wnids) + '\n')
    if kind == 'kit': # counts from 1, in an order of its own
        from scipy.io import savemat
        table = np.zeros(len(wnids), [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('words', 'O')])
        for i, name in enumerate(wnids): table[i] = (i+1, name, 'words')
        savemat(place/'meta.mat', dict(synsets=table))
        (place/'ILSVRC2012_validation_ground_truth.txt').write_text(''.join(f'{i+1}\n' for i in range(len(wnids))))

@pytest.mark.parametrize('kind, place', [('kaggle', ''), ('kaggle', '../..'), ('tensorflow', 'val'), ('tensorflow', ''), ('kit', 'val'),
                                         ('kit', 'ILSVRC2012_devkit_t12/data')])
def test_flat_validation_folder_with_its_ground_truth(flat, kind, place):
    root, wnids = flat
    write_truth(kind, root/place, wnids)
    held_out = load(root, 'validation')
    assert greys(held_out) == [1, 2, 3] and held_out.labels.tolist() == [2, 0, 1] and held_out.num_classes == 3
    assert load(root).labels.tolist() == [0, 1, 2]

def test_flat_validation_folder_without_ground_truth_says_what_to_do(flat):
    root, wnids = flat
    (root/'ILSVRC2012_validation_ground_truth.txt').write_text('490\n361\n171\n') # alone it says nothing
    with pytest.raises(ValueError, match='3 images of .*val lie in no class folders') as error: load(root, 'validation')
    for word in ('folders named as those of train', 'LOC_val_solution.csv', 'synset_labels.txt', 'ground_truth.txt and meta.mat', 'no labels'):
        assert word in str(error.value)

def test_ground_truth_of_other_images_is_refused(flat):
    root, wnids = flat
    write_truth('tensorflow', root, wnids[:2])
    with pytest.raises(ValueError, match=r'does not say the class of .*val_00000003\.JPEG'): load(root, 'validation')
    write_truth('tensorflow', root, [*wnids[:2], 'n99999999'])
    with pytest.raises(ValueError, match=r"val_00000003\.JPEG is of class 'n99999999', which train does not have"): load(root, 'validation')

@pytest.mark.parametrize('train', ['data/train-00000-of-00002.parquet', 'train/0000.parquet', 'default/train/0000.parquet', 'train.parquet'])
def test_layouts_of_the_hub(tmp_path, train):
    "The test split has the label -1 throughout."
    from datasets import Dataset, Features, ClassLabel, Image as Picture
    features = Features(image=Picture(), label=ClassLabel(names=['cat', 'dog']))
    def write(path, values, labels):
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(dict(image=[dict(bytes=grey(v), path=None) for v in values], label=labels), features).to_parquet(tmp_path/path)
    write(train, [1, 2, 3], [0, 1, 0])
    write(train.replace('train', 'test'), [200], [-1])
    with pytest.raises(ValueError, match=r'labels must be in \[0, 2\), got -1 in row 0; the labels of a test split are withheld'): load(tmp_path, 'validation')
    write(train.replace('train', 'validation'), [7, 8], [1, 1])
    assert greys(load(tmp_path)) == [1, 2, 3] and greys(load(tmp_path, 'validation')) == [7, 8]
    assert load(tmp_path, 'validation').labels.tolist() == [1, 1]

def test_the_order_of_imagenet_is_accepted():
    wnids, words, _ = imagenet()
    assert len(wnids) == 1000 and wnids == sorted(wnids) and words[0].startswith('tench')
    firsts = [name.split(',')[0] for name in words] # as torchvision lists them; some are said of two classes
    for names in (wnids, words, firsts, [name.upper().replace(' ', '_') for name in words], wnids[:100], sorted(words[:500]), words[::-1][:999],
                  [f'class {i}' for i in range(1000)]): check_classes(list(names), 'mine')

@pytest.mark.parametrize('form, message', [
    (lambda wnids, words: sorted(words), "class 0 is '.*', class 0 of ImageNet is n01440764"),
    (lambda wnids, words: sorted(name.split(',')[0].replace(' ', '_') for name in words), "class 0 is .* is its class"),
    (lambda wnids, words: [*wnids[:5], wnids[6], wnids[5], *wnids[7:]], "class 5 is 'n01498041', class 5 of ImageNet is n01496331 .* is its class 6"),
    (lambda wnids, words: [*words[:5], words[6], words[5], *words[7:]], "class 5 is 'stingray', class 5 of ImageNet is n01496331"),
    (lambda wnids, words: wnids[::-1], 'class 0 is .* is its class 999'),
    (lambda wnids, words: [*wnids[:7], *wnids[8:]], 'ImageNet has 1000 classes, got 999; n01514668 is missing')])
def test_another_order_of_imagenet_is_refused(form, message):
    with pytest.raises(ValueError, match='mine: ' + message): check_classes(form(*imagenet()[:2]), 'mine')

def test_class_folders_of_imagenet(tmp_path):
    "By WordNet ids they are read; by words, or incomplete, they are not."
    wnids, words, _ = imagenet()
    write_folders(tmp_path/'ids/train', wnids)
    for i, name in enumerate(words): (tmp_path/'words'/f"{name.split(',')[0].replace('/', ' ')} {'of a kind' if i in (517, 639) else ''}".strip()).mkdir(parents=True)
    for folder in (tmp_path/'words').iterdir(): (folder/'0.png').write_bytes(grey(0))
    assert len(list((tmp_path/'words').iterdir())) == 1000
    images = load(tmp_path/'ids', size=4)
    assert images.num_classes == 1000 and all(images.labels[i] == wnids.index(Path(images.rows.path_of(i)).parent.name) for i in range(0, 800, 9))
    with pytest.raises(ValueError, match='words: class .* of ImageNet is n0.* name the folders by them'): load(tmp_path/'words', size=4)
    os.remove(tmp_path/'ids/train'/wnids[3]/'0.png')
    os.rmdir(tmp_path/'ids/train'/wnids[3])
    with pytest.raises(ValueError, match=f'got 999; {wnids[3]} is missing'): load(tmp_path/'ids', size=4)

def test_names_of_a_parquet_column_in_another_order_are_refused(tmp_path):
    from datasets import Dataset, Features, ClassLabel, Image as Picture
    words = [f'{name} {i}' if i in (134, 517, 638, 639) else name for i, name in enumerate(imagenet()[1])] # names must differ
    for names, fits in ((words, True), (sorted(words), False)):
        features = Features(image=Picture(), label=ClassLabel(names=names))
        rows = dict(image=[dict(bytes=grey(v), path=None) for v in range(5)], label=[0, 1, 2, 3, 999])
        Dataset.from_dict(rows, features).to_parquet(tmp_path/'set.parquet')
        if fits: assert load(tmp_path/'set.parquet').num_classes == 1000
        else:
            with pytest.raises(ValueError, match='class 0 is .*, class 0 of ImageNet is n01440764'): load(tmp_path/'set.parquet')

def test_labels_of_shards_against_the_names_of_their_members(tmp_path):
    "`n01440764_10026.jpg` says the class, too; in a set of fewer classes it has another number."
    wnids = imagenet()[0]
    def write(labels, path):
        return write_tar(path, *(member for name, label in zip(wnids, labels) for member in
                                 ((f'{name}_1.png', grey(label % 256, size=(4, 4))), (f'{name}_1.cls', b'%d' % label))))
    assert len(load(write(range(1000), tmp_path/'right.tar'), size=4)) == 800
    with pytest.raises(ValueError, match=r'wrong\.tar:n01440764_1\.png has label 1, but class 1 of ImageNet is n01443537'):
        load(write([1, 0, *range(2, 1000)], tmp_path/'wrong.tar'), size=4)
    assert load(write([4, 3, 2, 1, 0], tmp_path/'few.tar'), size=4).num_classes == 5
