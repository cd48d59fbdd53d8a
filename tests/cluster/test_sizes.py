"""How a model is divided among nodes. Every plan must also be one that vLLM can number."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest

from worker.cluster import sizes
from worker.cluster.sizes import Chosen, Model, Shape, Sizes
from worker.errors import ConfigurationError

TWO, CPUS = Shape(2, 8), Shape(2, 1, is_cpu=True)


def divisors(heads: int) -> Callable[[int], int]:
    return lambda gpus: max(count for count in range(1, gpus + 1) if heads % count == 0)


def holding(gpus: int | None) -> Callable[[int, int], bool | None]:
    """Return a check for a model that needs so many GPUs; None: unknown."""
    return lambda tensor, pipeline: None if gpus is None else tensor * pipeline >= gpus


def model(gpus: int | None = None, *, heads: int = 64, is_moe: bool = False) -> Model:
    return Model(divisors(heads), holding(gpus), is_moe)


@pytest.mark.parametrize(
    ("shape", "of", "chosen", "expected"),
    [
        pytest.param(TWO, model(8), Chosen(), (8, 1, 2, False), id="one node holds the model: a copy on each"),
        pytest.param(TWO, model(1), Chosen(), (8, 1, 2, False), id="one GPU holds the model"),
        pytest.param(TWO, model(16), Chosen(), (8, 2, 1, False), id="one node does not hold it: two groups of layers"),
        pytest.param(TWO, model(17), Chosen(), (8, 2, 1, False), id="both nodes do not hold it: the check reports it"),
        pytest.param(TWO, model(), Chosen(), (8, 2, 1, False), id="unknown: the plan that is safe"),
        pytest.param(TWO, model(1, is_moe=True), Chosen(), (8, 1, 2, True), id="experts across all GPUs"),
        pytest.param(TWO, model(16, heads=4, is_moe=True), Chosen(), (4, 1, 4, True), id="experts and few heads"),
        pytest.param(TWO, model(16, is_moe=True), Chosen(expert=False), (8, 2, 1, False), id="experts, not divided"),
        pytest.param(TWO, model(heads=4), Chosen(), (4, 4, 1, False), id="heads that allow four GPUs: the safe plan"),
        pytest.param(TWO, model(8, heads=4), Chosen(), (4, 2, 2, False), id="four heads, eight GPUs needed: a node's"),
        pytest.param(TWO, model(16, heads=4), Chosen(), (4, 4, 1, False), id="four heads, all GPUs needed"),
        pytest.param(
            TWO,
            model(1, heads=4),
            Chosen(),
            (4, 1, 4, False),
            id="four heads, half a node holds it: two copies on each",
        ),
        pytest.param(Shape(4, 8), model(), Chosen(8, 2), (8, 2, 2, False), id="two sizes by hand: the rest are copies"),
        pytest.param(TWO, model(), Chosen(16), (16, 1, 1, False), id="layers over two nodes, by hand"),
        pytest.param(TWO, model(1), Chosen(4), (4, 1, 4, False), id="four GPUs by hand, and copies on all"),
        pytest.param(TWO, model(1), Chosen(3), (3, 1, 4, False), id="three GPUs by hand, as many copies as possible"),
        pytest.param(TWO, model(), Chosen(pipeline=2), (8, 2, 1, False), id="two groups by hand"),
        pytest.param(TWO, model(), Chosen(pipeline=4), (4, 4, 1, False), id="four groups by hand"),
        pytest.param(TWO, model(), Chosen(pipeline=1), (8, 1, 2, False), id="one group by hand"),
        pytest.param(TWO, model(), Chosen(data=1), (8, 2, 1, False), id="one copy by hand"),
        pytest.param(TWO, model(), Chosen(data=2), (8, 1, 2, False), id="two copies by hand"),
        pytest.param(TWO, model(), Chosen(data=16), (1, 1, 16, False), id="a copy on each GPU by hand"),
        pytest.param(Shape(4, 8), model(), Chosen(data=2), (8, 2, 2, False), id="two copies on four nodes by hand"),
        pytest.param(TWO, model(), Chosen(2, 2, 2), (2, 2, 2, False), id="all by hand"),
        pytest.param(Shape(2, 1), model(1), Chosen(), (1, 1, 2, False), id="nodes with one GPU"),
        pytest.param(Shape(2, 1), model(2), Chosen(), (1, 2, 1, False), id="one GPU on each node is too little"),
        pytest.param(CPUS, model(), Chosen(), (1, 1, 2, False), id="CPUs: a copy on each node"),
        pytest.param(CPUS, model(is_moe=True), Chosen(2), (2, 1, 1, False), id="CPUs: experts are not divided"),
        pytest.param(CPUS, model(), Chosen(2), (2, 1, 1, False), id="CPUs: layers over two nodes by hand"),
        pytest.param(CPUS, model(), Chosen(data=4), (1, 1, 4, False), id="CPUs: two copies on each node by hand"),
        pytest.param(CPUS, model(), Chosen(2, data=2), (2, 1, 2, False), id="CPUs: copies of two processes on a node"),
        pytest.param(CPUS, model(), Chosen(pipeline=2), (1, 2, 1, False), id="CPUs: two groups of layers by hand"),
    ],
)
def test_the_sizes_suit_model_and_nodes(
    shape: Shape, of: Model, chosen: Chosen, expected: tuple[int, int, int, bool]
) -> None:
    found = sizes.choose(shape, of, chosen)
    assert (found.tensor, found.pipeline, found.data, found.expert) == expected


@pytest.mark.parametrize(
    ("shape", "chosen", "message"),
    [
        pytest.param(
            TWO,
            Chosen(8, 3),
            "TENSOR_PARALLEL_SIZE=8 x PIPELINE_PARALLEL_SIZE=3 = 24 needs more GPUs than the 16 of 2 nodes with 8 "
            "GPUs. Use smaller sizes.",
            id="too many GPUs",
        ),
        pytest.param(
            Shape(3, 8),
            Chosen(8, 2),
            "TENSOR_PARALLEL_SIZE=8 x PIPELINE_PARALLEL_SIZE=2: a copy of the model needs 16 GPUs, which cannot be the "
            "same number on each of 3 nodes with 8 GPUs. Use smaller sizes, or another number of nodes.",
            id="copies that leave a node over",
        ),
        pytest.param(
            TWO,
            Chosen(1, 1, 3),
            "TENSOR_PARALLEL_SIZE=1 x PIPELINE_PARALLEL_SIZE=1 x DATA_PARALLEL_SIZE=3 = 3 does not divide over 2 nodes "
            "with 8 GPUs. Use sizes whose product is a multiple of 2.",
            id="copies that do not divide over the nodes",
        ),
        pytest.param(
            Shape(4, None),
            Chosen(2, 3, 2),
            "TENSOR_PARALLEL_SIZE=2 x PIPELINE_PARALLEL_SIZE=3 x DATA_PARALLEL_SIZE=2 puts 3 processes on each of 4 "
            "nodes, but 2 share a layer. They must be within a node, or on whole nodes.",
            id="layers that begin in the middle of a node",
        ),
        pytest.param(
            Shape(2, 8),
            Chosen(4, 1, 3),
            "puts 6 processes on each of 2 nodes with 8 GPUs, but a copy of the model has 4. A copy must be within a "
            "node, or on whole nodes.",
            id="copies that begin in the middle of a node",
        ),
        pytest.param(
            CPUS,
            Chosen(4),
            "puts 2 processes on each of 2 nodes without GPUs, and 4 share a copy of the model. On CPUs, a copy on "
            "several nodes has one process on each. Use TENSOR_PARALLEL_SIZE=2, or DATA_PARALLEL_SIZE=2 for a copy on "
            "each node.",
            id="several processes of a copy on each node's CPUs",
        ),
    ],
)
def test_sizes_that_do_not_match_the_nodes_are_a_mistake(shape: Shape, chosen: Chosen, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        sizes.choose(shape, model(), chosen)
    (line,) = str(caught.value).splitlines()
    assert line.endswith(message)


@pytest.mark.parametrize(
    ("chosen", "is_mistake"),
    [
        pytest.param(Chosen(), False, id="nothing by hand"),
        pytest.param(Chosen(7), False, id="one size by hand"),
        pytest.param(Chosen(1, 1, 3), True, id="three copies on two nodes"),
        pytest.param(Chosen(1, 1, 4), False, id="four copies on two nodes"),
    ],
)
def test_some_mistakes_are_known_without_the_number_of_gpus(chosen: Chosen, *, is_mistake: bool) -> None:
    assert bool(list(sizes.mistakes(Shape(2, None), chosen))) is is_mistake


NODES_AND_GPUS = [Shape(nodes, gpus) for nodes, gpus in product((2, 3, 4), (1, 2, 3, 4, 8))]
SIZES = [None, 1, 2, 3, 4, 6, 8, 16]


@pytest.mark.parametrize("shape", NODES_AND_GPUS, ids=str)
def test_every_plan_keeps_the_rules_of_vllm(shape: Shape) -> None:
    """vLLM requires equal nodes; neighbours share a layer. Nothing by hand always gives a plan."""
    plans = 0
    models = [
        model(need, heads=heads, is_moe=moe) for need in (None, 1, 9) for heads in (1, 6, 64) for moe in (False, True)
    ]
    for chosen in map(Chosen, *zip(*product(SIZES, SIZES, SIZES), strict=True)):
        for each in models:
            try:
                found = sizes.choose(shape, each, chosen)
            except ConfigurationError:
                assert chosen != Chosen()
                continue
            plans += 1
            assert found.copy * found.data == found.per_node * shape.nodes
            assert shape.gpus is not None
            assert 1 <= found.per_node <= shape.gpus
            assert found.per_node % found.tensor == 0 or found.tensor % found.per_node == 0
            assert found.nodes_of_copy * found.per_node == max(found.copy, found.per_node)
            for name in ("tensor", "pipeline", "data"):
                assert getattr(chosen, name) in (None, getattr(found, name))
    assert plans


def test_the_place_of_each_node() -> None:
    """Two copies on four nodes."""
    plan = Sizes(8, 2, 2, expert=False, nodes=4)
    assert (plan.copy, plan.per_node, plan.nodes_of_copy) == (16, 8, 2)
    assert [plan.first_node(rank) for rank in range(4)] == [0, 0, 2, 2]
    assert plan.device_ids(8) is None
    assert plan.ranks(1) == "processes 8 to 15 of 32, counted from 0"
    within = replace(plan, tensor=2, pipeline=1, data=4, nodes=2)
    assert (within.per_node, within.nodes_of_copy) == (4, 1)
    assert within.device_ids(8) == [0, 1, 2, 3]
    assert [within.first_node(rank) for rank in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("of", "chosen", "why"),
    [
        pytest.param(
            model(8),
            Chosen(),
            "One node holds the model. 2 copies of the model on 2 nodes with 8 GPUs, each layer divided among 8 GPUs.",
            id="a copy on each node",
        ),
        pytest.param(
            model(16),
            Chosen(),
            "One node does not hold the model. 1 copy of the model on 2 nodes with 8 GPUs, each layer divided among 8 "
            "GPUs, the layers divided into 2 groups.",
            id="groups of layers",
        ),
        pytest.param(
            model(),
            Chosen(),
            "It is unknown whether one node holds the model; if it does, set DATA_PARALLEL_SIZE=2. 1 copy of the model "
            "on 2 nodes with 8 GPUs, each layer divided among 8 GPUs, the layers divided into 2 groups.",
            id="unknown",
        ),
        pytest.param(
            model(is_moe=True),
            Chosen(),
            "The model has experts. 2 copies of the model on 2 nodes with 8 GPUs, each layer divided among 8 GPUs, the "
            "experts divided among all 16 GPUs.",
            id="experts",
        ),
    ],
)
def test_the_plan_is_told_with_its_reason(of: Model, chosen: Chosen, why: str) -> None:
    assert sizes.choose(TWO, of, chosen).why == why
    assert sizes.choose(TWO, of, chosen).warnings == ()


@pytest.mark.parametrize(
    ("of", "chosen", "warning"),
    [
        pytest.param(model(), Chosen(4, 1, 2), "4 of 8 GPUs of each node are idle.", id="idle GPUs"),
        pytest.param(model(), Chosen(16), "divides each layer among GPUs of several nodes, which is slow", id="slow"),
    ],
)
def test_a_plan_with_a_drawback_causes_a_warning(of: Model, chosen: Chosen, warning: str) -> None:
    (found,) = sizes.choose(TWO, of, chosen).warnings
    assert warning in found


def test_only_positive_numbers_are_chosen_sizes() -> None:
    values = {"TENSOR_PARALLEL_SIZE": "0", "PIPELINE_PARALLEL_SIZE": "2", "DATA_PARALLEL_SIZE": "auto"}
    assert Chosen.of(values) == Chosen(None, 2, None)
