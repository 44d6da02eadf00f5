"""Streamed batches equal those of a resident split bit for bit; faults are reported and never block."""

import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cv2
import jax
import numpy as np
import pytest

from configs import segformer
from segjax.data import pipeline, specs
from segjax.data.augment import augment, step_keys
from segjax.data.crops import Crops, draw_crops, window_size, with_origins
from segjax.data.pipeline import StreamBatches, TrainBatches, evaluation_batches
from segjax.data.records import CachedRecords, JoinedRecords, RecordError, SplitRecords, load
from segjax.inference.evaluation import evaluate
from segjax.runtime.parallel import JitParallel, parallel_for
from segjax.train import setup
from segjax.train.schema import default_config

pytestmark = pytest.mark.usefixtures("newer_emitters")

SPEC = specs.DatasetSpec("noise", tuple("abcde"), ((0, 0, 0),) * 5, 255)
SIZES = ((90, 70), (61, 133), (44, 40), (90, 133), (20, 33), (75, 75), (90, 70))
PATIENCE = 30  # seconds after which something hangs


def stripes(rng, size):
    """A label (h, w) of noise in rectangles: most are mainly of class 0, and a few pixels are ignored."""
    rows, columns = (np.arange(side) // 8 for side in size)
    blocks = rng.choice(5, (rows[-1] + 1, columns[-1] + 1), p=(0.6, 0.1, 0.1, 0.1, 0.1))
    label = blocks[rows][:, columns].astype(np.uint8)
    label[rng.random(size) < 0.05] = SPEC.ignore_label
    return label


class Noise:
    """Records in memory that count how often each was read; those in `broken` raise, or are, what stands there."""

    def __init__(self, sizes=SIZES, seed=0, broken=None, seconds=0.0):
        rng = np.random.default_rng(seed)
        self.sizes = np.array(sizes, np.int32)
        self.names = tuple(f"image{i}.png" for i in range(len(sizes)))
        self.pairs = [(rng.integers(0, 256, (*size, 3), dtype=np.uint8), stripes(rng, size)) for size in sizes]
        self.broken, self.seconds = broken or {}, seconds
        self.reads, self.lock = np.zeros(len(sizes), int), threading.Lock()

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, number):
        with self.lock:
            self.reads[number] += 1
        time.sleep(self.seconds)
        if isinstance(fault := self.broken.get(number), BaseException):
            raise fault
        return fault or self.pairs[number]


def settings_of(**changes):
    settings = default_config("folder").augment
    settings.update(dict(crop=(32, 40)) | changes)
    return settings


def stream(records, *, batch_size=4, seed=0, kind="jit", devices=1, settings=None, **options):
    parallel = parallel_for(kind, jax.devices()[:devices])
    settings, key = settings or settings_of(), jax.random.key(seed)
    return StreamBatches(
        records,
        batch_size=batch_size,
        seed=seed,
        parallel=parallel,
        settings=settings,
        ignore_label=SPEC.ignore_label,
        key=key,
        **options,
    )


def in_time(function, *arguments):
    """What `function` returns or raises; fails where it takes too long."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(function, *arguments).result(PATIENCE)
    finally:
        pool.shutdown(wait=False)


def own_threads():
    return [thread for thread in threading.enumerate() if "grain" in thread.name]


def wait_until_no_thread_is_left():
    give_up = time.monotonic() + PATIENCE
    while own_threads():
        assert time.monotonic() < give_up, own_threads()
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_thread_survives():
    yield
    wait_until_no_thread_is_left()


def host(batch):
    """A batch without the axis of devices that pmap wants."""
    lead = batch["position"].ndim
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[lead:]), batch)


# ---------------------------------------------------------------------------------------------------- the same numbers

CASES = {
    "windows of larger images": settings_of(crop=(24, 32), scale=(0.6, 2.0)),
    "images upsampled alone": settings_of(crop=(33, 40), scale=(1.0, 3.0)),
    "images reduced alone": settings_of(crop=(16, 20), scale=(0.3, 0.9), photometric=False),
    "one scale": settings_of(crop=(40, 24), scale=(1.0, 1.0), photometric=False),
    "a crop larger than any image": settings_of(crop=(200, 300), scale=(0.5, 1.7)),
    "base size, reduced images, few scales": settings_of(base_size=(80, 30), scale=(0.5, 1.1), scale_step=0.2),
    "crops without a class that dominates": settings_of(scale=(0.7, 1.6), cat_max_ratio=0.6),
    "crops around rare classes": settings_of(scale=(0.7, 1.6), class_balance=0.7),
    "rotation of crops larger than most images": settings_of(crop=(70, 90), scale=(0.6, 1.5), rotation=180.0),
    "everything": settings_of(
        base_size=(100, 60), cat_max_ratio=0.6, class_balance=0.3, rotation=20.0, photometric=False, brightness=10
    ),
}
# Pixels of each class of `Noise`, whose last class is rare; 0.6 of the pixels of a crop have class 0.
CLASS_PIXELS = np.array([60_000, 10_000, 8_000, 2_000, 300])


# "everything" combines most of these.
AT_ONCE = ("windows of larger images", "a crop larger than any image", "crops around rare classes", "everything")
EACH_CASE = [pytest.param(case, marks=[pytest.mark.slow] * (case not in AT_ONCE)) for case in CASES]


@pytest.mark.parametrize("case", EACH_CASE)
def test_a_streamed_batch_equals_the_resident_one_bit_for_bit(case):
    records, settings = Noise(), CASES[case]
    split = load(records, ignore_label=255)
    augmented = jax.jit(
        lambda key, step, batch: augment(
            step_keys(key, step, batch["position"])[0],
            batch,
            settings,
            ignore_label=SPEC.ignore_label,
            class_pixels=CLASS_PIXELS,
        )
    )
    for seed in range(3):
        resident = TrainBatches(split, batch_size=5, seed=seed, parallel=JitParallel(jax.devices()[:1]))
        with stream(records, batch_size=5, seed=seed, settings=settings, class_pixels=CLASS_PIXELS) as streamed:
            for step in (*range(6), 1_000_003):
                np.testing.assert_array_equal(streamed.indices(step), resident.indices(step))
                one, other = (
                    augmented(jax.random.key(seed), step, batches.at(step)) for batches in (streamed, resident)
                )
                for ours, expected in zip(one, other, strict=True):
                    np.testing.assert_array_equal(ours, expected)
                assert {0, 1, 2, 3, 4} <= set(np.unique(one[1]).tolist())


def test_a_streamed_sum_of_splits_equals_the_resident_one_bit_for_bit():
    larger = [(height + 17, width + 8) for height, width in SIZES[:3]]
    records = JoinedRecords({"train": Noise(), "val": Noise(larger, seed=1)})
    settings, split = settings_of(crop=(24, 32)), load(records, ignore_label=255)
    augmented = jax.jit(
        lambda key, step, batch: augment(step_keys(key, step, batch["position"])[0], batch, settings, ignore_label=255)
    )
    for seed in (0, 3):
        resident = TrainBatches(split, batch_size=5, seed=seed, parallel=JitParallel(jax.devices()[:1]))
        numbers = set()
        with stream(records, batch_size=5, seed=seed, settings=settings) as streamed:
            for step in range(4):
                numbers |= set(streamed.indices(step).tolist())
                pair = (augmented(jax.random.key(seed), step, batches.at(step)) for batches in (streamed, resident))
                jax.tree.map(np.testing.assert_array_equal, *pair)
        # Images of both splits.
        assert numbers == set(range(len(SIZES) + 3))


def test_only_a_window_of_a_large_image_is_sent_to_the_device():
    with stream(Noise(), settings=CASES["windows of larger images"]) as batches:
        batch = batches.at(0)
    assert batch["image"].shape == (4, 45, 59, 3) and batch["label"].shape == (4, 45, 59)
    with stream(Noise(), settings=CASES["a crop larger than any image"]) as batches:
        assert batches.at(0)["image"].shape == (4, 90, 133, 3)


@pytest.mark.parametrize("seed", range(4))
def test_a_window_contains_every_pixel_that_its_crop_needs(seed):
    # Drawn here, by thousands and at the ends of their ranges, where a pixel too few would be seen.
    rng = np.random.default_rng(seed)
    for _ in range(40):
        smallest = rng.choice([0.1, 0.25, 0.5, 0.7, 1.0, 1.3])
        settings = settings_of(crop=tuple(rng.integers(1, 600, 2).tolist()), scale=(smallest, 2.0))
        sizes = rng.integers(1, 3000, (200, 2)).astype(np.int32)
        scale = np.float32(rng.choice([smallest, rng.uniform(smallest, 2.0)], (200, 1)))
        scaled = np.maximum(np.round(sizes * scale), 1).astype(np.int32)
        room = np.maximum(scaled - settings.crop, 0)
        offset = np.where(rng.random((200, 2)) < 0.5, room, rng.integers(0, room + 1)).astype(np.int32)
        window = window_size(sizes, settings)
        drawn = Crops(scaled, offset, np.zeros(200, bool), np.zeros(200, np.float32), np.zeros((200, 2), np.int32))
        crops = with_origins(drawn, sizes, window, settings)
        for axis, length in enumerate(settings.crop):
            inside = np.minimum(length, scaled - offset)[:, axis]
            for target in (np.zeros_like(inside), inside - 1):
                ratio = (sizes / scaled)[:, axis].astype(np.float32)
                position = (target + offset[:, axis] + np.float32(0.5)) * ratio - np.float32(0.5)
                position = np.clip(position, 0, sizes[:, axis] - 1)
                before = np.floor(position)
                after = np.minimum(before + 1, sizes[:, axis] - 1)
                assert (before >= crops.origin[:, axis]).all()
                assert (after < crops.origin[:, axis] + window[axis]).all()
            assert (crops.origin >= 0).all() and (crops.origin <= np.maximum(sizes - window, 0)).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rotation", [0.0, 25.0, 120.0])
def test_a_window_contains_the_pixels_for_a_base_size_and_a_rotation(seed, rotation):
    rng = np.random.default_rng(seed)
    for _ in range(6):
        crop = tuple(rng.integers(16, 300, 2).tolist())
        base_size = tuple(rng.integers(40, 900, 2).tolist())
        settings = settings_of(crop=crop, base_size=base_size, rotation=rotation, scale=(0.5, 2.0))
        # Images of much different sizes, the ratio of whose sides differs little.
        sizes = (rng.integers(30, 1500, (200, 1)) * rng.uniform(0.8, 1.2, (200, 2))).astype(np.int32)
        keys = jax.random.split(jax.random.key(seed), 200)
        drawn = jax.tree.map(np.asarray, draw_crops(keys, sizes, settings))
        window = window_size(sizes, settings)
        placed = with_origins(drawn, sizes, window, settings)
        assert all(side <= largest for side, largest in zip(window, sizes.max(axis=0), strict=True))
        for i in range(200):
            lengths = np.minimum(crop, drawn.scaled[i] - drawn.offset[i])
            half = (lengths - 1) / 2
            # The border of the crop, turned in float64.
            y, x = (np.linspace(-1, 1, 101) * side for side in half)
            border = np.array(
                [*[(y_, s * half[1]) for y_ in y for s in (-1, 1)], *[(s * half[0], x_) for x_ in x for s in (-1, 1)]]
            )
            cos, sin = np.cos(drawn.angle[i]), np.sin(drawn.angle[i])
            turned = drawn.offset[i] + half + border @ np.array([[cos, sin], [-sin, cos]])
            is_inside = ((turned >= -0.5) & (turned < drawn.scaled[i] - 0.5)).all(axis=1)
            position = np.clip((turned[is_inside] + 0.5) * (sizes[i] / drawn.scaled[i]) - 0.5, 0, sizes[i] - 1)
            if is_inside.any():
                assert (np.floor(position).min(axis=0) >= placed.origin[i]).all()
                last = np.minimum(np.floor(position).max(axis=0) + 1, sizes[i] - 1)
                assert (last < placed.origin[i] + window).all()


def test_windows_are_whole_images_only_if_a_base_size_shrinks_images():
    settings = settings_of(crop=(512, 512), base_size=(2048, 512))
    # Images of 512 pixels at half their size need all rows; larger ones more, smaller ones fewer than they have.
    assert window_size(np.array([(512, 683)]), settings) == (512, 683)
    assert window_size(np.array([(512, 2000)]), settings) == (512, 1029)
    assert window_size(np.array([(512, 2000), (2100, 2800)]), settings) == (2100, 2800)
    assert window_size(np.array([(512, 2000), (2100, 2800)]), settings_of(crop=(512, 512))) == (1029, 1029)


@pytest.mark.parametrize("kind, devices", [("jit", 4), ("pmap", 4)])
def test_a_stream_divides_batches_among_devices_as_a_resident_split_does(kind, devices):
    records, parallel = Noise(), parallel_for(kind, jax.devices()[:devices])
    split = load(records, ignore_label=255)
    with stream(records, batch_size=8, kind=kind, devices=devices) as streamed, stream(records, batch_size=8) as plain:
        expected = TrainBatches(split, batch_size=8, seed=0, parallel=parallel).at(2)
        batch, on_one = streamed.at(2), plain.at(2)
    for name in ("size", "position"):
        assert batch[name].sharding == expected[name].sharding
        np.testing.assert_array_equal(batch[name], expected[name])
    lead = (8,) if kind == "jit" else (4, 2)
    for ours, one in zip(jax.tree.leaves(batch), jax.tree.leaves(on_one), strict=True):
        assert ours.shape == (*lead, *one.shape[1:]) and len(ours.addressable_shards) == 4
    jax.tree.map(np.testing.assert_array_equal, host(batch), host(on_one))


def test_a_stream_does_not_depend_on_jax_enable_x64(float64):
    records = Noise()
    split, settings = load(records, ignore_label=255), settings_of()
    parallel, key = JitParallel(jax.devices()[:1]), jax.random.key(0)
    with stream(records) as streamed:
        for step in range(3):
            both = []
            for batches in (streamed, TrainBatches(split, batch_size=4, seed=0, parallel=parallel)):
                batch = batches.at(step)
                keys, _ = step_keys(key, step, batch["position"])
                both.append(jax.jit(partial(augment, settings=settings, ignore_label=255))(keys, batch))
            jax.tree.map(np.testing.assert_array_equal, *both)


# --------------------------------------------------------------------------------------------------------------- order


def test_steps_can_be_requested_in_any_order():
    with stream(Noise()) as batches:
        ahead = [host(batches.at(step)) for step in range(6)]
        for step in (3, 4, 1, 5, 5, 0):
            jax.tree.map(np.testing.assert_array_equal, host(batches.at(step)), ahead[step])
    with stream(Noise(), start=4) as batches:
        jax.tree.map(np.testing.assert_array_equal, host(batches.at(4)), ahead[4])


def test_images_are_read_before_they_are_requested():
    records = Noise()
    with stream(records, threads=2) as batches:
        give_up = time.monotonic() + PATIENCE
        # Two threads with three batches of four ahead of two on the device.
        while records.reads.sum() < 4 * 4 and time.monotonic() < give_up:
            time.sleep(0.01)
        time.sleep(0.1)
        assert 4 * 4 <= records.reads.sum() <= 4 * 6
        assert batches.waited == 0


def test_the_waiting_time_counts_only_images_that_were_not_ready():
    with stream(Noise(seconds=0.02), batch_size=5, threads=1) as batches:
        batches.at(0)
        before = batches.waited
        for step in range(1, 6):
            batches.at(step)
        assert batches.waited - before > 0.2  # five batches of 0.1 s, of which some were under way
    with stream(Noise(), batch_size=5) as batches:
        batches.at(0)
        before = batches.waited
        for step in range(1, 6):
            time.sleep(0.05)
            batches.at(step)
        assert batches.waited - before < 0.1


def test_decoded_images_are_cached_up_to_the_limit():
    records = Noise()
    every_byte = sum(image.nbytes + label.nbytes for image, label in records.pairs)
    for limit, again in ((0, 7), (every_byte, 0), (every_byte - 1, 1)):
        cached = CachedRecords(Noise(), limit)
        for _ in range(2):
            for number in range(7):
                for ours, expected in zip(cached[number], records.pairs[number], strict=True):
                    np.testing.assert_array_equal(ours, expected)
        assert cached._records.reads.sum() == 7 + again
    records = Noise()
    with stream(records, cache_bytes=every_byte, threads=1) as batches:
        for step in range(20):
            batches.at(step)
    np.testing.assert_array_equal(records.reads, np.ones(7))


# --------------------------------------------------------------------------------------------------------------- faults

FAULTS = {
    "an exception": (ValueError("no PNG"), "no PNG"),
    "the end of a thread": (SystemExit(), "SystemExit"),
    "nothing decoded": ((None, None), r"\(90, 133\).*\(\)"),
    "another size": ((np.zeros((90, 130, 3), np.uint8), np.zeros((90, 130), np.uint8)), r"\(90, 133\).*130"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unusable_record_is_named_and_nothing_hangs(fault):
    broken, message = FAULTS[fault]
    batches = stream(Noise(broken={3: broken}))
    with pytest.raises(RecordError, match=rf"(?s)image3\.png.*{message}"):
        for step in range(4):
            in_time(batches.at, step)
    wait_until_no_thread_is_left()


@pytest.mark.parametrize("fault", FAULTS)
def test_loading_and_evaluating_name_an_unusable_record(fault):
    broken, message = FAULTS[fault]
    records = Noise(broken={3: broken})
    for run in (
        lambda: load(records, ignore_label=255),
        lambda: evaluate(lambda images: [image[..., 0] % 5 for image in images], records, SPEC, batch_size=2),
    ):
        with pytest.raises(RecordError, match=rf"(?s)image3\.png.*{message}"):
            in_time(run)


def test_batches_before_a_broken_record_are_returned():
    records = Noise(broken={3: ValueError("no PNG")})
    with stream(records, batch_size=1) as batches:
        for step in range(7):
            if batches.indices(step) == 3:
                break
            in_time(batches.at, step)
        assert step > 0
        with pytest.raises(RecordError, match=r"image3\.png"):
            in_time(batches.at, step)
        # The one after it, too, without a repair.
        in_time(batches.at, step + 1)


def test_an_error_in_the_caller_ends_the_threads():
    with pytest.raises(ZeroDivisionError), stream(Noise(seconds=0.01)) as batches:
        batches.at(0)
        assert own_threads()
        raise ZeroDivisionError
    wait_until_no_thread_is_left()


def test_unreferenced_batches_end_their_threads():
    batches = stream(Noise())
    in_time(batches.at, 0)
    assert own_threads()
    del batches
    gc.collect()
    wait_until_no_thread_is_left()


def test_closing_twice_is_allowed():
    batches = stream(Noise())
    batches.close()
    batches.close()


def test_a_batch_that_does_not_divide_among_the_devices_is_refused():
    with pytest.raises(ValueError, match="a batch of 6 does not divide among 4 devices"):
        stream(Noise(), batch_size=6, devices=4)


# -------------------------------------------------------------------------------------------------------------- choice


def test_a_run_streams_splits_that_do_not_fit_with_the_same_result(tmp_path):
    rng = np.random.default_rng(0)
    for split, sizes in (("train", SIZES), ("test", SIZES[:2])):
        for part in ("images", "labels"):
            (tmp_path / "data" / part / split).mkdir(parents=True)
        for number, size in enumerate(sizes):
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / "data" / "images" / split / f"{number}.png"), image)
            label = rng.integers(0, 5, size, dtype=np.uint8)
            cv2.imwrite(str(tmp_path / "data" / "labels" / split / f"{number}.png"), label)
    classes = {"names": list("abcde"), "colors": [[0, 0, k] for k in range(5)], "ignore": 255}
    (tmp_path / "data" / "classes.json").write_text(json.dumps(classes))
    config = segformer.get_config("b0,folder")
    config.data.update(source=str(tmp_path / "data"), dir=str(tmp_path / "prepared"), eval_split="test")
    config.augment.crop = (32, 48)
    parallel, key = JitParallel(jax.devices()[:1]), jax.random.key(config.seed)
    gigabytes = 4 * len(SIZES) * 90 * 133 / 1e9
    seen = []
    for limit, kind in ((gigabytes * 1.001, TrainBatches), (gigabytes * 0.999, StreamBatches)):
        config.data.resident_gb = limit
        training, _ = setup.load_data(config.data, seed=config.seed)
        assert training.pixel_counts().sum() == sum(height * width for height, width in SIZES)
        labels = dict(ignore_label=255, class_pixels=None)
        feeding = labels | dict(batch_size=3, seed=config.seed, parallel=parallel, key=key, start=4, cache_gb=0.0)
        with setup.make_batches(training.data, config.augment, **feeding) as batches:
            assert type(batches) is kind
            assert batches.resident_bytes == (
                sum(array.nbytes for array in training.data[:3]) if kind is TrainBatches else 0
            )
            batch = batches.at(4)
            keys, _ = step_keys(key, 4, batch["position"])
            seen.append(jax.jit(partial(augment, settings=config.augment, ignore_label=255))(keys, batch))
    for one, other in zip(*seen, strict=True):
        np.testing.assert_array_equal(one, other)


def test_loading_pads_each_image_at_the_bottom_and_right():
    records = Noise()
    split = load(records, ignore_label=255)
    assert split.images.shape == (7, 90, 133, 3) and split.names == records.names
    for number, (image, label) in enumerate(records.pairs):
        height, width = label.shape
        expected = np.full((90, 133), 255, np.uint8)
        expected[:height, :width] = label
        np.testing.assert_array_equal(split.labels[number], expected)
        np.testing.assert_array_equal(split.images[number, :height, :width], image)
        assert split.images[number, height:].sum() == split.images[number, :, width:].sum() == 0


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_of_records_equals_that_of_the_split(batch_size):
    records = Noise()
    split = load(records, ignore_label=255)

    def predict(images):
        return [image[..., 0] % 5 for image in images]

    from_records, from_split = (
        evaluate(predict, data, SPEC, batch_size=batch_size, keep=(0, 4)) for data in (records, split)
    )
    np.testing.assert_array_equal(from_records[0], from_split[0])
    labelled = sum(np.count_nonzero(label != SPEC.ignore_label) for _, label in records.pairs)
    assert from_records[0].dtype == np.int64 and from_records[0].sum() == labelled
    assert sorted(from_records[1]) == [0, 4]
    for number, predicted in from_records[1].items():
        np.testing.assert_array_equal(predicted, from_split[1][number])
        np.testing.assert_array_equal(predicted, records.pairs[number][0][..., 0] % 5)


def test_evaluation_reads_only_a_few_batches_ahead():
    records = Noise(sizes=[(8, 9)] * 400)
    batches = evaluation_batches(records, batch_size=2)
    next(batches)
    give_up = time.monotonic() + PATIENCE
    while records.reads.sum() < 2 * (pipeline.THREADS + 1) and time.monotonic() < give_up:
        time.sleep(0.01)
    time.sleep(0.1)
    assert 2 * (pipeline.THREADS + 1) <= records.reads.sum() <= 2 * (pipeline.THREADS + 2)
    batches.close()


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_the_parts_of_an_evaluation_are_disjoint_and_complete(parts):
    records, seen, counts = Noise(), [], []
    for part in range(parts):
        before = len(seen)
        seen += [numbers.tolist() for *_, numbers in evaluation_batches(records, batch_size=2, part=(part, parts))]
        counts.append(len(seen) - before)
    assert sorted(number for numbers in seen for number in numbers) == list(range(7))
    assert max(counts) - min(counts) <= 1


def test_an_evaluation_that_stops_halfway_leaves_no_thread():
    def predict(images):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate(predict, Noise(seconds=0.01), SPEC, batch_size=1)
    wait_until_no_thread_is_left()


def test_a_split_is_read_as_records_without_its_padding():
    records = Noise()
    again = SplitRecords(load(records, ignore_label=255))
    assert len(again) == 7 and again.names == records.names
    for number, pair in enumerate(records.pairs):
        for ours, expected in zip(again[number], pair, strict=True):
            np.testing.assert_array_equal(ours, expected)
