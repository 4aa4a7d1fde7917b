"""What a newcomer meets: --quick, with ImageNet's weights or without, and a card left unused."""

import contextlib
import hashlib
import http.server
import inspect
import socket
import sys
import threading
import time

import keras
import pytest
from conftest import small_inception

import model_training_and_visualization as study

CONTENT = bytes(range(256)) * 2000
MD5 = hashlib.md5(CONTENT).hexdigest()
SECONDS = 0.5  # the time-out in place of 15 s


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty folder for Keras's cache, and no proxy before the loopback address."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "keras").mkdir()
    return tmp_path / "keras"


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as the first folder of the address says."""

    ended = threading.Event()  # which ends a silence, so that no thread is left

    def do_GET(self):
        way = self.path.split("/")[1]
        if way == "silent":
            self.ended.wait()
            return
        if way == "nonsense":
            self.wfile.write(b"no HTTP\r\n")
            return
        if way == "absent":
            self.send_error(404)
            return
        if way == "trickling":  # never silent for long, and never done with its first line
            while not self.ended.wait(SECONDS / 4):
                with contextlib.suppress(OSError):  # the other side has left
                    self.wfile.write(b"H")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        half = len(CONTENT) // 2
        sent = {"whole": CONTENT, "wrong": CONTENT[::-1]}.get(way, CONTENT[:half])
        self.wfile.write(sent)
        if way == "stalling":
            self.wfile.flush()
            self.ended.wait()

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    Server.ended.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield "http://127.0.0.1:{}/{}/weights.h5".format(server.server_port, "{}").format
        Server.ended.set()
        server.shutdown()


def fetched(address):
    return study.imagenet_weights(address, MD5, SECONDS)


# ---- ImageNet's weights: cached, downloaded, or not to be had ----


def test_the_weights_are_downloaded_once_to_where_keras_looks_for_them(address, home, capsys):
    file = fetched(address("whole"))
    assert file == home / "models" / "weights.h5" and file.read_bytes() == CONTENT
    assert "512.0/512.0 kB" in capsys.readouterr().out  # the progress; on no terminal its end
    # Keras finds the file, and takes it for whole: nothing is to be had from this address.
    keras_file = keras.utils.get_file(
        origin=address("absent"), cache_subdir="models", cache_dir=home, file_hash=MD5
    )
    assert keras_file == str(file)
    assert fetched(address("absent")) == file


@pytest.mark.parametrize("before", [None, CONTENT[:-1]])
@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("refusing", "refused|no answer"),  # Windows asks again for two seconds
        ("silent", "no answer for 0.5 s"),
        ("trickling", "no answer for 0.5 s"),
        ("stalling", "no answer for 0.5 s"),
        ("half", "not the whole file"),
        ("wrong", "not the whole file"),
        ("absent", "404"),
        ("nonsense", "no HTTP"),
    ],
)
def test_a_server_that_does_not_send_the_file_is_named_soon_and_the_next_one_asked(
    way, reason, before, address, home
):
    file = home / "models" / "weights.h5"
    if before is not None:
        file.parent.mkdir()
        file.write_bytes(before)
    asked = address(way)
    if way == "refusing":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            asked = f"http://127.0.0.1:{free.getsockname()[1]}/weights.h5"
    start = time.monotonic()
    with pytest.raises(OSError, match=reason):
        fetched(asked)
    assert time.monotonic() - start < 2 + SECONDS
    left = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert left == ([] if before is None else [before])  # nothing half-done beside it
    assert fetched(address("whole")).read_bytes() == CONTENT


def test_the_time_out_and_the_checksum_are_those_that_are_promised():
    assert inspect.signature(study.imagenet_weights).parameters["seconds"].default == 15
    module = sys.modules[keras.applications.InceptionV3.__module__]
    of_keras = inspect.getsource(module).partition("WEIGHTS_PATH_NO_TOP,")[2]
    assert f'file_hash="{study.IMAGENET_MD5}"' in of_keras
    assert study.imagenet_address() == module.WEIGHTS_PATH_NO_TOP


# ---- --quick ----


def unreachable():
    raise OSError("no answer for 15 s")


GIVEN = ["--mixed-precision"]


def must_not_be_asked():
    raise AssertionError("nothing is to be downloaded")


def chosen(fetch, *more):
    """(weights, image size, batch size, epochs) of a quick run."""
    options = study.quick_options(study.parse_options(["--quick", *more]), fetch)
    return options.weights, options.image_size, options.batch_size, options.epochs


def test_quick_starts_from_imagenet_or_else_from_scratch_and_says_why(capsys):
    assert chosen(lambda: None) == ("imagenet", 235, 16, 2)
    assert capsys.readouterr().out == ""
    assert chosen(unreachable) == ("none", 139, 16, 8)
    (line,) = capsys.readouterr().out.splitlines()
    assert "no answer for 15 s" in line and "scratch" in line


def test_what_is_given_beside_quick_wins():
    assert chosen(must_not_be_asked, "--weights", "none") == ("none", 139, 16, 8)
    assert chosen(must_not_be_asked, "--weights", "my.h5") == ("my.h5", 235, 16, 2)
    assert chosen(must_not_be_asked, "--weights", "imagenet") == ("imagenet", 235, 16, 2)
    given = ("--image-size", "299", "--epochs", "10", "--batch-size", "32")  # the usual defaults
    for fetch, weights in ((lambda: None, "imagenet"), (unreachable, "none")):
        assert chosen(fetch, *given) == (weights, 299, 32, 10)
    with pytest.raises(SystemExit):
        study.parse_options(["--quick", "--skip-training"])


def test_quick_computes_in_bfloat16_where_that_is_fast_or_where_it_is_told_to():
    for given, is_fast, expected in (([], True, True), ([], False, False), (GIVEN, False, True)):
        options = study.parse_options(["--quick", *given])
        options = study.quick_options(options, lambda: None, is_fast)
        assert options.mixed_precision == expected
    options = study.parse_options(["--quick", "--weights", "none"])
    assert not study.quick_options(options, must_not_be_asked, True).mixed_precision
    assert not study.parse_options([]).mixed_precision
    assert study.parse_options(GIVEN).mixed_precision


def test_a_model_is_saved_as_keras_and_drawn_from_older_files_too():
    for suffix in (".keras", ".h5", ".hdf5"):
        words = ["--model", f"my{suffix}"]
        assert study.parse_options(["--skip-training", *words]).model.suffix == suffix
        with contextlib.nullcontext() if suffix == ".keras" else pytest.raises(SystemExit):
            study.parse_options(words)


@pytest.mark.filterwarnings("ignore:Even though the")
def test_a_quick_run_without_a_network_trains_from_scratch(split_flowers, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    words = ["--quick", "--data", split_flowers, "--model", tmp_path / "net.keras"]
    words += ["--epochs", 1, "--image-size", 75]
    options = study.parse_options([str(word) for word in words])
    study.tf.config.run_functions_eagerly(True)
    try:
        *_, record = study.train_and_save(options, build=small_inception)
    finally:
        study.tf.config.run_functions_eagerly(False)
    settings = record["settings"]
    assert settings["weights"] == "none" and settings["phases"] == {"scratch": 1}
    assert settings["image_size"] == 75 and settings["batch_size"] == 16


# ---- A card that TensorFlow does not see ----


def test_an_nvidia_card_that_is_not_used_is_told_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    empty, programs, driver = (tmp_path / name for name in ("empty", "programs", "driver"))
    for folder in (empty, programs, driver):
        folder.mkdir()
    program = programs / ("nvidia-smi.exe" if sys.platform == "win32" else "nvidia-smi")
    program.touch(0o755)
    absent = tmp_path / "absent"

    def told(*arguments):
        study.tell_of_unused_gpu(*arguments)
        return capsys.readouterr().out

    for card in ([driver, empty], [absent, programs]):
        line = told([], *card)
        assert line.count("\n") == 1 and "pip install" in line and "and-cuda" in line
        assert told(["GPU:0"], *card) == ""
    assert told([], absent, empty) == ""
    for hidden in ("-1", ""):  # whoever hides it knows of it
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert told([], driver, programs) == ""
