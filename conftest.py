"""Eight CPU devices, quick compilation, strict promotion, equal runs of hypothesis: set before jax loads."""

import ipaddress
import os
import socket

FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    # What is compiled here runs for moments, if at all. These leave the compiled operations as they are, and
    # make machine code of them in a third of the time.
    "--xla_backend_optimization_level": "0",
    "--xla_cpu_use_fusion_emitters": "false",
    "--xla_cpu_parallel_codegen_split_count": "1",
}
given = os.environ.get("XLA_FLAGS", "")
ours = (f"{flag}={value}" for flag, value in FLAGS.items() if flag not in given)
os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "ssam_jax",
    deadline=None,
    derandomize=True,
    max_examples=30,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("ssam_jax")


CONNECT = socket.socket.connect


def connect_locally(self, address):
    """Connect to this machine, and refuse to connect to any other."""
    if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
        raise AssertionError(f"a test must not use the network, and connects to {address!r}")
    return CONNECT(self, address)


def is_local(host):
    """Whether a host is this machine, by its name or its address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which would have to be asked for
        return False


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Let tests connect to this machine alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        yield


# The tests that start other processes take longest. They come first, so that no worker is left alone with one
# at the end, and those that share a module's processes stay with one worker.
LONG = ("test_processes.py", "test_loop.py", "test_language_model.py", "test_demo.py", "test_examples.py")


def pytest_collection_modifyitems(items):
    """Put the long tests first, and leave the others in their order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def relaxed_promotion():
    """Allow implicit promotion, for a test whose model or dependency relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
