"""Small drawn flowers, and models small enough to be trained on them within seconds."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# No test reads the settings or the weights of whoever starts it; Keras asks when it is imported.
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras_home_")
# As many tests as there are cores run at once: threads of one test would wait for those of another.
os.environ["TF_NUM_INTRAOP_THREADS"] = "1"

import keras
import numpy as np
import pytest
from draw_flowers import draw_flower
from keras import layers
from matplotlib.figure import Figure
from PIL import Image

import model_training_and_visualization as study

atexit.register(shutil.rmtree, os.environ["KERAS_HOME"], ignore_errors=True)
CLASSES = ["daisy", "rose", "tulip"]
# A shell starts a job in the background with Ctrl-C ignored, and so would be what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# To optimize a graph takes longer than it saves in the few steps of a test.
study.tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def write_flowers(folder, classes, per_class, size=96):
    """Draw folder/CLASS/K.jpg and return {path: mask of the flower}."""
    masks = {}
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(per_class):
            path = folder / name / f"{k}.jpg"
            photo, masks[path] = draw_flower(name, np.random.default_rng([label, k]), size)
            Image.fromarray(photo).save(path, quality=92)
    return masks


@pytest.fixture(scope="session")
def split_flowers(tmp_path_factory):
    """A folder with train (8 photos a class), validation (3) and test (3)."""
    folder = tmp_path_factory.mktemp("split")
    for split, per_class in (("train", 8), ("validation", 3), ("test", 3)):
        write_flowers(folder / split, CLASSES, per_class)
    return folder


@pytest.fixture(scope="session")
def three_photos(split_flowers, tmp_path_factory):
    """The first photo of each class in each split."""
    folder = tmp_path_factory.mktemp("three_photos")
    for photo in split_flowers.glob("*/*/0.jpg"):
        place = folder / photo.relative_to(split_flowers)
        place.parent.mkdir(parents=True)
        shutil.copy(photo, place)
    return folder


def small_model(size=32, class_count=3, channels=8):
    """Three convolutions under a softmax, on 0–255 RGB, that learn drawn flowers within seconds."""
    photo = keras.Input((size, size, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(photo)
    for number, strides in enumerate((2, 2, 1), start=1):
        name = f"maps_{number}"
        x = layers.Conv2D(channels * number, 3, strides, activation="relu", name=name)(x)
    means = layers.GlobalAveragePooling2D()(x)
    return keras.Model(photo, layers.Dense(class_count, activation="softmax")(means))


# The convolutions of small_inception: two of the stem, then one a block.
STEM, BLOCKS = ["stem_1", "stem_2"], [f"mixed{number}" for number in range(11)]


def small_inception(class_count, image_size, weights="none"):
    """InceptionV3 in small, as build_model makes it: a stem with two poolings, then eleven blocks.

    Block mixedK ends with the activation of that name, after the convolution mixedK_conv. Without
    dropout, so that what is trained again is the same again.
    """
    photo = keras.Input((image_size, image_size, 3), name="photo")
    x = layers.Rescaling(1 / 127.5, offset=-1)(photo)
    for name in (*STEM, *BLOCKS):
        strides = 2 if name == "stem_1" else 1
        kernel = {"use_bias": False, "kernel_initializer": "he_normal", "name": f"{name}_conv"}
        x = layers.Conv2D(6, 3, strides, padding="same", **kernel)(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)
        x = layers.Activation("relu", name=name)(x)
        if name in STEM:
            x = layers.MaxPooling2D(3, 2)(x)
    hidden = layers.Dense(8, activation="relu", name="hidden")(layers.GlobalAveragePooling2D()(x))
    probabilities = layers.Dense(class_count, activation="softmax", name="classes")(hidden)
    return keras.Model(photo, probabilities)


# What is to be done when a file is opened for writing, or put in its place. Python tells of both,
# whichever function does it: so a disk can be full, or a signal come, at a known moment.
WATCHED = []
RENAMED = []  # functions that are called with the path of each file that is put in its place


def tell_watchers(event, arguments):
    if event == "open":
        path, _, flags = arguments
        path = path if flags & (os.O_WRONLY | os.O_RDWR) else None
    elif event == "os.rename":
        path = arguments[1]
        for tell in tuple(RENAMED):
            tell(path)
    else:
        return
    for watched, end, action in tuple(WATCHED):
        named = isinstance(path, str | os.PathLike)  # and no number of a stream
        if event == watched and named and os.fspath(path).endswith(end):
            action()


sys.addaudithook(tell_watchers)  # which nothing can take away again


@contextlib.contextmanager
def when(event, end, action):
    """Call action() at every "open" for writing, or "os.rename" to, a path that ends so."""
    WATCHED.append((event, end, action))
    try:
        yield
    finally:
        WATCHED.pop()


@contextlib.contextmanager
def remembered_figures():
    """Yield {file name: figure} of the figures that are written.

    Texts and values cannot be read from the pixels of a picture: hence matplotlib's own function is
    patched.
    """
    figures, saved, save = {}, [], Figure.savefig

    def remember(figure, *arguments, **settings):
        saved.append(figure)
        save(figure, *arguments, **settings)

    def put_in_place(path):
        if saved:
            figures[Path(path).name] = saved.pop()

    RENAMED.append(put_in_place)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", remember)
            yield figures
    finally:
        RENAMED.remove(put_in_place)


@contextlib.contextmanager
def full_disk_at(end):
    """From the first file on whose path ends so, only 100 bytes can be written of any."""
    import resource  # which Windows does not have

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = (resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with when("open", end, lambda: resource.setrlimit(*fill)):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """An untrained InceptionV3 classifier of three classes at 75 px, and the file that holds it."""
    keras.utils.set_random_seed(0)
    model = study.build_model(3, 75, "none")
    path = tmp_path_factory.mktemp("model") / "inception.keras"
    model.save(path)
    return model, path


@pytest.fixture(scope="session")
def stock_inception(inception):
    """Keras's own InceptionV3 without its top, built after the one of this project.

    Each weight has a value of its own, so that a swap of two layers of one shape shows.
    """
    stock = keras.applications.InceptionV3(include_top=False, weights=None, input_shape=(75, 75, 3))
    rng = np.random.default_rng(0)
    stock.set_weights([rng.random(it.shape, "float32") for it in stock.get_weights()])
    return stock


# ---- Processes of their own, which go on while other tests run ----

# The script as the command line starts it, with patterns that are drawn within seconds: what they
# look like is tested elsewhere. Nothing is traced, which takes longer than its few steps.
WHOLE_RUN = """
import model_training_and_visualization as study
study.tf.config.run_functions_eagerly(True)
study.run(lambda: study.main(study.parse_options(), pattern_size=48, pattern_steps=1))
"""
# A run with a small model that is killed before the checkpoint of its third epoch is in its place.
KILLED_RUN = """
import os, signal, sys
sys.path.insert(0, "tests")
from conftest import small_inception, study, when
study.tf.config.run_functions_eagerly(True)
with when("os.rename", "_epoch_003.keras", lambda: os.kill(os.getpid(), signal.SIGKILL)):
    study.run(lambda: study.main(study.parse_options(), build=small_inception))
"""
TWO_DEVICES = """
import sys
sys.path.insert(0, "tests")
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from conftest import small_model, study
replicas = []

def build(class_count, image_size, weights):
    replicas.append(tf.distribute.get_strategy().num_replicas_in_sync)
    return small_model(image_size, class_count, channels=1)

*_, record = study.train_and_save(study.parse_options(), build=build)
assert replicas == [2] and len(record["history"]["loss"]) == 2
"""
# One of the head, three of fine-tuning, of two steps each.
FOUR_EPOCHS = ("--epochs", 4, "--learning-rate", 0.01, "--freeze-below", "mixed9", "--seed", 3)
TWO_STEPS = (*FOUR_EPOCHS, "--batch-size", 12)


def words(data, folder, *more):
    """The words of a command line that writes into a folder."""
    places = ["--data", data, "--model", folder / "net.keras", "--output", folder / "Images"]
    return [str(word) for word in (*places, "--image-size", 75, "--batch-size", 7, *more)]


def start(arguments, redirection="", **settings):
    """Start Python in a process of its own, which leaves the tests beside it their processor."""
    line = f'exec nice "$0" "$@" {redirection}'
    command = ["sh", "-c", line, sys.executable, "-W", "ignore:Even though the", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{"cwd": Path(study.__file__).parent} | streams | settings)


@pytest.fixture(scope="session")
def started_run(three_photos, tmp_path_factory):
    """A whole run of the real model that goes on in the background."""
    folder = tmp_path_factory.mktemp("run")
    more = ("--weights", "none", "--epochs", 1, "--batch-size", 24)
    with start(["-c", WHOLE_RUN, *words(three_photos, folder, *more)]) as run:
        yield folder, run
        run.kill()


@pytest.fixture(scope="session")
def started_killed_run(split_flowers, tmp_path_factory):
    """A run, without a standard output, that kills itself in the background."""
    folder = tmp_path_factory.mktemp("killed")
    with start(["-c", KILLED_RUN, *words(split_flowers, folder, *TWO_STEPS)], ">&-") as run:
        yield folder, run
        run.kill()


@pytest.fixture(scope="session")
def started_mirrored_run(split_flowers, tmp_path_factory):
    """A small model that is trained on two devices in the background."""
    more = ("--weights", "none", "--epochs", 2, "--batch-size", 6)
    arguments = words(split_flowers, tmp_path_factory.mktemp("mirrored"), *more)
    with start(["-c", TWO_DEVICES, *arguments]) as run:
        yield run
        run.kill()


def save_small(folder, classes=CLASSES):
    """Save a small model, small.keras, and the history of a training that never was."""
    keras.utils.set_random_seed(0)
    small_model(32, channels=1).save(folder / "small.keras")
    history = {name: [1.1, 0.9] for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
    settings = {"phases": {"head": 1, "fine-tuning": 1}}
    record = {"history": history, "classes": classes, "settings": settings}
    (folder / "small_history.json").write_text(json.dumps(record))


NOT_UTF8 = os.fsdecode(b"tulipe \xe9")
MATPLOTLIBRC = """
image.origin: lower
text.usetex: True
savefig.transparent: True
figure.constrained_layout.use: True
font.family: Comic Sans MS
font.size: 40
axes.grid: True
image.cmap: jet
"""
KERAS_JSON = {"backend": "theano", "image_data_format": "channels_first", "floatx": "float16"}
HOSTILE = {
    "MPLBACKEND": "a_backend_that_is_missing",
    "KERAS_BACKEND": "torch",
    "TF_USE_LEGACY_KERAS": "1",
    "PYTHONOPTIMIZE": "2",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
}


@pytest.fixture(scope="session")
def started_hostile_run(split_flowers, tmp_path_factory):
    """The script drawing a small model, under settings and names that it can do without."""
    folder = tmp_path_factory.mktemp("hostile")
    classes = ["daisy", "rose", NOT_UTF8]
    for name, ours in zip(CLASSES, classes, strict=True):
        (folder / "test" / ours).mkdir(parents=True)
        shutil.copy(split_flowers / "test" / name / "0.jpg", folder / "test" / ours)
    save_small(folder, classes)
    (folder / "keras.json").write_text(json.dumps(KERAS_JSON))
    (folder / "matplotlibrc").write_text(MATPLOTLIBRC)
    arguments = [study.__file__, "--skip-training", "--model", "small.keras"]
    arguments += ["--output", f"theirs {NOT_UTF8}"]
    settings = {**os.environ, **HOSTILE, "KERAS_HOME": str(folder)}
    with start(arguments, "2>&-", cwd=folder, env=settings) as run:
        yield folder, run
        run.kill()


@pytest.fixture(scope="session")
def started_in_a_terminal(split_flowers, tmp_path_factory):
    """The script drawing a small model in a terminal, interrupted once it drew what filters see.

    Beside the process there is the future of all that the terminal showed.
    """
    import pty  # which Windows does not have

    folder = tmp_path_factory.mktemp("terminal")
    save_small(folder)
    ours, theirs = pty.openpty()
    arguments = [study.__file__, "--skip-training", "--model", "small.keras"]
    arguments += ["--data", str(split_flowers)]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": subprocess.STDOUT}
    settings = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}

    def watch():
        shown, interrupted = b"", False
        with contextlib.suppress(OSError):  # the end of the program is the end of the terminal
            while part := os.read(ours, 10_000):
                shown += part
                if not interrupted and any((folder / "Images").glob("*_filters.jpg")):
                    run.send_signal(signal.SIGINT)
                    interrupted = True
        os.close(ours)
        return shown.decode()

    with ThreadPoolExecutor() as pool, start(arguments, cwd=folder, env=settings, **streams) as run:
        os.close(theirs)
        yield run, pool.submit(watch)
        run.kill()


def processes_of(item):
    """The fixtures of a test that are processes of their own."""
    names = getattr(item, "fixturenames", ())
    return {name for name in names if name.startswith("started_")}


def pytest_collection_modifyitems(config, items):
    """The tests that wait for processes come last; of the whole suite one half runs beside."""
    items.sort(key=lambda item: bool(processes_of(item)))
    beside = [item for item in items if item.path.name in BESIDE]
    if config.option.reports_to:
        items[:] = beside
        config.pluginmanager.register(ReportsTo(config, config.option.reports_to))
    elif min(len(beside), len(items) - len(beside)) > 100 and not config.option.collectonly:
        items.sort(key=lambda item: item.path.name in BESIDE)
        config.pluginmanager.register(TestsBeside(config))


@pytest.fixture(scope="session", autouse=True)
def start_early(request):
    """Start the processes before the tests that do not need them, where others do."""
    for name in sorted(set().union(*map(processes_of, request.session.items))):
        request.getfixturevalue(name)


# ---- The suite on two cores ----

# These files run in a second pytest while the first one runs the others: hardly a test needs more
# than one core. None of them has a process that is started early.
BESIDE = {
    "test_concepts.py",
    "test_first_minutes.py",
    "test_known_model.py",
    "test_models.py",
    "test_page.py",
    "test_page_browser.py",
    "test_pictures.py",
    "test_recipe.py",
    "test_split.py",
}


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write tests/record anew")
    parser.addoption("--reports-to", help="the file in which a pytest beside another one reports")


class ReportsTo:
    """Writes each report into a file, a line of JSON each, for the pytest that waits for it."""

    def __init__(self, config, path):
        self.config, self.path = config, Path(path)

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")


class TestsBeside:
    """Runs the tests of BESIDE in a second pytest, and tells their results as its own."""

    __test__ = False

    def __init__(self, config):
        self.config = config
        self.folder = tempfile.TemporaryDirectory(prefix="pytest_beside_")
        path = Path(self.folder.name) / "reports"
        path.touch()
        self.reports = path.open(encoding="utf-8")
        arguments = [*config.invocation_params.args, f"--reports-to={path}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=config.invocation_params.dir,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def next_report(self):
        """The next report, or None where the process has ended without one."""
        line = ""
        while not line.endswith("\n"):
            has_ended = self.process.poll() is not None
            part = self.reports.readline()
            line += part
            if not part:
                if has_ended:
                    return None
                time.sleep(0.02)
        data = json.loads(line)
        return self.config.hook.pytest_report_from_serializable(config=self.config, data=data)

    def pytest_runtest_protocol(self, item):
        if item.path.name not in BESIDE:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        when = None
        while when != "teardown":
            report = self.next_report()
            if report is None:
                pytest.exit(f"the tests beside ended before {item.nodeid}", returncode=1)
            assert report.nodeid == item.nodeid
            item.ihook.pytest_runtest_logreport(report=report)
            when = report.when
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self):
        self.process.kill()
        self.process.wait()
        self.reports.close()
        self.folder.cleanup()
