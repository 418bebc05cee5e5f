import os
import signal

# No test asks the network: tokenizers and weights come from folders that the tests make.
os.environ["HF_HUB_OFFLINE"] = "1"
# Processes that share the cores (pytest -n 2, and what tests start) must not each have a thread for every core: they
# would wait for one another most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if os.environ.get("FASTM3AE_REQUIRE_GPU") == "1":
            pytest.fail("FASTM3AE_REQUIRE_GPU=1, but torch finds no CUDA GPU")
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What runs remember is neither read from the user's folder nor left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def heed_signals():
    """Even where the tests run in the background of a shell script, which has them ignored."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def nan_filled_empty():
    """Fills new tensors with NaN, so that an element which a kernel forgot to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def corpus(tmp_path):
    """Two small arrow files."""
    from corpus import write_corpus

    return write_corpus(tmp_path)


@pytest.fixture
def decoded(monkeypatch):
    """The number of bytes of every image that is decoded."""
    from fastm3ae.data import datasets

    calls = []

    def decode(data, alpha):
        calls.append(len(data))
        return decode_image(data, alpha)

    decode_image = datasets.decode_image
    monkeypatch.setattr(datasets, "decode_image", decode)
    return calls
