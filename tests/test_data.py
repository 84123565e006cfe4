"Sources, crops, batches and token stores: independent references, damage, kills, other people's files."
import collections, os, shutil, signal, subprocess, sys, threading, warnings, zlib
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from scipy.stats import binom
from tokpost.data import (LatentStore, Images, TokenStore, draw_rows, eval_batches, image_batches, load_images,
                          coda_crop, make_token_store, square_crop, ten_crops, to_images, to_pixels, token_batches)

def within_binomial_bounds(count, n, p):
    return binom.ppf(5e-7, n, p) <= count <= binom.isf(5e-7, n, p)

def noise(size, seed=0): # width, height
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))

def ramps(width, height):
    "Red rises from left to right, green from top to bottom."
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0*x], -1).round().astype(np.uint8))

def grey(value, size=(12, 10)): return Image.new('L', size, value)

def images_of(pictures, image_size=8, name='pictures', **options):
    "An image source in memory."
    rows = [dict(bytes=None, path=f'{i}.png', array=np.asarray(x)) for i, x in enumerate(pictures)]
    return Images(rows, np.arange(len(rows)), len(rows), image_size, name, **options)

def greys_in(images): return to_pixels(images)[:, 0, 0, 0].tolist()

def splits(source, image_size=8):
    return [load_images(str(source), split, image_size) for split in ('train', 'validation')]

def labels_by(images, rule): return images.labels.tolist() == [rule(value) for value in greys_in(images[:])]

def interleaved(stack, parts, k):
    "Entry k of the processes' batches, in the order of one process."
    joined = stack([part[k] for part in parts], 1)
    return joined.reshape(-1, *joined.shape[2:])

def take(batches, count): return [batch for batch, _ in zip(batches, range(count))]

@pytest.fixture(autouse=True)
def nothing_kept(tmp_path_factory, monkeypatch):
    "`datasets` neither keeps what it read in this session nor asks the hub."
    import datasets, huggingface_hub
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, 'HF_HUB_OFFLINE', True)

@pytest.fixture
def class_folders(tmp_path):
    "A function that makes folders of images; the grey level of image i of class c is 40c+i."
    def make(root, *classes, count=5):
        for c, name in enumerate(classes):
            (tmp_path/root/name).mkdir(parents=True)
            for i in range(count): grey(40*c+i).save(tmp_path/root/name/f'{i}.png')
        return tmp_path/root
    return make

# Crops

@pytest.mark.parametrize('size, side', [((64, 64), 16), ((128, 32), 16), ((48, 160), 12)])
def test_halving_is_the_mean_of_blocks(size, side):
    "A power of two above the size needs no other scaling; each halving rounds once."
    picture, n = noise(size), min(size)//side
    means = np.asarray(picture, float).reshape(size[1]//n, n, size[0]//n, n, 3).mean((1, 3))
    top, left = ((x-side)//2 for x in means.shape[:2])
    assert np.abs(square_crop(picture, side) - means[top:top+side, left:left+side]).max() <= 2

@pytest.mark.parametrize('size', [(20, 30), (31, 24), (25, 25), (16, 28), (16, 16), (9, 12)])
def test_scaling_equals_torchvision(size):
    from torchvision.transforms import v2
    picture = noise(size)
    w, h = (max(16, round(16*x/min(size))) for x in size)
    resized = v2.functional.resize(picture, (h, w), v2.InterpolationMode.BICUBIC)
    expected = v2.functional.crop(resized, (h-16)//2, (w-16)//2, 16, 16)
    assert np.array_equal(square_crop(picture, 16), np.asarray(expected))

@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGBA', 'CMYK', 'LA', 'I;16'])
def test_every_mode_becomes_rgb(mode):
    crop = square_crop(Image.new(mode, (20, 30)), 8)
    assert crop.shape == (8, 8, 3) and crop.dtype == np.uint8

def test_random_crops_have_no_preferred_place_or_scale():
    rng, picture = np.random.default_rng(0), ramps(192, 128)
    crops = np.stack([square_crop(picture, 32, rng) for _ in range(600)]).astype(float)
    centres = crops[..., :2].mean((1, 2))                                    # (600, 2)
    assert (np.abs(centres.mean(0) - 127.5) < 5*centres.std(0)/600**.5).all()
    assert (crops[:, 0, 0, :2].min(0) < 3).all() and (crops[:, -1, -1, :2].max(0) > 252).all() # the edges
    share = (crops[:, -1, 0, 1] - crops[:, 0, 0, 1])/255*32/31               # of the shorter side
    sides = 32/share
    assert .99*32 < sides.min() < 33 and 39 < sides.max() < 1.02*40
    counts = np.bincount(sides.round().astype(int), minlength=42)[32:41]
    assert all(within_binomial_bounds(count, 600, 1/9) for count in counts)
    centre = square_crop(picture, 32).astype(int)
    assert np.abs(centre[..., 0] + centre[:, ::-1, 0] - 255).max() <= 2

@pytest.mark.parametrize('size', [(60, 45), (33, 47), (32, 32), (24, 40), (130, 100)])
def test_random_crops_are_those_of_pillow_but_for_single_levels(size):
    "Torch scales with weights of 16 bits; a photograph is smooth, noise is the worst there is."
    from sklearn.datasets import load_sample_image
    photo = Image.fromarray(load_sample_image('flower.jpg')).resize(size)
    for picture, share, largest in (photo, .02, 2), (noise(size), .05, 3):
        for seed in range(5):
            side = np.random.default_rng(seed).integers(32, 41)
            draws, image = np.random.default_rng(seed), picture
            draws.integers(32, 41)
            while min(image.size) >= 2*side: image = image.resize([x//2 for x in image.size], Image.Resampling.BOX)
            w, h = (max(side, round(side/min(image.size)*x)) for x in image.size)
            left, top = draws.integers(w-32+1), draws.integers(h-32+1)
            theirs = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left+32, top+32))
            ours = square_crop(picture, 32, np.random.default_rng(seed)).astype(int)
            levels = np.abs(ours - np.asarray(theirs))
            assert levels.max() <= largest and (levels > 0).mean() <= share

@pytest.mark.parametrize('size, side', [((500, 375), 256), ((300, 420), 256), ((600, 700), 256), ((40, 31), 32), ((30, 30), 32), ((29, 45), 21)])
def test_ten_crops_are_torchvisions_of_the_centre_crop(size, side):
    from torchvision.transforms import v2
    picture = noise(size)
    square = Image.fromarray(square_crop(picture, int(1.1*side)))
    assert np.array_equal(ten_crops(picture, side), np.stack([np.asarray(crop) for crop in v2.TenCrop(side)(square)]))

@pytest.mark.parametrize('size, side', [((500, 375), 256), ((300, 420), 256), ((600, 700), 256), ((40, 31), 32), ((30, 30), 32)])
def test_codas_crops_are_parts_of_torchvisions_scaling(size, side):
    from torchvision.transforms import v2
    picture, places = noise(size), set()
    whole = np.asarray(v2.Resize(round(1.125*side), v2.InterpolationMode.LANCZOS)(picture))
    for seed in range(12):
        draws = np.random.default_rng(seed)
        left, top = draws.integers(whole.shape[1]-side+1), draws.integers(whole.shape[0]-side+1)
        assert np.array_equal(coda_crop(picture, side, np.random.default_rng(seed)), whole[top:top+side, left:left+side])
        places.add((int(left), int(top)))
    assert len(places) > 6

def test_bytes_survive_the_way_there_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_pixels(to_images(levels)), levels)
    assert to_pixels(torch.tensor([-9., -1., 0., 1., 9.])).tolist() == [0, 0, 128, 255, 255]

# Sources

def write_parquet(path, values, labels, columns=('image', 'label')):
    import datasets
    kinds = datasets.Image(), datasets.ClassLabel(names=['cat', 'dog', 'owl'])
    features = datasets.Features(dict(zip(columns, kinds)))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {columns[0]: [grey(value) for value in values], columns[1]: labels}
    datasets.Dataset.from_dict(rows, features).to_parquet(path)

@pytest.mark.parametrize('columns', [('image', 'label'), ('img', 'fine_label')])
def test_parquet_folder_with_splits(tmp_path, columns):
    "As the hub keeps them; the labels of a test split are often withheld."
    write = lambda name, *rows: write_parquet(tmp_path/f'data/{name}-00000-of-00001.parquet', *rows, columns)
    write('train', range(9), [0, 1, 2]*3)
    write('validation', [100, 101], [2, 0])
    write('test', [200], [-1])
    train, validation = splits(tmp_path)
    assert greys_in(train[:]) == list(range(9)) and train.labels.tolist() == [0, 1, 2]*3
    assert greys_in(validation[:]) == [100, 101] and validation.labels.tolist() == [2, 0]
    assert train.num_classes == validation.num_classes == 3
    assert train[[4, 2]].shape == (2, 3, 8, 8) and train.fingerprint != validation.fingerprint

@pytest.mark.parametrize('validation', ['val', 'valid', 'test'])
def test_parquet_files_by_other_names_of_validation(tmp_path, validation):
    write_parquet(tmp_path/'train.parquet', [1, 2], [0, 1])
    write_parquet(tmp_path/f'{validation}.parquet', [3], [2])
    assert [greys_in(images[:]) for images in splits(tmp_path)] == [[1, 2], [3]]

def test_source_without_validation_lends_a_fifth(tmp_path):
    write_parquet(tmp_path/'all.parquet', range(40), [i % 3 for i in range(40)])
    train, validation = splits(tmp_path/'all.parquet')
    assert (len(train), len(validation)) == (32, 8)
    assert sorted(greys_in(train[:]) + greys_in(validation[:])) == list(range(40))
    assert labels_by(train, lambda value: value % 3) and labels_by(validation, lambda value: value % 3)
    assert greys_in(splits(tmp_path/'all.parquet')[1][:]) == greys_in(validation[:])

@pytest.mark.parametrize('validation', ['val', 'validation', 'test'])
def test_class_folders_with_splits(class_folders, tmp_path, validation):
    class_folders('set/train', 'cat', 'dog')
    class_folders(f'set/{validation}', 'cat', 'dog', count=2)
    (tmp_path/'set/train/cat/notes.txt').write_text('not an image')
    train, held_out = splits(tmp_path/'set')
    assert sorted(greys_in(train[:])) == [0, 1, 2, 3, 4, 40, 41, 42, 43, 44]
    assert sorted(greys_in(held_out[:])) == [0, 1, 40, 41]
    assert labels_by(train, lambda value: value//40) and labels_by(held_out, lambda value: value//40)

@pytest.mark.parametrize('classes', [('cat', 'dog', 'owl'), ('bullet_train', 'crash test', 'owl')])
def test_class_folders_without_splits(class_folders, monkeypatch, classes):
    "Found under $TOKPOST_DATA; classes may be called what they like."
    monkeypatch.setenv('TOKPOST_DATA', str(class_folders('set', *classes).parent))
    train, validation = splits('set')
    assert (len(train), len(validation), train.num_classes) == (12, 3, 3)
    assert labels_by(train, lambda value: value//40) and labels_by(validation, lambda value: value//40)

@pytest.mark.parametrize('source', ['/no/such/folder', 'nobody/nothing'])
def test_missing_source_says_what_a_source_is(source):
    with pytest.raises(FileNotFoundError) as error: load_images(source)
    for word in (source, 'digits', 'Parquet', 'class folders', '$TOKPOST_DATA', 'Hugging Face', 'network'):
        assert word in str(error.value)

def test_bad_arguments(tmp_path):
    import datasets
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'validation'\], got 'dev'"):
        load_images('digits', 'dev')
    with pytest.raises(ValueError, match='image_size must be at least 4, got 3'): load_images(image_size=3)
    datasets.Dataset.from_dict(dict(text=['a'])).to_parquet(tmp_path/'train.parquet')
    with pytest.raises(ValueError, match="no column 'image', only .*text"): splits(tmp_path/'train.parquet')

def test_too_few_images_for_a_split_are_an_error(class_folders):
    with pytest.raises(ValueError, match='no image'): splits(class_folders('set', 'cat', 'dog', count=2))

def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits
    train, validation = splits('digits')
    found = {image.numpy().tobytes(): int(label) for images in (train, validation)
             for image, label in zip(to_pixels(images[:])[:, 0], images.labels)}
    scans = load_digits()
    expected = {(scan*255/16).round().astype(np.uint8).tobytes(): int(label)
                for scan, label in zip(scans.images, scans.target)}
    assert len(train) + len(validation) == 1797 and found == expected
    assert not train.flips and not train.crops

# Damage

def damaged(folder, *names):
    "Truncated, emptied or overwritten."
    for i, name in enumerate(names):
        data = (folder/name).read_bytes()
        (folder/name).write_bytes([data[:len(data)//2], b'', b'not an image'][i % 3])

@pytest.mark.filterwarnings('ignore:.*passed over')
@pytest.mark.parametrize('memory', [2**30, 0])
def test_unreadable_images_are_named_and_passed_over(class_folders, tmp_path, memory):
    "Also the first; and the others keep their labels, also where they are read again for a random crop."
    for split in ('train', 'val'): class_folders(f'set/{split}', 'cat', 'dog')
    damaged(tmp_path/'set', 'train/cat/0.png', 'train/cat/2.png', 'train/dog/4.png')
    with pytest.warns(UserWarning, match=r'set: passed over .*cat/0\.png'):
        images = load_images(str(tmp_path/'set'), 'train', 8, memory)
        seen = [(grey, label) for batch, labels in take(image_batches(images, 10, augment=True, workers=0), 4)
                for grey, label in zip(greys_in(batch), labels.tolist())]
    assert all((grey >= 40) == label for grey, label in seen)
    assert set(seen) == {(1, 0), (3, 0), (4, 0), (40, 1), (41, 1), (42, 1), (43, 1)}
    named = {'/'.join(Path(p).parts[-2:]) for p in images.passed_over}
    assert named == {'cat/0.png', 'cat/2.png', 'dog/4.png'}
    assert len(images) == (7 if memory else 10)

def test_a_picture_of_absurd_size_is_unreadable(class_folders):
    "A damaged header may announce more pixels than PIL agrees to decode."
    for split in ('train', 'val'): folder = class_folders(f'set/{split}', 'cat', 'dog')
    path = folder.parent/'train/dog/1.png'
    data = bytearray(path.read_bytes())
    data[16:24] = (2**16).to_bytes(4, 'big')*2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    path.write_bytes(data)
    with pytest.warns(UserWarning, match='1.png'): assert len(splits(folder.parent)[0]) == 9

def test_too_many_unreadable_images_are_an_error():
    kinds = dict(array=np.zeros((9, 9), np.uint8)), dict(bytes=b'damaged')
    rows = [dict(kinds[i % 2], path=f'{i}.png') for i in range(30)]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='set: 11 images .* the limit is 10'):
        Images(rows, np.zeros(30, int), 1, 8, 'set')
    with pytest.warns(UserWarning): images = Images(rows, np.zeros(30, int), 1, 8, 'set', unreadable=.5)
    assert len(images) == 15

# Batches

@pytest.mark.parametrize('count, batch_size', [(10, 5), (10, 4), (7, 3), (3, 8), (1, 1)])
def test_every_row_once_per_epoch(count, batch_size):
    rows = np.concatenate([rows for _, _, rows in take(draw_rows(count, batch_size, seed=1), 3*count)])
    epochs = rows[:len(rows)//count*count].reshape(-1, count)
    assert (np.sort(epochs) == np.arange(count)).all()
    if count == 10: assert len({epoch.tobytes() for epoch in epochs}) > 1

def test_order_is_uniform():
    "Every row comes first equally often."
    firsts = collections.Counter(int(next(draw_rows(5, 1, seed))[2][0]) for seed in range(1000))
    assert all(within_binomial_bounds(firsts[row], 1000, 1/5) for row in range(5))

@pytest.mark.parametrize('world', [1, 2, 4])
@pytest.mark.parametrize('start', [0, 5])
def test_shards_join_to_the_batch_of_one(world, start):
    whole = take(draw_rows(23, 8, seed=3), 12)
    shards = [take(draw_rows(23, 8, 3, start, rank, world), 7) for rank in range(world)]
    for step, parts in enumerate(zip(*shards), start):
        for k in (1, 2): assert np.array_equal(interleaved(np.stack, parts, k), whole[step][k])
        assert {part[0] for part in parts} == {step}

def test_draws_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match='multiple of the 3 processes, got 8'):
        next(draw_rows(9, 8, 0, world=3))
    with pytest.raises(ValueError, match='no rows'): next(draw_rows(0, 8, 0))

@pytest.fixture(scope='module')
def natural():
    "Images larger than the size, of several forms."
    sizes = (20, 14), (12, 12), (9, 30), (40, 26), (17, 17), (13, 21)
    return images_of([noise(size, i) for i, size in enumerate(sizes)])

@pytest.mark.parametrize('world', [2, 4])
def test_augmented_shards_join_to_the_batch_of_one(natural, world):
    "Crops and mirrors belong to the image's place in the run, not to the process."
    options = dict(batch_size=4, seed=5, augment=True, workers=0)
    whole = take(image_batches(natural, start=2, **options), 3)
    shards = [take(image_batches(natural, start=2, rank=rank, world=world, **options), 3)
              for rank in range(world)]
    for step, parts in enumerate(zip(*shards)):
        for k in (0, 1): assert torch.equal(interleaved(torch.stack, parts, k), whole[step][k])

def test_batches_are_a_function_of_seed_and_step(natural):
    options = dict(batch_size=4, augment=True, workers=0)
    torch.manual_seed(0)
    whole = take(image_batches(natural, seed=5, **options), 6)
    torch.manual_seed(1)
    for step in (1, 4):
        again = next(image_batches(natural, seed=5, start=step, **options))
        for a, b in zip(again, whole[step]): assert torch.equal(a, b)
    assert not torch.equal(next(image_batches(natural, seed=6, **options))[0], whole[0][0])

def test_random_crops_do_not_depend_on_workers(natural):
    streams = [take(image_batches(natural, 4, seed=5, augment=True, workers=workers), 5)
               for workers in (0, 2)]
    for one, two in zip(*streams): assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])

def test_an_image_is_cropped_anew_in_every_epoch():
    batches = take(image_batches(images_of([noise((40, 26))]), 1, seed=5, augment=True, workers=0), 40)
    assert len({batch.numpy().tobytes() for batch, _ in batches}) > 20

@pytest.mark.parametrize('workers', [0, 1])
def test_batches_leave_the_global_generator_alone(natural, workers):
    "Else the first step after a resume draws other dropout than the same step of an undisturbed run."
    before = torch.manual_seed(0).get_state()
    take(image_batches(natural, 4, augment=True, workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before)

@pytest.mark.parametrize('name', ['digits', 'mnist', 'pictures'])
def test_digits_are_never_mirrored_and_others_half_of_the_time(name):
    "Left halves are dark; images as large as the size are not cropped."
    half = np.repeat([[0]*4 + [255]*4], 8, 0).astype(np.uint8)
    images = images_of([half]*8, name=name)
    batch = torch.cat([batch for batch, _ in take(image_batches(images, 8, seed=2, augment=True), 250)])
    mirrored = (batch[:, 0, 0, 0] > 0).sum().item()
    assert torch.equal(batch[:, :, :, :4], -batch[:, :, :, 4:])
    assert within_binomial_bounds(mirrored, 2000, .5) if name == 'pictures' else mirrored == 0
    plain = torch.cat([batch for batch, _ in take(image_batches(images, 8, seed=2), 20)])
    assert (plain[:, 0, 0, 0] < 0).all()

def test_reading_from_disk_equals_memory(natural):
    disk = Images(natural.rows, natural.labels, 6, 8, 'pictures', memory=0)
    assert disk.pixels is None and natural.pixels is not None and disk.fingerprint == natural.fingerprint
    for rows in (slice(None), slice(1, 5, 2), [3, 0, 3], np.array([5]), torch.tensor([2, 2]), range(3)):
        assert torch.equal(disk[rows], natural[rows])
    for batches in (lambda x: take(image_batches(x, 4, seed=1, workers=0), 4),
                    lambda x: list(eval_batches(x, 4)),
                    lambda x: take(image_batches(x, 4, seed=1, augment=True, workers=0), 4)):
        for a, b in zip(batches(disk), batches(natural), strict=True): assert all(map(torch.equal, a, b))
    assert -1 <= natural[:].min() < -.8 and .8 < natural[:].max() <= 1 and natural[:].dtype == torch.float32

@pytest.mark.parametrize('workers', [0, 2])
def test_codas_batches_are_cropped_and_never_mirrored(workers):
    "Red rises to the right in every crop; each is the part of the scaled picture that seed and place say."
    images = images_of([ramps(40, 26), ramps(19, 30), ramps(21, 20)])
    drawn = take(draw_rows(3, 4, 5, start=1), 8)
    for (step, places, rows), (batch, labels) in zip(drawn, image_batches(images, 4, 5, start=1, augment='crop', workers=workers)):
        assert (batch[:, 0, :, -1] > batch[:, 0, :, 0]).all() and labels.tolist() == rows.tolist()
        for place, row, image in zip(places, rows, to_pixels(batch)):
            picture = Image.fromarray(images.rows[row]['array'])
            expected = coda_crop(picture, 8, np.random.default_rng((5, 1, place)))
            assert np.array_equal(image.permute(1, 2, 0), expected)
    mirrored = take(image_batches(images, 4, 5, augment=True, workers=0), 8)
    assert any((batch[:, 0, :, -1] < batch[:, 0, :, 0]).any() for batch, _ in mirrored)

@pytest.mark.parametrize('memory', [2**30, 0])
def test_codas_batches_of_files_of_the_size_are_whole(memory):
    images = images_of([noise((8, 8), i) for i in range(4)], memory=memory)
    (_, _, rows), (batch, _) = next(draw_rows(4, 4, 5)), next(image_batches(images, 4, 5, augment='crop', workers=0))
    assert torch.equal(batch, images[rows])

def test_unknown_augmentation_is_refused(natural):
    with pytest.raises(ValueError, match="augment must be False, True or 'crop', got 'mirror'"): next(image_batches(natural, 4, augment='mirror'))

def test_conversion_leaves_bytes_and_floats_alone():
    for pixels in torch.arange(256, dtype=torch.uint8), torch.arange(256.):
        before = pixels.clone()
        assert torch.equal(to_images(pixels), before.float()/127.5 - 1) and torch.equal(pixels, before)

@pytest.mark.parametrize('memory', [2**30, 0])
@pytest.mark.parametrize('cores', [1, 3])
def test_crops_of_an_image(natural, monkeypatch, memory, cores):
    "By one thread or several, from files or memory; every image is decoded once."
    monkeypatch.setattr('tokpost.data._cores', lambda: cores)
    images = Images(natural.rows, natural.labels, 6, 8, 'pictures', memory=memory)
    decoded, decode = [], images._decode_raw
    monkeypatch.setattr(images, '_decode_raw', lambda i: decoded.append(i) or decode(i))
    rows = [4, 0, 5, 4]
    assert torch.equal(images.crops_of(rows), images[rows][:, None])
    assert torch.equal(images.crops_of(rows, 2), torch.stack([images[rows], images[rows].flip(-1)], 1))
    decoded.clear()
    ten = images.crops_of(rows, 10)
    assert ten.shape == (4, 10, 3, 8, 8) and ten.dtype == torch.float32 and sorted(decoded) == [0, 4, 4, 5]
    expected = ten_crops(Image.fromarray(natural.rows[5]['array']), 8)
    assert np.array_equal(to_pixels(ten[2]).permute(0, 2, 3, 1), expected)
    assert torch.equal(images.crops_of(slice(1, 6, 2), 10), images.crops_of([1, 3, 5], 10))

def test_crops_that_cannot_be_are_refused(natural):
    for crops in (0, 5, 11):
        with pytest.raises(ValueError, match=f'crops must be 1, 2 or 10, got {crops}'): natural.crops_of([0], crops)
    digits = images_of([noise((20, 14))], name='mnist')
    assert digits.crops_of([0]).shape == (1, 1, 3, 8, 8)
    for crops in (2, 10):
        with pytest.raises(ValueError, match=f"crops must be 1 for 'mnist', whose images are never mirrored, got {crops}"): digits.crops_of([0], crops)

@pytest.mark.filterwarnings('ignore:.*passed over')
def test_ten_crops_of_an_unreadable_image_are_those_of_the_next_of_its_class(natural):
    rows = [dict(bytes=b'damaged', path='0.png'), *natural.rows[1:]]
    images = Images(rows, np.array([0, 1, 2, 0, 1, 0]), 3, 8, 'pictures', memory=0)
    assert torch.equal(images.crops_of([0, 1], 10), natural.crops_of([3, 1], 10))

def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    "Not by those of other machines; at least one is left."
    from tokpost.data import _cores
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(12)), raising=False)
    for processes, cores in ((None, 12), ('1', 12), ('4', 3), ('8', 1), ('24', 1)):
        if processes: monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
        else: monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
        assert _cores() == cores

@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('count', [None, 5, 4])
def test_one_ordered_pass(natural, world, count):
    parts = [list(eval_batches(natural, 2, count, rank, world)) for rank in range(world)]
    order = [parts[i % world][i//world] for i in range(sum(map(len, parts)))]
    assert torch.equal(torch.cat([images for images, _ in order]), natural[:count or 6])
    assert torch.cat([labels for _, labels in order]).tolist() == list(range(count or 6))

# Token stores

def tokens(rows): return torch.as_tensor(rows)[:, None]*7 % 50 + torch.arange(3)

PLAN = dict(labels=torch.arange(20) % 4, num_tokens=3, codebook_size=64, batch_size=3,
            made_by=dict(tokenizer='a', images='b'))

def killed_store(folder):
    "Dies while the fifth batch is made."
    def make(rows):
        if rows[0] == 12: os.kill(os.getpid(), signal.SIGKILL)
        return tokens(rows)
    make_token_store(folder, make, **PLAN)

def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}

def test_killed_store_is_completed_with_the_same_bytes(tmp_path):
    environ = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, __file__, tmp_path/'store'], env=environ)
    assert done.returncode == -signal.SIGKILL and not (tmp_path/'store').exists()
    with pytest.raises(FileNotFoundError, match='no token store at'): TokenStore(tmp_path/'store')
    made = []
    store = make_token_store(tmp_path/'store', lambda rows: made.append(int(rows[0])) or tokens(rows), **PLAN)
    assert made == [12, 15, 18]
    make_token_store(tmp_path/'whole', tokens, **PLAN)
    assert contents(tmp_path/'store') == contents(tmp_path/'whole')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['store', 'whole']
    assert torch.equal(store[:], tokens(np.arange(20))) and torch.equal(store.labels, PLAN['labels'])
    assert store.sources.tolist() == list(range(20)) and store[[3, 1]].dtype == torch.long

def test_latents_and_tokens_are_told_apart(tmp_path):
    make_token_store(tmp_path/'store', tokens, **PLAN)
    with pytest.raises(ValueError, match='must be a latent store, got one of tokens'): LatentStore(tmp_path/'store')
    with pytest.raises(ValueError, match='codes, this run needs'): make_token_store(tmp_path/'store', tokens, **PLAN | dict(codebook_size=2**17))

def test_another_run_that_finishes_the_same_store_first_does_no_harm(tmp_path):
    def make(rows):
        if rows[0] == 18: make_token_store(tmp_path/'store', tokens, **PLAN) # the other run, in the middle of this one
        return tokens(rows)
    store = make_token_store(tmp_path/'store', make, **PLAN)
    assert torch.equal(store[:], tokens(np.arange(20))) and [p.name for p in tmp_path.iterdir()] == ['store']

def test_complete_store_is_not_made_again(tmp_path):
    make_token_store(tmp_path/'store', tokens, **PLAN, sources=torch.arange(20)*2)
    again = make_token_store(tmp_path/'store', None, **PLAN)
    assert torch.equal(again[:], tokens(np.arange(20))) and again.sources.tolist() == list(range(0, 40, 2))

def test_two_processes_make_the_store_of_one(tmp_path):
    barrier, made, errors = threading.Barrier(2, timeout=30), [[], []], []
    def process(rank):
        make = lambda rows: made[rank].append(int(rows[0])) or tokens(rows)
        try: make_token_store(tmp_path/'two', make, **PLAN, rank=rank, world=2, wait=barrier.wait)
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    make_token_store(tmp_path/'one', tokens, **PLAN)
    assert errors == [] and made == [[0, 6, 12, 18], [3, 9, 15]]
    assert contents(tmp_path/'two') == contents(tmp_path/'one')

@pytest.mark.parametrize('codebook_size, dtype', [(64, np.uint16), (2**16, np.uint16),
                                                  (2**16+1, np.uint32), (2**18, np.uint32)])
def test_bytes_per_token(tmp_path, codebook_size, dtype):
    largest = lambda rows: torch.full((len(rows), 3), codebook_size-1)
    store = make_token_store(tmp_path/'store', largest, **PLAN | dict(codebook_size=codebook_size))
    assert store.indices.dtype == dtype and (store[:] == codebook_size-1).all()

@pytest.mark.parametrize('wrong', [lambda rows: tokens(rows) - 50, lambda rows: tokens(rows) + 64,
                                   lambda rows: tokens(rows)[:, :2], lambda rows: tokens(rows)[1:]],
                         ids=['negative', 'too large', 'too few', 'too short'])
def test_wrong_tokens_leave_no_store(tmp_path, wrong):
    with pytest.raises(ValueError, match=r'indices must be \(3, 3\) in \[0, 64\), got'):
        make_token_store(tmp_path/'store', lambda rows: (wrong if rows[0] else tokens)(rows), **PLAN)
    assert not (tmp_path/'store').exists()
    assert torch.equal(make_token_store(tmp_path/'store', tokens, **PLAN)[:], tokens(np.arange(20)))

@pytest.mark.parametrize('made_by', [dict(tokenizer='c', images='b'),
                                     dict(tokenizer='a', images='b', more=1)])
def test_store_of_another_tokenizer_is_refused(tmp_path, made_by):
    make_token_store(tmp_path/'store', tokens, **PLAN)
    before = contents(tmp_path/'store')
    for opening in (lambda: TokenStore(tmp_path/'store', made_by),
                    lambda: make_token_store(tmp_path/'store', tokens, **PLAN | dict(made_by=made_by))):
        with pytest.raises(ValueError, match='made by another (tokenizer|more) .*delete it'): opening()
    assert contents(tmp_path/'store') == before
    assert len(TokenStore(tmp_path/'store', dict(tokenizer='a'))) == 20

def unfinished(folder, **changes):
    def make(rows):
        if rows[0] > 9: raise KeyboardInterrupt
        return tokens(rows)
    with pytest.raises(KeyboardInterrupt): make_token_store(folder, make, **PLAN | changes)

@pytest.mark.parametrize('change', [dict(made_by=dict(tokenizer='c', images='b')), dict(batch_size=4),
                                    dict(labels=torch.zeros(26, dtype=torch.long)),
                                    dict(codebook_size=2**17)], ids=lambda change: list(change)[0])
def test_what_another_run_left_is_not_continued(tmp_path, change):
    unfinished(tmp_path/'store')
    other = lambda rows: tokens(rows) + 1
    store = make_token_store(tmp_path/'store', other, **PLAN | change)
    assert torch.equal(store[:], other(np.arange(len(store.labels))))
    assert torch.equal(store.labels, (PLAN | change)['labels'])

def test_store_of_another_length_is_refused(tmp_path):
    make_token_store(tmp_path/'store', tokens, **PLAN)
    with pytest.raises(ValueError, match='delete it or name another'):
        make_token_store(tmp_path/'store', tokens, **PLAN | dict(labels=torch.zeros(26, dtype=torch.long)))

def test_full_disk_is_noticed_before_the_first_token(tmp_path, monkeypatch):
    usage = collections.namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(1000, 881, 119))
    made = []
    with pytest.raises(OSError, match=r'store.* needs 120 bytes, the disk has 119 left'):
        make_token_store(tmp_path/'store', lambda rows: made.append(rows) or tokens(rows), **PLAN)
    assert made == [] and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(1000, 880, 120))
    assert len(make_token_store(tmp_path/'store', tokens, **PLAN)) == 20

@pytest.mark.parametrize('world', [1, 2])
def test_token_batches_are_rows_of_the_store(tmp_path, world):
    store = make_token_store(tmp_path/'store', tokens, **PLAN)
    for rank in range(world):
        drawn = take(draw_rows(20, 6, 9, 4, rank, world), 5)
        for (_, _, rows), (indices, labels) in zip(drawn, token_batches(store, 6, 9, 4, rank, world)):
            assert torch.equal(indices, tokens(rows)) and torch.equal(labels, PLAN['labels'][rows])

if __name__ == '__main__': killed_store(Path(sys.argv[1]))
