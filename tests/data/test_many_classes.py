"""More than 255 classes on every path: no label is truncated to 8 bits."""

import io
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import segjax
from segjax import losses
from segjax.checkpoints.load import LoadedCheckpoint, load
from segjax.data import builders, codec, specs
from segjax.data.augment import augment, step_keys
from segjax.data.open import open_splits
from segjax.data.pipeline import StreamBatches, TrainBatches
from segjax.inference.batch_run import Run
from segjax.inference.outputs import Job
from segjax.inference.predictor import Predictor
from segjax.runtime.parallel import JitParallel
from segjax.train.schema import default_config
from tests import runs
from tests.pixels import Pixels, scene

pytestmark = pytest.mark.one_python

K, SIZE = 300, (37, 52)
NAMES = tuple(f"thing {k}" for k in range(K))
IGNORED = 65535


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def labels_of(seed):
    """Numbers of classes, uint16, of which two differ by 256, and ignored pixels."""
    return np.random.default_rng(seed).choice(np.array([1, 30, 256, 257, 286, 299, IGNORED], np.uint16), SIZE)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of 16-bit masks; one mask has 8 bits."""
    root = tmp_path_factory.mktemp("many") / "folder"
    for number in range(5):
        split = "train" if number < 3 else "val"
        mask = labels_of(number)
        for part, content in (("images", png(scene(number, *SIZE))), ("labels", png(mask))):
            (root / part / split).mkdir(parents=True, exist_ok=True)
            (root / part / split / f"{number}.png").write_bytes(content)
    (root / "labels/train/2.png").write_bytes(png((labels_of(2) % 256).astype(np.uint8)))
    (root / "classes.json").write_text(json.dumps({"name": "many", "names": NAMES}))
    return root


@pytest.fixture(scope="module")
def data_dir(root):
    return root.parent / "data"


@pytest.fixture(scope="module")
def prepared(root, data_dir):
    return builders.prepare("folder", source=root, data_dir=data_dir)


def truth(number):
    return labels_of(number) % 256 if number == 2 else labels_of(number)


def test_16_bit_masks_are_prepared_and_read_unchanged(prepared):
    spec = prepared.spec
    assert (spec.num_classes, spec.ignore_label, spec.label_dtype) == (K, IGNORED, np.uint16)
    assert len(set(spec.colors)) == K
    split = prepared.load("train")
    assert split.labels.dtype == np.uint16
    for number in range(3):
        np.testing.assert_array_equal(split.labels[number], truth(number))
        label = prepared.records("train")[number][1]
        np.testing.assert_array_equal(label, truth(number))
        assert label.dtype == np.uint16
    counted = np.concatenate([truth(number)[truth(number) != IGNORED] for number in range(3)])
    assert prepared.pixel_counts("train") == np.bincount(counted, minlength=K).tolist()


def test_tfds_itself_reads_16_bit_masks(prepared):
    import tensorflow_datasets as tfds

    (first, *_) = tfds.builder_from_directory(prepared.path).as_data_source("val")
    np.testing.assert_array_equal(first["label"][..., 0], truth(3))


def test_values_without_a_class_are_named(root, tmp_path):
    other = tmp_path / "folder"
    for part, content in (("images", png(scene(0, *SIZE))), ("labels", png(np.full(SIZE, 300, np.uint16)))):
        (other / part / "train").mkdir(parents=True)
        (other / part / "train/a.png").write_bytes(content)
    (other / "classes.json").write_bytes((root / "classes.json").read_bytes())
    with pytest.raises(segjax.data.DataError, match=r"neither a class \(0\.\.299\)[\s\S]*300 \(1924 pixels\)"):
        builders.prepare("folder", source=other, data_dir=tmp_path / "data")


@pytest.mark.parametrize("seed, changes", [(0, {}), (2, {"cat_max_ratio": 0.6, "class_balance": 0.7})])
def test_batches_from_memory_and_from_disk_are_equal(seed, changes, prepared):
    settings, key, parallel = default_config("folder").augment, jax.random.key(seed), JitParallel(jax.devices()[:1])
    settings.update(crop=(32, 40), **changes)
    pixels = np.array(prepared.pixel_counts("train"))
    common = dict(batch_size=3, seed=seed, parallel=parallel)

    @jax.jit
    def sample(batch):
        keys, _ = step_keys(key, 0, batch["position"])
        return augment(keys, batch, settings, ignore_label=IGNORED, class_pixels=pixels)

    streamed = StreamBatches(
        prepared.records("train"), settings=settings, ignore_label=IGNORED, class_pixels=pixels, key=key, **common
    )
    with TrainBatches(prepared.load("train"), **common) as resident, streamed:
        (images, labels), (other_images, other_labels) = sample(resident.at(0)), sample(streamed.at(0))
    assert labels.dtype == np.uint16 and {256, 257, 299, IGNORED} <= set(np.unique(labels).tolist())
    np.testing.assert_array_equal(labels, other_labels)
    np.testing.assert_array_equal(images, other_images)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_loss_uses_all_16_bits_of_a_class(seed):
    logits = np.random.default_rng(seed).standard_normal((2, *SIZE, K)).astype(np.float32)
    labels = np.stack([labels_of(seed), labels_of(seed + 1)])
    settings = default_config("folder").loss
    criterion = losses.criterion(settings, num_classes=K, ignore_label=IGNORED)
    found = criterion.total(jnp.array(logits), jnp.array(labels), criterion.counts(jnp.array(labels)))
    shifted = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    valid = labels != IGNORED
    expected = -np.take_along_axis(shifted, np.where(valid, labels, 0)[..., None].astype(int), -1)[..., 0][valid]
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-5)


def expected_labels(model, image):
    return model.scores(image).argmax(axis=-1)


@pytest.mark.parametrize("settings", [{}, {"mode": "slide", "crop": (24, 32)}, {"flip": True}])
def test_an_evaluation_counts_every_class_and_its_report_shows_them(settings, root, data_dir, tmp_path):
    model = Pixels(K, 11)
    (opened,) = open_splits("folder", ["val"], source=root, data_dir=data_dir)
    output = None if settings else tmp_path / "report"
    found = segjax.evaluate_dataset(model, opened, output=output, **settings)
    counts = np.zeros((K, K), np.int64)
    for number in (3, 4):
        valid = truth(number) != IGNORED
        np.add.at(counts, (truth(number)[valid], expected_labels(model, scene(number, *SIZE))[valid]), 1)
    assert found["pixel_accuracy"] == pytest.approx(np.diag(counts).sum() / counts.sum(), abs=1e-12)
    assert [entry["pixels"] for entry in found["classes"]] == counts.sum(1).tolist()
    if output:
        results = json.loads((output / "results.json").read_text())
        assert results["classes"][299]["class"] == "thing 299" and len(results["worst_images"]) == 2
        assert cv2.imread(str(output / "worst/01.png")) is not None


def test_a_prediction_is_written_in_16_bits_and_in_colours(prepared, tmp_path):
    model, spec = Pixels(K, 11), prepared.spec
    image = scene(4, *SIZE)
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    loaded = LoadedCheckpoint(model=model, classes=spec, mean=specs.IMAGENET_MEAN, std=specs.IMAGENET_STD, metadata={})
    predictor = Predictor(loaded)
    expected = expected_labels(model, image)
    assert expected.max() > 255
    labels = predictor(image)
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, expected)
    outputs = {kind: tmp_path / kind for kind in ("labels", "overlay", "sidebyside", "probabilities")}
    for kinds in (("labels", "overlay", "sidebyside"), ("labels", "probabilities")):
        run = Run(predictor, kinds, less_memory="", incomplete={}, write_record=lambda _: None)
        run([Job(tmp_path / "a.png", {kind: outputs[kind] for kind in kinds}, is_video=False)])
        assert not run.failures
        np.testing.assert_array_equal(codec.decode_mask(outputs["labels"].read_bytes()), expected)
        np.testing.assert_array_equal(np.asarray(Image.open(outputs["labels"])), expected)
    assert cv2.imread(str(outputs["overlay"])).shape[0] >= SIZE[0]
    assert np.load(outputs["probabilities"])["probabilities"].shape == (*SIZE, K)


def test_a_run_trains_evaluates_and_is_loaded_again(root, data_dir, tmp_path, monkeypatch):
    runs.cheap_step(monkeypatch)
    config = runs.make_config(data__name="folder", data__train_split="train", data__eval_split="val")
    config.data.update(source=str(root), dir=str(data_dir))
    config.train.steps = 2
    config.optim.warmup_steps = 1
    config.eval.pictures = 1
    status, said = runs.run(config, tmp_path / "run")
    assert status == 0, said
    result = runs.result_of(tmp_path / "run")
    assert len(result["per_class_iou"]) == K
    loaded = load(tmp_path / "run")
    assert loaded.classes.class_names == NAMES and loaded.classes.ignore_label == IGNORED
    again = segjax.evaluate_dataset(tmp_path / "run")
    assert again["per_class_iou"] == result["per_class_iou"]
