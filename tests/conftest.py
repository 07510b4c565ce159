"""Fixtures of all tests. Every test that takes `device` runs on each device that this machine has."""

import os
from collections.abc import Iterator

# Before torch is loaded: on a busy machine, threads that spin while they wait make many small calls very slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Each of several test processes gets its share of the cores, but two threads, so that work is split.
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(2, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
)

import hypothesis
import pytest
import torch

if os.environ.get("TQATTN_HOSTED_MPS"):  # a double of Metal and of torch's MPS device; see metal/hosted
    import metal.hosted
    from metal.hosted.objects import MissingToolError

    try:
        metal.hosted.load()
    except MissingToolError as error:
        pytest.exit(str(error), returncode=2)

import torch_tqattn  # noqa: F401  (loads the operators)

pytest.register_assert_rewrite("caches")  # its asserts say what they compared

hypothesis.settings.register_profile("quick", max_examples=10, deadline=None)
hypothesis.settings.register_profile("full", max_examples=100, deadline=None)
hypothesis.settings.register_profile("deep", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "full"))

DEVICES = ["cpu"]
if torch.backends.mps.is_available():
    DEVICES.append("mps")
if torch.cuda.is_available():
    DEVICES.append("cuda")

# These come first: of several processes none is left with one of them when the others have ended.
LONGEST = {"test_metal_hosted.py", "test_metal_linked.py", "test_neon.py", "test_transformers.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="run one of N of the selected tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = sorted(items[:: config.getoption("--every")], key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DEVICES[1:])
def gpu(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield
