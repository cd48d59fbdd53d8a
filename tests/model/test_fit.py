"""Whether a model fits, with numbers that can be checked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from worker.errors import ConfigurationError
from worker.model import fit
from worker.model.fit import Plan

GPU = {"memory": 24_000_000_000, "free": 23_000_000_000}
CONFIG = {
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_size": 3584,
    "max_position_embeddings": 32_768,
}
PLAN = Plan(1, 1, 0.9, None, "bfloat16", "auto")


def model(folder: Path, size: int, config: dict[str, Any] = CONFIG) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size)
    return folder


def test_a_model_that_fits(tmp_path: Path) -> None:
    """2 (keys, values) x 28 layers x 4 heads x 128 x 2 bytes = 57,344 bytes for each token."""
    estimate = fit.check(model(tmp_path, 15_000_000_000), PLAN, [GPU])
    assert estimate is not None
    assert (estimate.weights, estimate.cache) == (15e9, 57_344 * 32_768)
    assert estimate.available == 24e9 * 0.9


def test_the_error_names_the_longest_context_that_fits(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"does not fit into GPU memory, by estimate") as caught:
        fit.check(model(tmp_path, 19_500_000_000), PLAN, [GPU])
    message = str(caught.value)
    room = 21_600_000_000 - 19_500_000_000 - fit.OVERHEAD_BYTES
    assert f"MAX_MODEL_LEN={room // 57_344 // 256 * 256}" in message
    assert "needs 19.5 GB for weights, 1.9 GB for the cache of one sequence of 32768 tokens" in message
    assert "has 21.6 GB" in message


def test_weights_that_are_too_large(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="a quantized variant"):
        fit.check(model(tmp_path, 140_000_000_000), Plan(1, 1, 0.9, 4096, "bfloat16", "auto"), [GPU, GPU])


def test_a_context_as_long_as_fits(tmp_path: Path) -> None:
    estimate = fit.check(model(tmp_path, 19_500_000_000), Plan(1, 1, 0.9, 0, "bfloat16", "auto"), [GPU])
    assert estimate is not None
    assert estimate.cache == 0


def test_weights_that_vllm_converts_to_16_bits(tmp_path: Path) -> None:
    estimate = fit.check(model(tmp_path, 8_000_000_000, CONFIG | {"torch_dtype": "float32"}), PLAN, [GPU])
    assert estimate is not None
    assert estimate.weights == 4e9


def test_several_gpus_share_the_weights(tmp_path: Path) -> None:
    plan = Plan(8, 1, 0.9, 4096, "bfloat16", "auto")
    estimate = fit.check(model(tmp_path, 140_000_000_000), plan, [GPU] * 8)
    assert estimate is not None
    assert estimate.weights == 17.5e9


@pytest.mark.parametrize(
    ("config", "plan", "size"),
    [
        pytest.param({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, PLAN, 28 * 576 * 2, id="latent attention"),
        pytest.param({}, Plan(1, 1, 0.9, None, "bfloat16", "fp8"), 28_672, id="a cache of 8 bits"),
        pytest.param({}, Plan(1, 1, 0.9, None, "float32", "auto"), 114_688, id="32 bits"),
        pytest.param({"head_dim": 64}, PLAN, 28_672, id="smaller heads"),
        pytest.param({}, Plan(2, 1, 0.9, None, "bfloat16", "auto"), 28_672, id="heads divided"),
        pytest.param({}, Plan(8, 1, 0.9, None, "bfloat16", "auto"), 14_336, id="more GPUs than heads of keys"),
        pytest.param({}, Plan(2, 2, 0.9, None, "bfloat16", "auto"), 14_336, id="layers divided"),
        pytest.param(
            {"kv_lora_rank": 512}, Plan(4, 1, 0.9, None, "bfloat16", "auto"), 28 * 512 * 2, id="latent on every GPU"
        ),
        pytest.param(
            {"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"]}, PLAN, 2_048, id="window"
        ),
    ],
)
def test_the_cache_of_one_token(tmp_path: Path, config: dict[str, Any], plan: Plan, size: int) -> None:
    estimate = fit.check(model(tmp_path, 1000, {"text_config": CONFIG | config}), plan, [GPU] * plan.gpus)
    assert estimate is not None
    assert estimate.cache == size * 32_768


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_without_the_needed_files_is_not_refused(tmp_path: Path, name: str) -> None:
    (model(tmp_path, 10**12) / name).unlink()
    assert fit.check(tmp_path, PLAN, [GPU]) is None


def test_without_gpus_there_is_no_estimate(tmp_path: Path) -> None:
    assert fit.check(model(tmp_path, 10**12), PLAN, []) is None


TWO_NODES = Plan(8, 2, 0.9, 4096, "bfloat16", "auto", nodes=2)


def test_all_nodes_of_a_copy_share_the_weights(tmp_path: Path) -> None:
    """Each node has eight GPUs of its own; `gpus` are those of one node."""
    folder = model(tmp_path, 240_000_000_000)
    estimate = fit.check(folder, TWO_NODES, [GPU] * 8)
    assert estimate is not None
    assert (estimate.fits, estimate.weights) == (True, 15e9)
    assert fit.estimated(folder, TWO_NODES, [GPU] * 7) is None


def test_a_model_that_does_not_fit_all_nodes(tmp_path: Path) -> None:
    folder = model(tmp_path, 400_000_000_000)
    with pytest.raises(ConfigurationError) as caught:
        fit.check(folder, TWO_NODES, [GPU] * 8)
    message = str(caught.value)
    assert "each of 16 GPUs on 2 nodes needs 25.0 GB for weights" in message
    assert "Use a quantized variant (AWQ, FP8), more nodes, or larger GPUs." in message
    estimate = fit.estimated(folder, TWO_NODES, [GPU] * 8)
    assert estimate is not None
    assert not estimate.fits
