"""vLLM's exceptions at start-up as errors of the worker: permanent or temporary."""

import pytest

from worker.engine.startup_errors import failure, translated
from worker.errors import ConfigurationError, StartupError


@pytest.mark.parametrize(
    ("cause", "error_class", "words"),
    [
        pytest.param(None, StartupError, "Engine core initialization failed", id="unknown"),
        pytest.param("RuntimeError: NCCL error", StartupError, "NCCL error", id="temporary"),
        pytest.param("ValueError: bad head size", ConfigurationError, "bad head size", id="permanent"),
        pytest.param("OutOfMemoryError: CUDA out of memory", ConfigurationError, "Lower MAX_MODEL_LEN", id="memory"),
        pytest.param("RuntimeError: no kernel image is available", ConfigurationError, "no kernel", id="GPU"),
    ],
)
def test_an_engine_that_did_not_start(cause: str | None, error_class: type[StartupError], words: str) -> None:
    error = failure("Engine core initialization failed", cause)
    assert type(error) is error_class
    assert words in str(error)


@pytest.mark.parametrize(
    ("raised", "error_class"),
    [
        pytest.param(OSError("No space left on device"), StartupError, id="disk"),
        pytest.param(RuntimeError("CUDA driver error"), StartupError, id="CUDA"),
        pytest.param(RuntimeError("no kernel image is available"), ConfigurationError, id="GPU"),
        pytest.param(NotImplementedError("no LoRA"), ConfigurationError, id="not implemented"),
        pytest.param(KeyError("no such parser"), ConfigurationError, id="settings"),
    ],
)
def test_exceptions_of_vllm_are_translated(raised: Exception, error_class: type[StartupError]) -> None:
    with pytest.raises(StartupError) as caught, translated():
        raise raised
    assert (type(caught.value), str(caught.value)) == (error_class, raised.args[0])
