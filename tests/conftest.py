"""Eight CPU devices, quick compilation, strict promotion, equal runs of hypothesis: set before jax loads."""

import os

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


@pytest.fixture
def relaxed_promotion():
    """Allow implicit promotion, for a test whose model or dependency relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
